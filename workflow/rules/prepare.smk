# The tracking store, and prompt embeddings. Rules of seconds are local ones: on a cluster they run
# where snakemake runs, not in the queue.


rule prepare_store:
    input:
        changed=tell("prepare", "changed", name="store"),
    output:
        store=update(str(at.store)),
    log:
        f"{STUDY}/logs/prepare_store.log",
    localrule: True
    conda:
        "../../envs/egrpo.yaml"
    params:
        order=tell("prepare", "order", name="store"),
    shell:
        "python -m egrpo make prepare {params.order:q} --name store 3>&2 2> >(tee {log:q} >&3)"


rule embed:
    input:
        changed=changed("embed"),
    output:
        **outputs("embed"),
    log:
        f"{STUDY}/logs/embed/{{key}}.log",
    conda:
        "../../envs/egrpo.yaml"
    threads: 1
    resources:
        launch="python",
    params:
        order=order("embed"),
    shell:
        "EGRPO_PROGRESS_FD=3 {resources.launch} -m egrpo make embed {params.order:q} --name {wildcards.key}"
        " --threads {threads} 3>&2 2> {log:q}"
