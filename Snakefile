# E-GRPO: entropy profile -> merge plan -> training -> evaluation -> tables, figures, MLflow.
# Run from this folder: `snakemake --cores all`, or with another study:
# `snakemake --cores all --configfile config/mine.yaml`.

from snakemake.utils import min_version

min_version("9.10")

# Without this test, settings of the default study would leak into a --configfile given by the user.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/compute.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/toy.smk"


report: "workflow/report/workflow.rst"


# The default runs. Everything a user may look at is named, so that a lost file is made again.
rule all:
    default_target: True
    input:
        told("index"),
        default_figures(due),
        profiles(study.default_runs),
        plans(study.default_runs),
        results(study.default_runs, "scores.parquet", "images.parquet", "rollouts.parquet"),
        results(study.default_runs, "config.yaml", "adapter", "monitor", "train.json"),
