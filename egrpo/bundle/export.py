"""A trained run as a folder for others, in the layout that model hubs expect.

Weights, settings, plan, scores of the run and of its base model, their comparison, some images, and
a model card (``README.md``). Nothing in it says where on this machine it was made.
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path

from egrpo.bundle.model_card import Sample, model_card
from egrpo.config.load import load_run
from egrpo.config.models import RunConfig
from egrpo.errors import DEFAULT, UserError, command
from egrpo.planning.plan import load_plan
from egrpo.planning.trees import needs_plan
from egrpo.report.evaluations import first_samples, is_image, read_images, train_record
from egrpo.report.results import make_comparison
from egrpo.store.files import checksums, full_disk, no_space, read_json, write_json, write_text
from egrpo.store.tables import SCORES, TRAIN_METRICS, read_table
from egrpo.store.weights import read_header
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study
from egrpo.study.sharing import shareable, shown_yaml, without_folder
from egrpo.study.standing import read_receipt

INDEX = "bundle.json"
"""Names the files of a bundle with their SHA-256; a folder that holds it is an earlier bundle."""
SAMPLES = 4
"""Held-out prompts whose images stand in the card."""
LORA = "pytorch_lora_weights.safetensors"
FULL = ("config.json", "diffusion_pytorch_model.safetensors")


def export(
    at: Layout,
    run: str,
    output: Path | None = None,
    *,
    configs: Sequence[str | Path] = (DEFAULT,),
    license: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write the bundle of one run, whole or not at all; an earlier bundle there is replaced.

    The run must be trained and evaluated; without ``output`` its folder is ``export/<run>`` in the
    study's results. ``configs`` are files of the study, for the commands that are shown;
    ``license`` and ``base_model`` what the card says of them.

    Raises:
        UserError: naming the result that is missing and the command that makes it, or what stands
            in the way of the folder.
    """
    if run not in at.study.runs:
        raise UserError(f"{', '.join(map(str, configs))}: no run {run!r}{_nearest(at.study, run)}")
    settings = _settings_of(at, run, configs)
    weights = _inputs(at, settings, configs)
    folder = output or at.bundle(run)
    with _new_folder(folder) as new:
        for name, source in weights.items():
            _write_weights(source, new / name)
        _write_results(at, settings, new)
        samples = _write_samples(at.run(run) / "images.parquet", new)
        results = Path(at.study.results)
        scores = at.run(run).relative_to(results) / "scores.parquet"
        made_by = command(
            [without_folder(str(path)) for path in configs],
            Path(without_folder(str(results))) / scores,
        )
        card = model_card(settings, new, samples, made_by, license, base_model)
        write_text(new / "README.md", card)
        index = {"run": run, "study": settings.study, "files": checksums(new, INDEX)}
        write_json(new / INDEX, index)
    return folder


def _nearest(study: Study, wanted: str) -> str:
    """Which run was meant: one of an arm of that name, one spelt alike, or one of the default's."""
    names = [name for name, run in study.runs.items() if run.arm == wanted]
    if names := names or difflib.get_close_matches(wanted, study.runs, n=3):
        return f"; did you mean {', '.join(names)}?"
    first = list(study.default_runs or study.runs)[:5]
    return f"; there are {', '.join(first)}{' and others' if len(study.runs) > len(first) else ''}"


def _settings_of(at: Layout, run: str, configs: Sequence[str | Path]) -> RunConfig:
    """The settings that the run was made with, which must be the study's."""
    path = at.config(run)
    _there(path, command(configs, path))
    made = load_run(path)
    for stage in ("train", "evaluate"):
        if (read_receipt(at, stage, run) or {}).get("identity") != at.identity(stage, run):
            stale = path, at.run(run) / "scores.parquet", at.base(run) / "scores.parquet"
            raise UserError(
                f"{path}: not the settings that the study has now; `{command(configs, *stale)}` "
                "makes anew what they touch"
            )
    return made


def _there(path: Path, how: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `{how}` makes it")


def _inputs(at: Layout, run: RunConfig, configs: Sequence[str | Path]) -> dict[str, Path]:
    """The weights by their name in the bundle; all else that the bundle needs is there too."""
    folder, base, lora = at.run(run.run), at.base(run.run), run.model.tuning == "lora"
    needed = ["train.json", "metrics.parquet", "scores.parquet", "images.parquet"]
    needed += ["plan.json"] if needs_plan(run) else []
    found = [folder / name for name in needed]
    for path in [*found, base / "scores.parquet", base / "images.parquet"]:
        _there(path, command(configs, path))
    adapter = folder / "adapter"
    sources = {LORA: adapter / LORA}
    if not lora:
        sources = {f"transformer/{name}": adapter / name for name in FULL}
    how = command(configs, adapter)
    if adapter.exists():  # to snakemake the folder is the result
        how = f"rm -r {adapter}; {how}"
    for path in sources.values():
        _there(path, how)
    trained = train_record(folder / "train.json").get("trainable_parameters")
    if lora and trained is not None:
        count = sum(prod(shape) for shape in read_header(adapter / LORA).values())
        if count != trained:
            raise UserError(
                f"{adapter / LORA}: holds {count:,} weights, but {trained:,} were trained; delete "
                "the folder and train the run again"
            )
    return sources


def _write_weights(source: Path, target: Path) -> None:
    from egrpo.models.adapter import read_adapter, write_adapter  # torch

    if source.name == LORA:  # the same bytes, but of one that an earlier version trained
        write_adapter(target, *read_adapter(source))
    elif source.suffix == ".json":  # diffusers notes where the base model was
        values = read_json(source).items()
        plain = {k: without_folder(v) if isinstance(v, str) else v for k, v in values}
        write_json(target, plain)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _write_results(at: Layout, run: RunConfig, new: Path) -> None:
    """Settings, plan, tables and figures; copies have the permissions of new files."""
    from egrpo.figures.curves import curves_figure
    from egrpo.figures.image_grid import images_figure

    folder, base = at.run(run.run), at.base(run.run)
    settings, notes = shareable(run)
    write_text(new / "config.yaml", shown_yaml(run, settings, notes))
    copies = {"train.json": folder / "train.json"}
    for name, source, table in (
        ("train_metrics.parquet", folder / "metrics.parquet", TRAIN_METRICS),
        ("scores.parquet", folder / "scores.parquet", SCORES),
        ("base_scores.parquet", base / "scores.parquet", SCORES),
    ):
        read_table(source, table)  # refuses a damaged one
        copies[name] = source
    if needs_plan(run):
        load_plan(folder / "plan.json")
        copies["plan.json"] = folder / "plan.json"
    for name, source in copies.items():
        shutil.copyfile(source, new / name)
    make_comparison(Layout(replace(at.study, runs={run.run: run})), new / "comparison.parquet")
    (new / "comparison.html").unlink()  # the card shows it
    images, runs = new / "images", [(run.run, folder / "images.parquet")]
    shown = base / "images.parquet", runs, SAMPLES, images / "before_after"
    images_figure(*shown, page=False)
    curves_figure([new / "train_metrics.parquet"], list(run.train.rewards), images / "curves")
    (images / "curves.svg").unlink()


def _write_samples(images: Path, new: Path) -> list[Sample]:
    """The first image of the first prompts, each as a file of its own."""
    found = read_images(images)
    samples = []
    firsts = first_samples(found, lambda key: is_image(found[key], images))
    for number, key in enumerate(islice(firsts, SAMPLES), start=1):
        name = f"images/sample-{number}.png"
        (new / name).write_bytes(found[key])
        samples.append(Sample(key[2], name))
    return samples


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place in the end, or leaves no trace."""
    _may_be_replaced(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except Exception as error:
        if no_space(error):
            raise full_disk(target) from None
        raise
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def _may_be_replaced(folder: Path) -> None:
    """Nothing, an empty folder, or an earlier bundle as it was made.

    Raises:
        UserError: naming what would be lost.
    """
    remedy = "move it away, or choose another folder by --output"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; {remedy}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    known: dict[str, str] = index.get("files", {}) if isinstance(index, dict) else {}
    there = checksums(folder, INDEX)
    changed = [name for name, checksum in there.items() if known.get(name) != checksum]
    if changed or not known:
        name = changed[0] if changed else INDEX
        what = "has changed since it was exported" if name in known else "is no file of a bundle"
        raise UserError(f"{folder}: {name} {what}, and would be lost; {remedy}")
