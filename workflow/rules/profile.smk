# The entropy profile of the base model, and the merge plan made from it.


rule profile:
    input:
        config=ancient(config_of_key(load.profile_key)),
        embeddings=lambda wc: at.embeddings(owner(load.profile_key, wc.key)),
        weights=lambda wc: weights(owner(load.profile_key, wc.key)),
        code=MODEL_CODE + sources("stages/profile.py"),
    output:
        profile=f"{STUDY}/profiles/{{key}}/entropy_profile.parquet",
    log:
        f"{STUDY}/logs/profile/{{key}}.log",
    benchmark:
        f"{STUDY}/benchmarks/profile/{{key}}.tsv"
    threads: 1
    conda:
        "../../envs/egrpo.yaml"
    shell:
        "EGRPO_PROGRESS_FD=3 python -m egrpo profile --run-config {input.config:q}"
        " --embeddings {input.embeddings:q} --output {output.profile:q} --threads {threads}"
        " 3>&2 2> {log:q}"


rule plan:
    input:
        config=ancient(f"{STUDY}/runs/{{run}}/config.yaml"),
        profile=lambda wc: at.profile(wc.run),
        code=sources(
            "core/entropy.py", "core/noise.py", "core/plan.py", "core/schedule.py", "stages/plan.py"
        ),
    output:
        plan=f"{STUDY}/runs/{{run}}/plan.json",
        table=f"{STUDY}/runs/{{run}}/merge_plan.parquet",
    params:
        method=lambda wc: RUNS[wc.run].method.model_dump(),
    log:
        f"{STUDY}/logs/plan/{{run}}.log",
    conda:
        "../../envs/egrpo.yaml"
    shell:
        "python -m egrpo plan --run-config {input.config:q} --profile {input.profile:q}"
        " --output {output.plan:q} --table {output.table:q} 3>&2 2> >(tee {log:q} >&3)"
