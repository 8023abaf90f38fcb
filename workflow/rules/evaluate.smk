# One job per model scores all rewards: loading a model is what costs.


rule evaluate_base:
    input:
        settings=f"{STUDY}/settings/base-{{key}}.yaml",
        embeddings=lambda wc: at.embeddings(owner("base", wc.key)),
        weights=lambda wc: weights(owner("base", wc.key)),
        code=sources(*SAMPLING_CODE, "measure/evaluate.py"),
    output:
        scores=f"{STUDY}/base/{{key}}/scores.parquet",
        images=f"{STUDY}/base/{{key}}/images.parquet",
    log:
        f"{STUDY}/logs/evaluate_base/{{key}}.log",
    benchmark:
        f"{STUDY}/benchmarks/evaluate_base/{{key}}.tsv"
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo evaluate --run-config {input.settings:q}"
        " --embeddings {input.embeddings:q} --scores {output.scores:q} --images {output.images:q}"
        " --threads {threads} 3>&2 2> {log:q}"


rule evaluate:
    input:
        settings=lambda wc: at.settings("evaluate", wc.run),
        embeddings=lambda wc: at.embeddings(wc.run),
        weights=lambda wc: weights(wc.run),
        adapter=f"{STUDY}/runs/{{run}}/adapter",
        snapshots=f"{STUDY}/runs/{{run}}/snapshots",
        code=sources(*SAMPLING_CODE, "measure/evaluate.py"),
    output:
        scores=f"{STUDY}/runs/{{run}}/scores.parquet",
        images=f"{STUDY}/runs/{{run}}/images.parquet",
        snapshots=f"{STUDY}/runs/{{run}}/snapshots.parquet",
    log:
        f"{STUDY}/logs/evaluate/{{run}}.log",
    benchmark:
        f"{STUDY}/benchmarks/evaluate/{{run}}.tsv"
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo evaluate --run-config {input.settings:q}"
        " --embeddings {input.embeddings:q} --adapter {input.adapter:q} --scores {output.scores:q}"
        " --images {output.images:q} --snapshots {input.snapshots:q}"
        " --snapshot-scores {output.snapshots:q} --threads {threads} 3>&2 2> {log:q}"
