# Tables, figures and pages over runs, the tracking store, and delivery to MLflow: local rules of
# seconds, which run where snakemake runs, not in the queue of a cluster.

TOLD = {
    "prepare_store": ("prepare", "store", "prepare_store", {"store": update(str(at.store))}),
    "comparison": (
        "comparison",
        None,
        "{set}",
        texts(
            "set",
            "comparison",
            category="Results",
            labels=lambda wc: labels(wc.set.replace("_", " "), due.run_set(wc.set)),
        ),
    ),
    "figures": (
        "figures",
        "default",
        "figures",
        {
            **(
                {n: figure(n, "Entropy", PLANNED) for n in ("entropy", "spread")} if PLANNED else {}
            ),
            "curves": figure("curves", "Training"),
            "before_after": figure("before_after", "Results"),
        },
    ),
    "result_table": (
        "table",
        None,
        "{table}",
        texts(
            "table",
            "result_table",
            category="Paper",
            subcategory="Tables",
            labels=lambda wc: target_labels(wc.table),
        ),
    ),
    "result_figure": (
        "figure",
        None,
        "{figure}",
        {
            "png": shown(
                f"{STUDY}/figures/{{figure}}.png",
                "result_figure",
                category="Paper",
                subcategory="Figures",
                labels=lambda wc: target_labels(wc.figure),
            ),
            "svg": update(f"{STUDY}/figures/{{figure}}.svg"),
        },
    ),
    "about": (
        "about",
        None,
        "about-{set}",
        {
            "page": shown(
                f"{STUDY}/about-{{set}}.html",
                "about",
                category="Configuration and versions",
                labels=lambda wc: labels("versions and settings", due.run_set(wc.set)),
            )
        },
    ),
    "publish": (
        "publish",
        None,
        "publish-{set}",
        {"published": update(f"{STUDY}/published-{{set}}.json")},
    ),
    # one file that tells the story; results/index.html, which leads to it, is written beside
    "page": ("page", None, "page-{page}", {"page": update(f"{STUDY}/{{page}}.html")}),
}
"""By rule: its stage, what it makes where no wildcard says so, its log, and its outputs."""

for name, (stage, made, log_file, files) in TOLD.items():

    rule:
        name:
            name
        input:
            changed=tell(stage, "changed", made),
            results=tell(stage, "inputs", made),
        output:
            **files,
        log:
            f"{STUDY}/logs/{log_file}.log",
        localrule: True
        conda:
            "../../envs/egrpo.yaml"
        params:
            stage=stage,
            order=tell(stage, "order", made),
            name=tell(stage, "name", made),
        shell:
            "python -m egrpo make {params.stage:q} {params.order:q} --name {params.name:q}"
            " 3>&2 2> >(tee {log:q} >&3)"


REFUSED = [name for name in study.refused if name != "paper"]

# Every table and figure of the study is a target by its name; with results come page and delivery.
for name in (*study.tables, *study.figures):

    rule:
        name:
            name
        input:
            target(name),
            told(name) if name in at.pages else [],


for name in REFUSED:

    rule:
        name:
            name
        input:
            asked(name),


rule plans:
    input:
        plans(RUNS),
        profiles(RUNS),


rule suffixes:
    input:
        lambda wc: first_planned() / "suffixes.parquet",


rule paper:
    input:
        asked("paper", *study.paper),
        told("paper"),


rule everything:
    input:
        asked(*REFUSED),
        told("everything"),
