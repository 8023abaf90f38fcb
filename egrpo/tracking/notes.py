"""Descriptions of MLflow's runs, in Markdown: what a run is, what came out, how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from egrpo.config.models import RunConfig
from egrpo.report.evaluations import Row
from egrpo.report.render import escaped, pipes
from egrpo.report.text import HEADER, cells, in_order, readable, verdicts, warning_lines

STUDY_NOTE = """\
A study. Below this run lies one run for each training, below each of those its evaluation, and
beside them the evaluation of the base model.

Tables and figures over runs are artifacts of this run (`tables`, `figures`). The menu *Views* of
the runs page lists training runs, means over seeds and evaluations.
"""


def evaluation_note(run: RunConfig, scores: Sequence[Row], comparison: Sequence[Row] | None) -> str:
    """Description of an evaluation, as of its scores; ``comparison`` None: of the base model."""
    prompts = len({row["prompt_id"] for row in scores})
    samples = max((row["sample"] + 1 for row in scores), default=0)
    height = run.evaluate.height or run.model.height
    width = run.evaluate.width or run.model.width
    if comparison is None:
        of = "The base model before training: what trained models are compared with"
    else:
        of = f"The model that run `{run.run}` trained (method `{run.method.name}`, on "
        of += f"{', '.join(sorted(run.train.rewards))}, seed {run.seed})"
    text = [
        f"{of}.",
        "",
        f"{prompts} held-out prompts of `{run.prompts.heldout}`, {samples} samples of each, "
        f"{run.evaluate.steps} sampling steps, {width} x {height} pixels.",
        "",
        *_compared(comparison or ()),
        "Pictures with their prompts and scores: *Artifacts*, `images.json`"
        + (" (samples)." if comparison is None else " (samples) and `before_after.png`."),
        "",
    ]
    return "\n".join(text)


def _compared(comparison: Sequence[Row]) -> list[str]:
    """What came out, in words and as a table; nothing where there is no comparison."""
    if not comparison:
        return []
    rows = in_order(comparison)
    said = [*verdicts(rows), *map(escaped, warning_lines(rows))]
    return [
        *(f"**{line}**" for line in said),
        "",
        *pipes(HEADER, map(cells, rows)),
        "",
        "Means over held-out prompts; \\* trained on this reward.",
        "",
    ]


def run_note(run: RunConfig, comparison: Sequence[Row], model: str | None) -> str:
    """Description of a training run: ``comparison`` has the rows about it, which may be none;
    ``model`` is MLflow's id of its logged model."""
    threshold = getattr(run.method, "threshold", None)
    parts = [
        f"Method `{run.method.name}`" + ("" if threshold is None else f", threshold {threshold}"),
        f"trained on {', '.join(sorted(run.train.rewards))}",
        f"seed {run.seed}",
        f"{run.train.iterations} iterations",
    ]
    if comparison:
        t = readable(comparison[0])
        parts += [f"{t['nfe']} network evaluations", f"{t['seconds']} s of training"]
    text = [", ".join(parts) + ".", ""]
    text += _compared(comparison)
    if model is not None:
        lora = "pipe.load_lora_weights(folder)  # a diffusers pipeline of the base model"
        full = "pipe.transformer = type(pipe.transformer).from_pretrained(folder)"
        text += [
            "The trained weights are the logged model of this run:",
            "",
            "```python",
            f'folder = mlflow.artifacts.download_artifacts("models:/{model}")',
            lora if run.model.tuning == "lora" else full,
            "```",
            "",
        ]
    return "\n".join(text)
