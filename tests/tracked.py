"""Results of a study as the workflow leaves them, made without training."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from egrpo.config.measuring import Tracking
from egrpo.config.models import Model, Prompts, RunConfig
from egrpo.config.rewards import Verifier
from egrpo.config.training import Train
from egrpo.methods.egrpo import Egrpo
from egrpo.planning.trees import needs_plan
from egrpo.store import tables
from egrpo.store.files import write_json, write_text
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study

SECRET_OPTIONS: dict[str, Any] = {
    "api_key": "sk-planted-1",
    "apikey": "sk-planted-2",
    "api-key": "sk-planted-3",
    "pwd": "planted-4",
    "x": ["bearer planted-5", {"header": "Authorization: Bearer planted-6", "n": 3}],
    "deep": {"hf_pat": {"a": [["hf_planted7"]], "ok": True, "none": None}, "rate": 0.5},
    "link": "https://planted8.example/file?sig=planted9",
    "windows": "C:\\Users\\planted10\\x",
    "above": "../../home/planted11/x",
    "path": "/home/planted12/model.bin",
    "sentence": "the password is planted13",
}
"""Options of a reward of one's own; each text of them might be a secret."""
HARMLESS_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(SECRET_OPTIONS),
    "x": [None, {"header": None, "n": 3}],
    "deep": {"hf_pat": {"a": [[None]], "ok": True, "none": None}, "rate": 0.5},
}
"""What is left of them."""
SECRETS = (
    *(f"planted-{number}" for number in range(1, 7)),
    *(f"planted{number}" for number in range(7, 14)),
    *("planted-user", "planted-word", "planted-query", "tracking.example"),
)
"""Those of them that must not be found, and those of the addresses below."""
TRACKING = "http://tracking.example:5000"
SERVICE = "https://planted-user:planted-word@gpu7.example:8800/v1?sig=planted-query"


def found_in(folder: Path, words: Iterable[str]) -> list[tuple[str, str]]:
    """(word, file) of all words in the bytes of files below a folder, or of one file; tables and
    their metadata are opened, since they are compressed."""
    out = []
    for path in [folder, *folder.rglob("*")]:
        if path.is_file():
            text = path.read_bytes()
            if path.suffix == ".parquet":
                data = pq.read_table(path)
                text += (repr(data.to_pylist()) + repr(data.schema.metadata)).encode()
            out += [(word, str(path)) for word in words if word.encode() in text]
    return out


def run_config(run: str = "a", uri: str | None = None, **fields: Any) -> RunConfig:
    return RunConfig(
        run=run,
        study="small",
        model=fields.pop("model", Model(path="weights")),
        prompts=fields.pop("prompts", Prompts(train="train.txt", heldout="heldout.txt")),
        rewards={"verifier": Verifier(kind="verifier"), **fields.pop("rewards", {})},
        train=Train(rewards={"verifier": 1.0}, iterations=5),
        method=fields.pop("method", Egrpo(threshold=2.2)),
        tracking=Tracking(uri=uri, every_seconds=0.05),
        **fields,
    )


def study_of(folder: Path, *runs: RunConfig) -> Study:
    return Study("small", str(folder / "results"), {r.run: r for r in runs or [run_config()]})


def prompts_of(folder: Path) -> Prompts:
    """Files of which one names its prompts in a column of its own."""
    write_text(folder / "train.txt", "train\n")
    write_text(folder / "heldout.csv", 'id,caption\n1,"held, out"\n')
    train, heldout = (str(folder / name) for name in ("train.txt", "heldout.csv"))
    return Prompts(train=train, heldout=heldout, column="caption")


def line(iteration: int, **metrics: float | None) -> dict[str, Any]:
    values = {"reward/verifier": iteration / 8, "loss": -iteration / 4, **metrics}
    return {
        "iteration": iteration,
        "time": 1.79e9 + iteration,
        "nfe": 100 * iteration,
        "metrics": values,
        "rollouts": {"step": [0] * 50},
    }


def picture(file: Path, color: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(color))


def png(color: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (color, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def results_of(folder: Path, *runs: RunConfig) -> Study:
    """All results of a study with these runs."""
    study = study_of(folder, *runs)
    at = Layout(study)
    comparison = []
    for number, run in enumerate(runs):
        own = at.run(run.run)
        write_json(own / "train.json", {"run": run.run, "key": f"k{number or ''}"})
        write_json(own / "plan.json", {"steps": [0]})
        write_text(own / "config.yaml", f"run: {run.run}\n")
        write_text(own / "adapter" / "pytorch_lora_weights.safetensors", f"weights {run.run}")
        write_text(own / "adapter" / ".snakemake_timestamp", "")
        picture(own / "monitor" / "iteration-000000.png")
        write_metrics(own, [line(i, absent=None) for i in range(6)])
        write_evaluation(own, 200, (0.5, 1.0, None))
        write_evaluation(at.base(run.run), 0, (0.25, 0.75, None))
        if needs_plan(run):
            tables.write_table(at.profile(run.run), tables.ENTROPY_PROFILE, [])
        comparison.append(compared(run.run, run.method.name, 0.25 / (number + 1)))
    tables.write_table(at.comparison, tables.RESULTS, comparison)
    picture(at.figure("curves"))
    return study


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    """The table of training metrics of the run that lies in ``folder``."""
    rows = [
        {"run": folder.name, "iteration": x["iteration"], "nfe": x["nfe"], "metric": k, "value": v}
        for x in lines
        for k, v in x["metrics"].items()
    ]
    tables.write_table(folder / "metrics.parquet", tables.TRAIN_METRICS, rows)


def write_evaluation(folder: Path, color: int, values: tuple[float | None, ...]) -> None:
    """Images of one prompt, and their scores."""
    head = {"run": folder.name, "prompt_id": 0, "prompt": "a red square"}
    samples = range(len(values))
    images = [{**head, "sample": sample, "png": png(color)} for sample in samples]
    tables.write_table(folder / "images.parquet", tables.IMAGES, images)
    scores = [{**head, "sample": s, "reward": "verifier", "value": values[s]} for s in samples]
    tables.write_table(folder / "scores.parquet", tables.SCORES, scores)


def compared(run: str, method: str, gain: float) -> dict[str, Any]:
    """A run's row of the comparison with the base model."""
    head = {"table": "comparison", "section": "", "at": "end", "arm": run, "run": run}
    costs = {"iterations": 5.0, "nfe": 500.0, "seconds": 2.0}
    return (
        head
        | {"method": method, "reward": "verifier", "trained_on": True, "base": 0.5}
        | {"mean": 0.5 + gain, "difference": gain, "low": gain / 2, "high": 2 * gain}
        | {"seeds": 1, "pairs": 2, "invalid": 1, **costs}
    )
