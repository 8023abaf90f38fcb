# The study, resolved and validated once; paths and helpers that the rules share.

import functools
from pathlib import Path

from snakemake.exceptions import WorkflowError

import egrpo
from egrpo.config.load import yaml_of
from egrpo.study import keys
from egrpo.study.layout import PAGES, Layout
from egrpo.study.resolve import load_study, resolve, source_of
from egrpo.planning.trees import check_trees, needs_plan
from egrpo.errors import UserError
from egrpo.ops.checks import check_study
from egrpo.study.files import check_files
from egrpo.study.fingerprint import SAMPLING_CODE, TRAINING_CODE, file_identity
from egrpo.store.files import lock, refused, write_once, write_text

# Files and --config are read and laid over each other by the package, as by its commands: Snakemake
# merges what is to be replaced, makes texts of numbers below the top of --config, and passes over a
# key given twice and 010. A workflow that imports this one as a module gives its settings in `config`.
IMPORTED = not workflow.modifier.is_main_snakefile()
GIVEN = workflow.overwrite_configfiles
CONFIG_PATHS = [str(f) for f in (*workflow.configfiles[len(GIVEN) :], *GIVEN)]
OPTIONS = workflow.config_settings.config
CONFIG_FILES = "config of the module" if IMPORTED else source_of(CONFIG_PATHS, OPTIONS)


def in_one_line(error):
    """Bad input, or files that cannot be written, as Snakemake says its own errors."""
    told = error if isinstance(error, UserError) else refused(error)
    return error if told is None else WorkflowError(str(told))


try:
    study = (
        resolve(config, CONFIG_FILES) if IMPORTED else load_study(*CONFIG_PATHS, options=OPTIONS)
    )
    check_files(study, CONFIG_FILES)
    check_trees(study.runs)
    check_study(study, CONFIG_FILES)
except UserError as error:
    raise in_one_line(error) from None

at = Layout(study)
RUNS = study.runs
STUDY = str(at.root)


onstart:
    # Snakemake's own lock is of the working directory; two folders can share their results
    try:
        at.root.mkdir(parents=True, exist_ok=True)
        held = lock(at.root / "workflow.lock")
    except (UserError, OSError) as error:
        raise in_one_line(error) from None
    if held is None:
        raise WorkflowError(f"{at.root}: another snakemake works on it; wait for it or end it")


# How tables become pages.
RENDERING = (
    "page/render.py",
    "page/templates/document.css",
    "page/templates/document.html.j2",
)


wildcard_constraints:
    run="|".join(re.escape(name) for name in RUNS),
    stage="|".join(keys.KEYS),
    key="[0-9a-f]+",
    set="|".join(PAGES.values()),
    page="|".join(PAGES),
    table="|".join(study.tables) or "(?!)",
    figure="|".join(study.figures) or "(?!)",


@functools.cache
def owners():
    """(stage, key) -> the first run that has it: shared artifacts are made with its settings."""
    found = {}
    for stage, key in keys.KEYS.items():
        for name, run in RUNS.items():
            found.setdefault((stage, key(run)), name)
    return found


def owner(stage, key):
    """The run whose settings stand for a key."""
    return owners()[stage, key]


def write_settings():
    """What stages, tables and figures read. A name holds a digest of all settings that matter there.

    So an edit that matters asks for another file, and an edit that does not asks for the same one,
    which is written once. Not by rules: a job for each would be half of all jobs of a sweep.
    (`ancient(config.yaml)` with a digest in `params` looks simpler and is wrong: a job that depends
    on a job about to run is not asked for its own reasons, and `ancient` then drops it.)
    """
    targets = {**study.tables, **study.figures}
    wanted = {at.settings(stage, run): RUNS[run] for (stage, _), run in owners().items()}
    for path, settings in wanted.items():
        write_once(path, lambda: yaml_of(settings.model_dump()))
    for name, spec in targets.items():
        write_once(at.target_settings(name), lambda: yaml_of({"name": name, **spec.model_dump()}))


if workflow.is_main_process:
    for folder in [Path(".snakemake"), *Path(".snakemake").glob("*/")]:
        if folder.exists() and not os.access(folder, os.W_OK):
            raise WorkflowError(
                f"{folder.resolve()}: cannot be written, and Snakemake keeps there what it did; give "
                "this user the right to it, or work in a copy of the project"
            )
    try:
        write_settings()
    except (UserError, OSError) as error:
        raise in_one_line(error) from None


@functools.cache
def files_under(path):
    """Weights and settings of a local model folder; nothing for a hub id, whose revision is pinned."""
    found = (str(f) for e in ("safetensors", "json") for f in Path(path).glob(f"**/*.{e}"))
    return tuple(sorted(found))


def weights(run):
    """Files of the base model and of the rewards: new weights make everything again."""
    settings = RUNS[run]
    found = list(files_under(settings.model.path))
    for reward in settings.rewards.values():
        for path in reward.files.values():
            found += [path] if Path(path).is_file() else files_under(path)
    return found


def prompt_files(run):
    """Both prompt files of a run."""
    prompts = RUNS[run].prompts
    return [prompts.train, prompts.heldout]


def sources(*parts):
    """A file that stands for the source files behind a stage: an edit makes its outputs again.

    A part is a file, or a folder with its Python files or, where it has none, all its files.

    One file, because the plan of a sweep takes time for each input of each job. Its name holds the
    digest of their contents, its time is that of the last edit.
    """
    root = Path(egrpo.__file__).parent
    files = [f for p in parts for f in (sorted((root / p).glob("*.*")) or [root / p])]
    text = "".join(f"{file_identity(f)}  {f.relative_to(root)}\n" for f in files)
    path = Path(".snakemake", "egrpo", f"code-{keys.digest(text)}.txt")
    edited = max(f.stat().st_mtime for f in files)
    try:
        if not path.exists():
            write_text(path, text)
        if path.stat().st_mtime != edited:
            os.utime(path, (edited, edited))
    except (UserError, OSError) as error:
        raise in_one_line(error) from None
    return str(path)


def configs(runs):
    """Resolved settings of runs."""
    return [at.config(run) for run in runs]


def plans(runs, *files):
    """Merge plans of those runs that merge, or other files of them."""
    planned = [run for run in runs if needs_plan(RUNS[run])]
    return [at.run(run) / file for run in planned for file in files or ("plan.json",)]


def profiles(runs):
    """Entropy profiles that those plans are made from."""
    return sorted({at.profile(run) for run in runs if needs_plan(RUNS[run])})


def results(runs, *names):
    """Files of runs by name, and of the base model where it has them too."""
    shared = ("scores.parquet", "images.parquet")
    of_runs = [at.run(run) / name for run in runs for name in names]
    of_base = [at.base(run) / name for run in runs for name in names if name in shared]
    return list(dict.fromkeys(of_runs + of_base))


def plan_input(wc):
    """The merge plan, for methods that merge."""
    return plans([wc.run])


def runs_of(arms):
    """Runs of some arms, by seed."""
    return [run for arm in arms for run in at.arm(arm)]


def run_set(name):
    """Runs that are compared and delivered together."""
    paper = [study.tables.get(n) or study.figures[n] for n in study.paper]
    return {
        "comparison": list(study.default_runs),
        "paper_runs": list(dict.fromkeys(runs_of([a for spec in paper for a in spec.arms]))),
        "all_runs": list(RUNS),
    }[name]


def names(set):
    """Names of the tables and figures that are delivered with a set of runs."""
    named = {"comparison": (), "paper_runs": study.paper}
    return named.get(set, (*study.tables, *study.figures))


def targets(set):
    """Their files."""
    return [target(n) for n in names(set)]


def settings_options(option, set, specs):
    """Command line words that name the settings of those targets that are among ``specs``."""
    files = [str(at.target_settings(n)) for n in names(set) if n in specs]
    return [word for file in files for word in (option, file)]


def some_targets(set):
    """The targets of a set; a study without any has no paper."""
    found = targets(set)
    if not found:
        raise WorkflowError(f"{CONFIG_FILES}: the study names no tables and figures to make")
    return found


def default_figures():
    """Pictures of the default runs."""
    planned = ["entropy", "spread"] if profiles(study.default_runs) else []
    return [at.figures / f"{name}.png" for name in ["curves", "before_after", *planned]]


def first_planned():
    """Folder of the first default run with a merge plan."""
    for run in study.default_runs:
        if needs_plan(RUNS[run]):
            return at.run(run)
    raise WorkflowError(f"{CONFIG_FILES}: none of the default runs merges steps")


def table_inputs(wc):
    """What a table of results is made from."""
    runs = runs_of(study.tables[wc.table].arms)
    return results(runs, "scores.parquet", "snapshots.parquet", "train.json")


def figure_inputs(wc):
    """What a figure is made from."""
    spec = study.figures[wc.figure]
    runs = runs_of(spec.arms)
    if spec.kind == "curves":
        return results(runs, "train_metrics.parquet")
    if spec.kind == "images":
        return results(runs, "images.parquet")
    shown = [at.branches(run) for run in runs[:1]] if spec.kind == "branches" else []
    return profiles(runs) + plans(runs) + shown


def target(name):
    """The file that a table or figure is."""
    return at.table(name) if name in study.tables else at.figure(name)


def labels(shows, runs):
    """Labels of a result in `snakemake --report`: what it shows, of which runs."""

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
    return labels(name, runs_of(spec.arms))


def figure(name, category, runs=study.default_runs):
    """A picture with its caption, for `snakemake --report`."""
    return report(
        at.figures / f"{name}.png",
        caption=f"../report/{name}.rst",
        category=category,
        labels=labels(name.replace("_", " "), runs),
    )
