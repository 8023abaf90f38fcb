# One job per model samples and scores all rewards: loading a model is what costs.


rule evaluate_base:
    input:
        changed=changed("base"),
        embeddings=reads("base", embedded("heldout")),
    output:
        **outputs("base"),
    log:
        f"{STUDY}/logs/evaluate_base/{{key}}.log",
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    params:
        order=order("base"),
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo make base {params.order:q}"
        " --threads {threads} 3>&2 2> {log:q}"


rule evaluate:
    input:
        changed=changed("evaluate"),
        embeddings=reads("evaluate", embedded("heldout")),
        trained=reads("evaluate", lambda run: [at.run(run) / "adapter"]),
    output:
        **outputs("evaluate"),
    log:
        f"{STUDY}/logs/evaluate/{{run}}.log",
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    params:
        order=order("evaluate"),
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo make evaluate {params.order:q}"
        " --threads {threads} 3>&2 2> {log:q}"
