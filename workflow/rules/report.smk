# Tables, figures and pages over runs, and their delivery to MLflow.


rule comparison:
    input:
        changed=tell("comparison", "changed"),
        results=tell("comparison", "inputs"),
    output:
        **texts(
            "set",
            "comparison",
            category="Results",
            labels=lambda wc: labels(wc.set.replace("_", " "), due.run_set(wc.set)),
        ),
    log:
        f"{STUDY}/logs/{{set}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=tell("comparison", "order"),
    shell:
        "python -m egrpo make comparison {params.order:q} --name {wildcards.set} 3>&2 2> >(tee {log:q} >&3)"


rule figures:
    input:
        changed=tell("figures", "changed", name="default"),
        results=tell("figures", "inputs", name="default"),
    output:
        **({n: figure(n, "Entropy", PLANNED) for n in ("entropy", "spread")} if PLANNED else {}),
        curves=figure("curves", "Training"),
        before_after=figure("before_after", "Results"),
    log:
        f"{STUDY}/logs/figures.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=tell("figures", "order", name="default"),
    shell:
        "python -m egrpo make figures {params.order:q} --name default 3>&2 2> >(tee {log:q} >&3)"


rule result_table:
    input:
        changed=tell("table", "changed"),
        results=tell("table", "inputs"),
    output:
        **texts(
            "table",
            "result_table",
            category="Paper",
            subcategory="Tables",
            labels=lambda wc: target_labels(wc.table),
        ),
    log:
        f"{STUDY}/logs/{{table}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=tell("table", "order"),
    shell:
        "python -m egrpo make table {params.order:q} --name {wildcards.table} 3>&2 2> >(tee {log:q} >&3)"


rule result_figure:
    input:
        changed=tell("figure", "changed"),
        results=tell("figure", "inputs"),
    output:
        png=shown(
            f"{STUDY}/figures/{{figure}}.png",
            "result_figure",
            category="Paper",
            subcategory="Figures",
            labels=lambda wc: target_labels(wc.figure),
        ),
        svg=update(f"{STUDY}/figures/{{figure}}.svg"),
    log:
        f"{STUDY}/logs/{{figure}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=tell("figure", "order"),
    shell:
        "python -m egrpo make figure {params.order:q} --name {wildcards.figure} 3>&2 2> >(tee {log:q} >&3)"


rule about:
    input:
        changed=tell("about", "changed"),
        results=tell("about", "inputs"),
    output:
        page=shown(
            f"{STUDY}/about-{{set}}.html",
            "about",
            category="Configuration and versions",
            labels=lambda wc: labels("versions and settings", due.run_set(wc.set)),
        ),
    log:
        f"{STUDY}/logs/about-{{set}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=tell("about", "order"),
    shell:
        "python -m egrpo make about {params.order:q} --name {wildcards.set} 3>&2 2> >(tee {log:q} >&3)"


rule publish:
    input:
        changed=tell("publish", "changed"),
        results=tell("publish", "inputs"),
        store=lambda wc: of(due.told("publish", wc.set).due, [at.store]),
    output:
        published=update(f"{STUDY}/published-{{set}}.json"),
    log:
        f"{STUDY}/logs/publish-{{set}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=tell("publish", "order"),
    shell:
        "python -m egrpo make publish {params.order:q} --name {wildcards.set} 3>&2 2> >(tee {log:q} >&3)"


# One file that tells the story; results/index.html, which leads to it, is written beside.
rule page:
    input:
        changed=tell("page", "changed"),
        results=tell("page", "inputs"),
    output:
        page=update(f"{STUDY}/{{page}}.html"),
    log:
        f"{STUDY}/logs/page-{{page}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=tell("page", "order"),
    shell:
        "python -m egrpo make page {params.order:q} --name {wildcards.page} 3>&2 2> >(tee {log:q} >&3)"


# Every table and figure of the study is a target by its name.
for name in (*study.tables, *study.figures):

    rule:
        name:
            name
        input:
            target(name),


rule plans:
    input:
        plans(RUNS),
        profiles(RUNS),


rule suffixes:
    input:
        lambda wc: first_planned() / "suffixes.parquet",


rule paper:
    input:
        lambda wc: some_targets("paper_runs"),
        at.about("paper_runs"),
        at.published("paper_runs"),
        at.page("paper"),


rule everything:
    input:
        targets("all_runs"),
        at.about("all_runs"),
        at.published("all_runs"),
        at.page("everything"),
