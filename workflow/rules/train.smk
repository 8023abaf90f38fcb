# One job per run. State is not an output: Snakemake deletes outputs of failed jobs.


rule train:
    input:
        changed=changed("train"),
        embeddings=reads("train", embedded("train", "monitor")),
        plan=reads("train", lambda run: plans([run])),
        store=reads("train", lambda run: [at.store]),
    output:
        **outputs("train"),
    log:
        f"{STUDY}/logs/train/{{run}}.log",
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    params:
        order=order("train"),
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo make train {params.order:q}"
        " --threads {threads} 3>&2 2> {log:q}"
