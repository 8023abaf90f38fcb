# Tables and figures over runs, and their delivery to MLflow.

PLANNED = [run for run in study.default_runs if needs_plan(RUNS[run])]


rule comparison:
    input:
        configs=lambda wc: configs(run_set(wc.set)),
        scores=lambda wc: results(run_set(wc.set), "scores.parquet", "images.parquet"),
        training=lambda wc: results(run_set(wc.set), "train.json", "train_metrics.parquet"),
        code=sources(
            "core/bootstrap.py",
            "report/tables.py",
            "train/warnings.py",
            "store/tables.py",
            *RENDERING,
        ),
    output:
        table=f"{STUDY}/tables/{{set}}.parquet",
        csv=f"{STUDY}/tables/{{set}}.csv",
        markdown=f"{STUDY}/tables/{{set}}.md",
        html=report(
            f"{STUDY}/tables/{{set}}.html",
            caption="../report/comparison.rst",
            category="Results",
            labels=lambda wc: labels(wc.set.replace("_", " "), run_set(wc.set)),
        ),
    log:
        f"{STUDY}/logs/{{set}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.table).parents[2],
    shell:
        "python -m egrpo tables --results {params.results:q} --output {output.table:q}"
        " {input.configs:q} 3>&2 2> >(tee {log:q} >&3)"


rule figures:
    input:
        configs=configs(study.default_runs),
        plans=plans(study.default_runs),
        profiles=profiles(study.default_runs),
        scores=results(study.default_runs, "train_metrics.parquet", "images.parquet"),
        code=sources(
            "core/entropy.py",
            "core/intervals.py",
            "core/plan.py",
            "figures/curves.py",
            "figures/draw.py",
            "figures/profile.py",
            "figures/image_grid.py",
            "planning/plan.py",
            "figures/style.py",
            "report/tables.py",
            "store/tables.py",
        ),
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
        results=lambda wc, output: Path(output.curves).parents[2],
    shell:
        "python -m egrpo figures --results {params.results:q} {input.configs:q}"
        " 3>&2 2> >(tee {log:q} >&3)"


rule result_table:
    input:
        settings=lambda wc: at.target_settings(wc.table),
        configs=lambda wc: configs(runs_of(study.tables[wc.table].arms)),
        results=table_inputs,
        code=sources(
            "core/intervals.py",
            "report/provenance.py",
            "report/results.py",
            "report/results_text.py",
            "report/tables.py",
            "store/tables.py",
            *RENDERING,
        ),
    output:
        table=f"{STUDY}/tables/{{table}}.parquet",
        csv=f"{STUDY}/tables/{{table}}.csv",
        markdown=f"{STUDY}/tables/{{table}}.md",
        html=report(
            f"{STUDY}/tables/{{table}}.html",
            caption="../report/result_table.rst",
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
        results=lambda wc, output: Path(output.table).parents[2],
    shell:
        "python -m egrpo table --results {params.results:q} --settings {input.settings:q}"
        " {input.configs:q} 3>&2 2> >(tee {log:q} >&3)"


rule result_figure:
    input:
        settings=lambda wc: at.target_settings(wc.figure),
        configs=lambda wc: configs(runs_of(study.figures[wc.figure].arms)),
        results=figure_inputs,
        code=sources(
            "core/entropy.py",
            "core/intervals.py",
            "core/plan.py",
            "core/spread.py",
            "figures/branches.py",
            "figures/curves.py",
            "figures/draw.py",
            "figures/profile.py",
            "figures/image_grid.py",
            "planning/plan.py",
            "figures/style.py",
            "report/tables.py",
            "figures/threshold.py",
            "store/tables.py",
        ),
    output:
        png=report(
            f"{STUDY}/figures/{{figure}}.png",
            caption="../report/result_figure.rst",
            category="Paper",
            subcategory="Figures",
            labels=lambda wc: target_labels(wc.figure),
        ),
        svg=f"{STUDY}/figures/{{figure}}.svg",
    log:
        f"{STUDY}/logs/{{figure}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.png).parents[2],
    shell:
        "python -m egrpo figure --results {params.results:q} --settings {input.settings:q}"
        " {input.configs:q} 3>&2 2> >(tee {log:q} >&3)"


rule about:
    input:
        configs=lambda wc: configs(run_set(wc.set)),
        results=lambda wc: results(run_set(wc.set), "scores.parquet", "train.json"),
        code=sources(
            "report/provenance.py",
            "study/sharing.py",
            "page/templates/about.html.j2",
            *RENDERING,
        ),
    output:
        page=report(
            f"{STUDY}/about-{{set}}.html",
            caption="../report/about.rst",
            category="Configuration and versions",
            labels=lambda wc: labels("versions and settings", run_set(wc.set)),
        ),
    log:
        f"{STUDY}/logs/about-{{set}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.page).parents[1],
    shell:
        "python -m egrpo about --results {params.results:q} --output {output.page:q}"
        " {input.configs:q} 3>&2 2> >(tee {log:q} >&3)"


rule publish:
    input:
        configs=lambda wc: configs(run_set(wc.set)),
        store=at.store,
        table=f"{STUDY}/tables/{{set}}.parquet",
        figures=lambda wc: default_figures() if wc.set == "comparison" else [],
        targets=lambda wc: targets(wc.set),
        curves=lambda wc: results(run_set(wc.set), "train_metrics.parquet"),
        code=sources(
            "tracking/notes.py",
            "study/sharing.py",
            "tracking/publish.py",
            "tracking/publish_evaluation.py",
            "tracking/publish_run.py",
            "train/warnings.py",
            "tracking/deliver.py",
            "tracking/client.py",
            "tracking/views.py",
        ),
    output:
        published=f"{STUDY}/published-{{set}}.json",
    log:
        f"{STUDY}/logs/publish-{{set}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.published).parents[1],
    shell:
        "python -m egrpo publish --results {params.results:q} --store {input.store:q}"
        " --table {input.table:q} --output {output.published:q} {input.configs:q}"
        " 3>&2 2> >(tee {log:q} >&3)"


# One file that tells the story; results/index.html, which leads to it, is written beside.
rule page:
    input:
        configs=lambda wc: configs(run_set(PAGES[wc.page])),
        table=lambda wc: at.table(PAGES[wc.page]),
        figures=lambda wc: [] if wc.page == "paper" else default_figures(),
        targets=lambda wc: targets(PAGES[wc.page]),
        target_settings=lambda wc: [at.target_settings(n) for n in names(PAGES[wc.page])],
        plans=lambda wc: plans(run_set(PAGES[wc.page]), "plan.json", "merge_plan.parquet"),
        training=lambda wc: results(
            run_set(PAGES[wc.page]), "monitor", "train.json", "train_metrics.parquet"
        ),
        prompts=lambda wc: sorted({RUNS[run].prompts.heldout for run in run_set(PAGES[wc.page])}),
        code=sources(
            "study/layout.py",
            "page/gallery.py",
            "page/page.py",
            "page/parts.py",
            "report/provenance.py",
            "page/render.py",
            "report/report.py",
            "report/results_text.py",
            "report/tables.py",
            "page/templates",
            "store/tables.py",
        ),
    output:
        page=f"{STUDY}/{{page}}.html",
    log:
        f"{STUDY}/logs/page-{{page}}.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.page).parents[1],
        tables=lambda wc: settings_options("--table", PAGES[wc.page], study.tables),
        figures=lambda wc: settings_options("--figure", PAGES[wc.page], study.figures),
    shell:
        "python -m egrpo page --results {params.results:q} --page {wildcards.page:q}"
        " {params.tables:q} {params.figures:q} {input.configs:q} 3>&2 2> >(tee {log:q} >&3)"


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
        f"{STUDY}/published-paper_runs.json",
        at.page("paper"),


rule everything:
    input:
        targets("all_runs"),
        at.about("all_runs"),
        f"{STUDY}/published-all_runs.json",
        at.page("everything"),
