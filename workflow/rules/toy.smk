# Regenerates the shipped toy weights: `snakemake --cores all toy_world`. No other rule needs it;
# the default study uses assets/toy as it is committed.


SCRIPTS = Path(workflow.current_basedir).parent / "scripts"


rule toy_world:
    input:
        settings="config/toy_world.yaml",
        code=sources("world"),
        recipe=sorted(map(str, SCRIPTS.glob("toy_world/*.py"))),
    output:
        folder=directory(f"{at.root.parent}/toy_world"),
    log:
        f"{at.root.parent}/toy_world.log",
    benchmark:
        f"{at.root.parent}/toy_world.tsv"
    conda:
        "../../envs/egrpo.yaml"
    threads: 2
    params:
        scripts=str(SCRIPTS),
    shell:
        "PYTHONPATH={params.scripts:q} python -m toy_world.recipe --config {input.settings:q} --output {output.folder:q}"
        " > {log:q} 2>&1"
