# The entropy profile of the base model, and the merge plan.


rule profile:
    input:
        changed=changed("profile"),
        embeddings=reads("profile", embedded("profile")),
    output:
        **outputs("profile"),
    log:
        f"{STUDY}/logs/profile/{{key}}.log",
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    params:
        order=order("profile"),
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo make profile {params.order:q}"
        " --threads {threads} 3>&2 2> {log:q}"


rule plan:
    input:
        changed=changed("plan"),
        profile=reads("plan", lambda run: [at.profile(run)]),
    output:
        **outputs("plan"),
    log:
        f"{STUDY}/logs/plan/{{run}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=order("plan"),
    shell:
        "python -m egrpo make plan {params.order:q} 3>&2 2> >(tee {log:q} >&3)"


# How well cheaper suffixes rank the samples of a group, by the plan of one run.
rule suffix_quality:
    input:
        changed=changed("suffixes"),
        plan=reads("suffixes", lambda run: plans([run])),
        embeddings=reads("suffixes", embedded("profile")),
    output:
        **{
            **outputs("suffixes"),
            "suffixes_html": shown(
                f"{STUDY}/runs/{{run}}/suffixes.html",
                "suffixes",
                category="Entropy",
                labels=lambda wc: labels("suffixes", [wc.run]),
            ),
        },
    log:
        f"{STUDY}/logs/suffixes/{{run}}.log",
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    params:
        order=order("suffixes"),
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo make suffixes {params.order:q}"
        " --threads {threads} 3>&2 2> {log:q}"
