# Resolved settings, the tracking store, prompt embeddings. Rules of seconds are local ones: on a cluster
# they run where snakemake runs, not in the queue.


rule run_config:
    input:
        settings=lambda wc: at.settings("run", wc.run),
    output:
        config=f"{STUDY}/runs/{{run}}/config.yaml",
    log:
        f"{STUDY}/logs/run_config/{{run}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    shell:
        "cp {input.settings:q} {output.config:q} 2> {log:q}"


rule prepare_store:
    input:
        settings=at.settings("track", next(iter(RUNS))),
    output:
        store=at.store,
    log:
        f"{STUDY}/logs/prepare_store.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.store).parents[1],
    shell:
        "python -m egrpo prepare --results {params.results:q} --output {output.store:q}"
        " {input.settings:q} 3>&2 2> >(tee {log:q} >&3)"


rule embed:
    input:
        settings=f"{STUDY}/settings/embed-{{key}}.yaml",
        prompts=lambda wc: prompt_files(owner("embed", wc.key)),
        weights=lambda wc: files_under(RUNS[owner("embed", wc.key)].model.path),
        code=sources("models", "measure/embed.py"),
    output:
        embeddings=f"{STUDY}/embeddings/{{key}}.safetensors",
    log:
        f"{STUDY}/logs/embed/{{key}}.log",
    benchmark:
        f"{STUDY}/benchmarks/embed/{{key}}.tsv"
    conda:
        "../../envs/egrpo.yaml"
    resources:
        launch="python",
    shell:
        "{resources.launch} -m egrpo embed --run-config {input.settings:q} --output {output.embeddings:q}"
        " 2> {log:q}"
