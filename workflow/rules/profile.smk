# The entropy profile of the base model, and the merge plan made from it.


rule profile:
    input:
        settings=f"{STUDY}/settings/profile-{{key}}.yaml",
        embeddings=lambda wc: at.embeddings(owner("profile", wc.key)),
        weights=lambda wc: weights(owner("profile", wc.key)),
        code=sources(*SAMPLING_CODE, "core/entropy.py", "measure/profile.py"),
    output:
        profile=f"{STUDY}/profiles/{{key}}/entropy_profile.parquet",
        branches=f"{STUDY}/profiles/{{key}}/branches.parquet",
    log:
        f"{STUDY}/logs/profile/{{key}}.log",
    benchmark:
        f"{STUDY}/benchmarks/profile/{{key}}.tsv"
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo profile --run-config {input.settings:q}"
        " --embeddings {input.embeddings:q} --output {output.profile:q}"
        " --branches {output.branches:q} --threads {threads} 3>&2 2> {log:q}"


rule plan:
    input:
        settings=lambda wc: at.settings("plan", wc.run),
        profile=lambda wc: at.profile(wc.run),
        code=sources(
            "methods/settings.py",
            "planning/trees.py",
            "core/entropy.py",
            "core/noise.py",
            "core/plan.py",
            "core/schedule.py",
            "core/spread.py",
            "planning/plan.py",
        ),
    output:
        plan=f"{STUDY}/runs/{{run}}/plan.json",
        table=f"{STUDY}/runs/{{run}}/merge_plan.parquet",
    log:
        f"{STUDY}/logs/plan/{{run}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    shell:
        "python -m egrpo plan --run-config {input.settings:q} --profile {input.profile:q}"
        " --output {output.plan:q} --table {output.table:q} 3>&2 2> >(tee {log:q} >&3)"


# How well cheaper suffixes rank the samples of a group, by the plan of one run.
rule suffix_quality:
    input:
        settings=lambda wc: at.settings("suffixes", wc.run),
        plan=f"{STUDY}/runs/{{run}}/plan.json",
        embeddings=lambda wc: at.embeddings(wc.run),
        weights=lambda wc: weights(wc.run),
        code=sources(*SAMPLING_CODE, "core/intervals.py", "measure/suffixes.py", *RENDERING),
    output:
        table=f"{STUDY}/runs/{{run}}/suffixes.parquet",
        csv=f"{STUDY}/runs/{{run}}/suffixes.csv",
        markdown=f"{STUDY}/runs/{{run}}/suffixes.md",
        html=report(
            f"{STUDY}/runs/{{run}}/suffixes.html",
            caption="../report/suffixes.rst",
            category="Entropy",
            labels=lambda wc: labels("suffixes", [wc.run]),
        ),
    log:
        f"{STUDY}/logs/suffixes/{{run}}.log",
    benchmark:
        f"{STUDY}/benchmarks/suffixes/{{run}}.tsv"
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo suffixes --run-config {input.settings:q}"
        " --plan {input.plan:q} --embeddings {input.embeddings:q} --output {output.table:q}"
        " --threads {threads} 3>&2 2> {log:q}"
