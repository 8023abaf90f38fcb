# Regenerates the shipped toy weights: `snakemake --cores all toy_world`. No other rule needs it;
# the default study uses assets/toy as it is committed.


SCRIPTS = Path(workflow.current_basedir).parent / "scripts"


rule toy_world:
    input:
        settings="config/toy_world.yaml",
        code=sorted(map(str, SCRIPTS.parents[1].glob("egrpo/world/*.py"))),
        recipe=sorted(map(str, SCRIPTS.glob("toy_world/*.py"))),
    output:
        folder=directory(f"{at.root.parent}/toy_world"),
    log:
        f"{at.root.parent}/toy_world.log",
    conda:
        "../../envs/egrpo.yaml"
    threads: 2
    params:
        scripts=lambda wc, input: Path(input.recipe[0]).parents[1],
    shell:
        "PYTHONPATH={params.scripts:q} python -m toy_world.recipe --config {input.settings:q} --output {output.folder:q}"
        " > {log:q} 2>&1"
