"""How a bundle is loaded, as Python for stock diffusers."""

from __future__ import annotations

import json
from pathlib import Path

from egrpo.config.models import RunConfig
from egrpo.models.families import FAMILIES
from egrpo.report.render import render
from egrpo.store.files import read_json
from egrpo.study.sharing import without_folder


def loading(run: RunConfig, hub_id: str | None, prompt: str) -> str:
    """Python that draws one image with stock diffusers as the evaluation drew its own."""
    model, family = run.evaluation_model, FAMILIES[run.model.family]
    lora = run.model.tuning == "lora"
    names = {"FlowMatchEulerDiscreteScheduler", family.pipeline}
    return render(
        "loading.py.j2",
        model=model,
        lora=lora,
        family=family,
        names=sorted(names if lora else names | {family.transformer_class}),
        hub_id=hub_id,
        base=_python(hub_id or without_folder(model.path)),
        revision=_python(model.revision or ""),
        absent=_absent(run),
        schedule=run.schedule,
        uniform=run.schedule.end_at(model, stock=True) is None,  # the pipeline's own grid otherwise
        steps=run.evaluate.steps,
        prompt=_python(prompt),
        guidance=family.stock_guidance(model),
    ).rstrip()


def _python(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _absent(run: RunConfig) -> list[str]:
    """Text encoders that the base model was saved without, which diffusers wants to be told."""
    index = Path(run.model.path) / "model_index.json"
    parts = read_json(index) if index.is_file() else {}
    encoders = ("text_encoder", "tokenizer")
    return [n for n, part in parts.items() if part == [None, None] and n.startswith(encoders)]
