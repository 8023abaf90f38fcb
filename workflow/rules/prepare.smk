# Resolved settings, the tracking store, prompt embeddings.


localrules:
    run_config,
    prepare_store,


rule run_config:
    output:
        config=f"{STUDY}/runs/{{run}}/config.yaml",
    params:
        settings=lambda wc: yaml.safe_dump(RUNS[wc.run].model_dump(), sort_keys=False),
    log:
        f"{STUDY}/logs/run_config/{{run}}.log",
    run:
        Path(output.config).write_text(params.settings, encoding="utf-8")


rule prepare_store:
    input:
        configs=ancient(RUN_CONFIGS),
    output:
        store=at.store,
    params:
        uri=[run.tracking.uri for run in RUNS.values()],
        results=study.results,
    log:
        f"{STUDY}/logs/prepare_store.log",
    conda:
        "../../envs/egrpo.yaml"
    shell:
        "python -m egrpo prepare --results {params.results:q} --output {output.store:q}"
        " {input.configs:q} 3>&2 2> >(tee {log:q} >&3)"


rule embed:
    input:
        config=ancient(config_of_key(load.embedding_key)),
        prompts=lambda wc: list(
            RUNS[owner(load.embedding_key, wc.key)].prompts.model_dump().values()
        ),
        weights=lambda wc: files_under(RUNS[owner(load.embedding_key, wc.key)].model.path),
        code=sources("models", "stages/embed.py"),
    output:
        embeddings=f"{STUDY}/embeddings/{{key}}.safetensors",
    log:
        f"{STUDY}/logs/embed/{{key}}.log",
    benchmark:
        f"{STUDY}/benchmarks/embed/{{key}}.tsv"
    conda:
        "../../envs/egrpo.yaml"
    shell:
        "python -m egrpo embed --run-config {input.config:q} --output {output.embeddings:q}"
        " 2> {log:q}"
