# The study, resolved and validated once; paths and helpers that the rules share.
#
# Whether a result stands is decided here, when the plan is made, by what it was computed from
# (egrpo/study/standing.py): times play no part. Snakemake is told by flags: what a job reads is
# `ancient` where the job has nothing to do, and a job that has something to do reads a file that is
# newer than all results. Results are flagged `update`, so that they stay until new ones replace them.

import atexit
import functools
import re
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.settings.enums import RerunTrigger

from egrpo.errors import UserError
from egrpo.ops.checks import check_study
from egrpo.ops.notify import notify
from egrpo.ops.status import change, other_libraries
from egrpo.store.files import lock, refused, write_text
from egrpo.study.due import Due, default_figures
from egrpo.study.layout import SHARED, Layout
from egrpo.study.resolve import load_study, resolve, source_of
from egrpo.study.standing import want
from egrpo.warm import VARIABLE as WARM

# Files and --config are read and laid over each other by the package, as by its commands: Snakemake
# merges what is to be replaced, makes texts of numbers below the top of --config, and passes over a
# key given twice and 010. A workflow that imports this one as a module gives its settings in `config`.
IMPORTED = not workflow.modifier.is_main_snakefile()
GIVEN = workflow.overwrite_configfiles
CONFIG_PATHS = [str(f) for f in (*workflow.configfiles[len(GIVEN) :], *GIVEN)]
OPTIONS = workflow.config_settings.config
CONFIG_FILES = "config of the module" if IMPORTED else source_of(CONFIG_PATHS, OPTIONS)


@contextmanager
def in_one_line():
    """Bad input, or files that cannot be written, as Snakemake says its own errors."""
    try:
        yield
    except (UserError, OSError) as error:
        told = error if isinstance(error, UserError) else refused(error)
        raise (error if told is None else WorkflowError(str(told))) from None


with in_one_line():
    study = (
        resolve(config, CONFIG_FILES) if IMPORTED else load_study(*CONFIG_PATHS, options=OPTIONS)
    )
    check_study(study, CONFIG_FILES)

at = Layout(study)
RUNS = study.runs
STUDY = str(at.root)
IN_JOB = not workflow.is_main_process
due = Due(at, always=IN_JOB)
CHANGED = at.root / "changed"
"""A file that is newer than all results, for jobs that have something to do."""


onstart:
    # Snakemake's own lock is of the working directory; two folders can share their results
    with in_one_line():
        at.root.mkdir(parents=True, exist_ok=True)
        held = lock(at.root / "workflow.lock")
        if held is None:
            raise WorkflowError(
                f"{at.root}: another snakemake works on it; wait for it or end it"
            )
        want(at)
    if workflow.local_exec:
        os.environ[WARM] = f"{os.getpid()}:{tempfile.mkdtemp(prefix='egrpo-')}"
        atexit.register(shutil.rmtree, os.environ[WARM].partition(":")[2], ignore_errors=True)
    for line in other_libraries(at):
        logger.warning(line)
    if workflow.rerun_triggers != {RerunTrigger.MTIME}:
        logger.warning(
            "without `--rerun-triggers mtime` (profiles/default has it) Snakemake starts jobs again "
            "whose results stand; they keep them"
        )
    # what a killed snakemake had put aside is whole where it lies
    shutil.rmtree(Path(".snakemake", "backups"), ignore_errors=True)


onsuccess:
    if problem := notify(at, "finished", log):
        logger.warning(problem)


onerror:
    if problem := notify(at, "failed", log):
        logger.warning(problem)


atexit.register(lambda: at.identities.digests.save())

if workflow.is_main_process:
    for folder in [Path(".snakemake"), *Path(".snakemake").glob("*/")]:
        if folder.exists() and not os.access(folder, os.W_OK):
            raise WorkflowError(
                f"{folder.resolve()}: cannot be written, and Snakemake keeps there what it did; give "
                "this user the right to it, or work in a copy of the project"
            )
    with in_one_line():
        write_text(CHANGED, f"{time.time_ns()}\n")


wildcard_constraints:
    run="|".join(re.escape(name) for name in RUNS),
    key="[0-9a-f]+",
    set="|".join(at.pages.values()),
    page="|".join(at.pages),
    table="|".join(study.tables) or "(?!)",
    figure="|".join(study.figures) or "(?!)",


# -- what has to be done -----------------------------------------------------------------------


@functools.cache
def is_due(stage, name):
    """Whether a result has to be made; why is said once."""
    found = due.result(stage, name)
    if found and not IN_JOB and stage not in SHARED and (why := change(at, stage, name)):
        logger.warning(f"{name}: {why}")
    return found


def marked(found):
    """What makes a job run that is due."""
    return str(CHANGED) if found else ancient(str(CHANGED))


def of(found, paths):
    """What a job reads: only one that is due waits for it, and needs what is not there."""
    paths = list(dict.fromkeys(map(Path, paths)))
    if found:
        return [str(path) for path in paths]
    return [ancient(str(path)) for path in paths if path.exists()]


def changed(stage):
    """Input function: what makes a job run that is due."""
    return in_one_line()(lambda wc: marked(is_due(stage, wc[0])))


def order(stage):
    """Function of a job's order: no input, for it is written when the job is."""
    return in_one_line()(lambda wc: str(due.order(stage, wc[0], write=not workflow.dryrun)))


def reads(stage, paths):
    """Input function: what the job of a result reads of a run that has it."""

    @in_one_line()
    def found(wc):
        run = due.owners[stage, wc[0]] if stage in SHARED else wc[0]
        return of(is_due(stage, wc[0]), paths(run))

    return found


def embedded(*sets):
    """Of a run: embeddings of some sets of its prompts."""
    return lambda run: [at.embeddings(run, which) for which in sets]


def outputs(stage):
    """The declared outputs of a stage, which stay until new ones replace them."""
    folders = ("adapter", "monitor", "snapshots")
    found = {}
    for path in at.outputs(stage, "{key}" if stage in SHARED else "{run}"):
        name = re.sub(r"\W+", "_", path.name.replace("{key}", "file"))
        found[name] = update(directory(str(path)) if path.name in folders else str(path))
    if stage == "suffixes":
        told = {"category": "Entropy", "labels": lambda wc: labels(stage, [wc.run])}
        found["suffixes_html"] = shown(at.run("{run}") / "suffixes.html", stage, **told)
    return found


def tell(stage, what, name=None):
    """Function of a job that tells: its name, its order, what makes it run, or what it reads."""

    @in_one_line()
    def found(wc):
        job = due.told(stage, name or wc[0])
        if what == "name":
            return job.name
        if what == "order":
            return str(job.order(write=not workflow.dryrun))
        delivered_to = [at.store] if stage == "publish" else []
        return marked(job.due) if what == "changed" else of(job.due, job.inputs() + delivered_to)

    return found


def told(page):
    """Files of what a page shows of its runs, with the page, and their delivery to MLflow."""
    set = at.pages[page]
    files = [at.about(set), at.published(set), at.page(page), *map(target, due.names(set))]
    return [at.comparison, *files] if page == "index" else files


def target(name):
    """The file that a table or figure is."""
    return at.table(name) if name in study.tables else at.figure(name)


def asked(*names):
    """Input function: refuses those targets that the study cannot make."""

    def found(wc):
        for name in names:
            if name in study.refused:
                raise WorkflowError(study.refused[name])
        return []

    return found


PLANNED = due.planned(study.default_runs)


def plans(runs):
    """Merge plans of those runs that merge."""
    return [at.run(run) / "plan.json" for run in due.planned(runs)]


def profiles(runs):
    """Entropy profiles of those runs."""
    return sorted({at.profile(run) for run in due.planned(runs)})


def results(runs, *names):
    """Files of runs by name, and of the base model where it has them too."""
    shared = ("scores.parquet", "images.parquet")
    of_runs = [at.run(run) / name for run in runs for name in names]
    of_base = [at.base(run) / name for run in runs for name in names if name in shared]
    return list(dict.fromkeys(of_runs + of_base))


def first_planned():
    """Folder of the first default run with a merge plan."""
    if PLANNED:
        return at.run(PLANNED[0])
    raise WorkflowError(f"{CONFIG_FILES}: none of the default runs merges steps")


# -- labels of `snakemake --report` --------------------------------------------------------------


def labels(shows, runs):
    """Labels of a result: what it shows, of which runs."""

    def few(values):
        found = list(dict.fromkeys(map(str, values)))
        return ", ".join(found) if len(found) <= 4 else f"{len(found)} of them"

    of = [RUNS[run] for run in runs]
    return {
        "shows": shows,
        "method": few(run.method.name for run in of),
        "reward": few(" + ".join(run.train.rewards) for run in of),
        "seed": few(run.seed for run in of),
    }


def target_labels(name):
    """Labels of one table or figure of the study."""
    spec = study.tables.get(name) or study.figures[name]
    return labels(name, due.runs_of(spec.arms))


def shown(file, caption, **of):
    """A result that `snakemake --report` shows; it stays until a new one replaces it."""
    return update(report(str(file), caption=f"../report/{caption}.rst", **of))


def texts(name, caption, **of):
    """A table and its forms as text."""
    file = f"{STUDY}/tables/{{{name}}}"
    found = {end: update(f"{file}.{end}") for end in ("parquet", "csv", "md")}
    return {**found, "html": shown(f"{file}.html", caption, **of)}


def figure(name, category, runs=study.default_runs):
    """A picture with its caption."""
    of = labels(name.replace("_", " "), runs)
    return shown(at.figure(name), name, category=category, labels=of)
