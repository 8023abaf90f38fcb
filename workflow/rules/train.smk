# One job per run. State is not an output: Snakemake deletes outputs of failed jobs.


rule train:
    input:
        settings=lambda wc: at.settings("train", wc.run),
        embeddings=lambda wc: at.embeddings(wc.run),
        plan=plan_input,
        weights=lambda wc: weights(wc.run),
        store=at.store,
        code=sources(*TRAINING_CODE, "train/job.py", "train/warnings.py"),
    output:
        adapter=directory(f"{STUDY}/runs/{{run}}/adapter"),
        monitor=directory(f"{STUDY}/runs/{{run}}/monitor"),
        snapshots=directory(f"{STUDY}/runs/{{run}}/snapshots"),
        summary=f"{STUDY}/runs/{{run}}/train.json",
        metrics=f"{STUDY}/runs/{{run}}/train_metrics.parquet",
        rollouts=f"{STUDY}/runs/{{run}}/rollouts.parquet",
    log:
        f"{STUDY}/logs/train/{{run}}.log",
    benchmark:
        f"{STUDY}/benchmarks/train/{{run}}.tsv"
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    params:
        plan=lambda wc, input: ["--plan", *input.plan] if input.plan else [],
        folder=lambda wc, output: Path(output.summary).parent,
        state=f"{STUDY}/state/{{run}}",
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo train --run-config {input.settings:q} {params.plan:q}"
        " --embeddings {input.embeddings:q} --state {params.state:q} --output {params.folder:q}"
        " --store {input.store:q} --threads {threads} 3>&2 2> {log:q}"
