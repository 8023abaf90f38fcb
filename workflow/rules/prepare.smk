# Resolved settings, the tracking store, prompt embeddings.


os.environ["EGRPO_SETTINGS"] = settings_store()  # not a parameter: those are remembered


envvars:
    "EGRPO_SETTINGS",


rule run_config:
    output:
        config=f"{STUDY}/runs/{{run}}/config.yaml",
    log:
        f"{STUDY}/logs/run_config/{{run}}.log",
    conda:
        "../../envs/egrpo.yaml"
    params:
        settings=lambda wc: keys.digest(RUNS[wc.run].model_dump()),  # so that an edit is noticed
    shell:
        "python workflow/scripts/write_settings.py \"$EGRPO_SETTINGS\" 'run {wildcards.run}'"
        " {output.config:q} 2> {log:q}"


# What one stage reads. The name holds a digest of all settings that matter to the stage, so an
# edit that matters asks for another file and an edit that does not asks for the same one.
# (`ancient(config.yaml)` with a digest in `params` looks simpler and is wrong: a job that depends
# on a job about to run is not asked for its own reasons, and `ancient` then drops it.)
rule settings:
    output:
        settings=f"{STUDY}/settings/{{stage}}-{{key}}.yaml",
    log:
        f"{STUDY}/logs/settings/{{stage}}-{{key}}.log",
    conda:
        "../../envs/egrpo.yaml"
    shell:
        'python workflow/scripts/write_settings.py "$EGRPO_SETTINGS"'
        " {wildcards.stage}-{wildcards.key} {output.settings:q} 2> {log:q}"


# What a table or figure is made by; named by a digest for the same reason.
rule target_settings:
    output:
        settings=f"{STUDY}/settings/{{target}}-{{key}}.yaml",
    log:
        f"{STUDY}/logs/settings/{{target}}-{{key}}.log",
    wildcard_constraints:
        target="|".join((*study.tables, *study.figures)) or "(?!)",
    conda:
        "../../envs/egrpo.yaml"
    shell:
        'python workflow/scripts/write_settings.py "$EGRPO_SETTINGS"'
        " 'target {wildcards.target}' {output.settings:q} 2> {log:q}"


rule prepare_store:
    input:
        settings=at.settings("track", next(iter(RUNS))),
    output:
        store=at.store,
    log:
        f"{STUDY}/logs/prepare_store.log",
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
        code=sources("models", "stages/embed.py"),
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
