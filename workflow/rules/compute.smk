# What is computed of runs, or of what they share. One job per model: loading it is what costs.

HELD_OUT = {"embeddings": embedded("heldout")}
MERGED = {"plan": lambda run: plans([run])}
COMPUTED = {
    "embed": ("embed", {}),
    "profile": ("profile", {"embeddings": embedded("profile")}),
    # how well cheaper suffixes rank the samples of a group, by the plan of one run
    "suffix_quality": ("suffixes", {**MERGED, "embeddings": embedded("profile")}),
    # state is no output: Snakemake deletes outputs of failed jobs
    "train": (
        "train",
        {
            **MERGED,
            "embeddings": embedded("train", "monitor"),
            "store": lambda run: [at.store],
        },
    ),
    "evaluate": ("evaluate", {**HELD_OUT, "trained": lambda run: [at.run(run) / "adapter"]}),
    "evaluate_base": ("base", HELD_OUT),
}
"""By rule: its stage, and what it reads of a run."""

for name, (stage, files) in COMPUTED.items():
    log_file = f"{name if stage == 'base' else stage}/{'{key}' if stage in SHARED else '{run}'}"

    rule:
        name:
            name
        input:
            **{kind: reads(stage, paths) for kind, paths in files.items()},
            changed=changed(stage),
        output:
            **outputs(stage),
        log:
            f"{STUDY}/logs/{log_file}.log",
        conda:
            "../../envs/egrpo.yaml"
        threads: 1
        resources:
            launch="python",
        params:
            stage=stage,
            order=order(stage),
        shell:
            "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo make {params.stage:q} {params.order:q}"
            " --name {wildcards[0]:q} --threads {threads} 3>&2 2> {log:q}"


# The merge plan: of seconds, so it runs where snakemake runs, not in the queue of a cluster.
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
