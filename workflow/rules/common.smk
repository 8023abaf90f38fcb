# The study, resolved and validated once; paths and helpers that the rules share.

import functools
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

from egrpo.config import keys, load
from egrpo.config.layout import Layout
from egrpo.config.trees import needs_plan
from egrpo.errors import UserError
from egrpo.stages.fingerprint import SAMPLING_CODE, TRAINING_CODE

CONFIG_FILES = ", ".join(str(f) for f in workflow.overwrite_configfiles) or "config/config.yaml"

try:
    study = load.resolve(config, CONFIG_FILES)
    load.check_files(study, CONFIG_FILES)
except UserError as error:
    raise WorkflowError(str(error)) from None

at = Layout(study)
RUNS = study.runs
STUDY = str(at.root)


wildcard_constraints:
    run="|".join(re.escape(name) for name in RUNS),
    stage="|".join(keys.KEYS),
    key="[0-9a-f]+",


def owner(stage, key):
    """The first run whose settings have this key: shared artifacts are made with its settings."""
    return next(name for name, run in RUNS.items() if keys.KEYS[stage](run) == key)


@functools.cache
def files_under(path):
    """Weights and settings of a local model folder; nothing for a hub id, whose revision is pinned."""
    return sorted(str(f) for e in ("safetensors", "json") for f in Path(path).glob(f"**/*.{e}"))


def weights(run):
    """Files of the base model and of the rewards: new weights make everything again."""
    settings = RUNS[run]
    rewards = [reward.path for reward in settings.rewards.values() if reward.path]
    return files_under(settings.model.path) + rewards


def sources(*parts):
    """Source files behind a stage: an edit makes its outputs again."""
    root = Path(workflow.basedir) / "egrpo"
    found = []
    for part in parts:
        path = root / part
        found += sorted(path.glob("*.py")) if path.is_dir() else [path]
    return [os.path.relpath(f) for f in found]


MODEL_CODE = sources(*SAMPLING_CODE)
RUN_CONFIGS = [at.config(run) for run in RUNS]


def plan_input(wc):
    """The merge plan, for methods that merge."""
    return at.run(wc.run) / "plan.json" if needs_plan(RUNS[wc.run]) else []


def write_settings(path, run):
    """The resolved settings of a run, as every stage reads them."""
    Path(path).write_text(yaml.safe_dump(RUNS[run].model_dump(), sort_keys=False), encoding="utf-8")


def figure(name, category):
    """A picture with its caption, for `snakemake --report`."""
    return report(
        at.figures / f"{name}.png",
        caption=f"../report/{name}.rst",
        category=category,
        labels={"figure": name.replace("_", " "), "study": study.name},
    )
