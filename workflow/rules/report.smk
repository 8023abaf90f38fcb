# Tables and figures over all runs, and their delivery to MLflow.

PLANS = [at.run(run) / "plan.json" for run in RUNS if needs_plan(RUNS[run])]
PROFILES = sorted({at.profile(run) for run in RUNS if needs_plan(RUNS[run])})
CURVES = [at.run(run) / "train_metrics.parquet" for run in RUNS]
SCORES = [
    folder / name
    for run in RUNS
    for folder in (at.run(run), at.base(run))
    for name in ("scores.parquet", "images.parquet")
]
FIGURES = ["curves", "before_after"] + (["entropy", "spread"] if PROFILES else [])


rule comparison:
    input:
        configs=RUN_CONFIGS,
        scores=SCORES,
        summaries=[at.run(run) / "train.json" for run in RUNS],
        code=sources("core/bootstrap.py", "stages/tables.py", "store/tables.py"),
    output:
        table=at.comparison,
        csv=at.comparison.with_suffix(".csv"),
        markdown=report(
            at.comparison.with_suffix(".md"),
            caption="../report/comparison.rst",
            category="Results",
            labels={"table": "comparison", "study": study.name},
        ),
    log:
        f"{STUDY}/logs/comparison.log",
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.table).parents[2],
    shell:
        "python -m egrpo tables --results {params.results:q} {input.configs:q}"
        " 3>&2 2> >(tee {log:q} >&3)"


rule figures:
    input:
        configs=RUN_CONFIGS,
        plans=PLANS,
        profiles=PROFILES,
        curves=CURVES,
        scores=SCORES,
        code=sources(
            "stages/draw.py", "stages/figures.py", "stages/image_grid.py", "store/tables.py"
        ),
    output:
        **({n: figure(n, "Entropy") for n in ("entropy", "spread")} if PROFILES else {}),
        curves=figure("curves", "Training"),
        before_after=figure("before_after", "Results"),
    log:
        f"{STUDY}/logs/figures.log",
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.curves).parents[2],
    shell:
        "python -m egrpo figures --results {params.results:q} {input.configs:q}"
        " 3>&2 2> >(tee {log:q} >&3)"


rule publish:
    input:
        configs=RUN_CONFIGS,
        store=at.store,
        table=at.comparison,
        figures=[at.figures / f"{name}.png" for name in FIGURES],
        curves=CURVES,
        code=sources("stages/publish.py", "store/tracking.py"),
    output:
        published=f"{STUDY}/published.json",
    log:
        f"{STUDY}/logs/publish.log",
    conda:
        "../../envs/egrpo.yaml"
    params:
        results=lambda wc, output: Path(output.published).parents[1],
    shell:
        "python -m egrpo publish --results {params.results:q} --store {input.store:q}"
        " --output {output.published:q} {input.configs:q} 3>&2 2> >(tee {log:q} >&3)"
