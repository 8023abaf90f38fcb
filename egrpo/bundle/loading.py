"""How a bundle is loaded, as Python for stock diffusers."""

from __future__ import annotations

import json
from pathlib import Path

from egrpo.config.models import RunConfig
from egrpo.models.families import FAMILIES
from egrpo.store.files import read_json
from egrpo.study.sharing import without_folder


def loading(run: RunConfig, hub_id: str | None, prompt: str) -> str:
    """Python that draws one image with stock diffusers as the evaluation drew its own."""
    model, lora = run.evaluation_model, run.model.tuning == "lora"
    family = FAMILIES[run.model.family]
    names = {"FlowMatchEulerDiscreteScheduler", family.pipeline}
    revision = [f"revision={_python(model.revision)}"] if hub_id and model.revision else []
    given = ["base", "dtype=dtype", *revision, *(f"{name}=None" for name in _absent(run))]
    lines = [
        f"base = {_python(hub_id or without_folder(model.path))}"
        + ("" if hub_id else "  # folder or hub id of the base model"),
        'bundle = "."  # this folder, or its hub id',
        f"dtype = torch.{model.dtype}",
    ]
    if not lora:
        names.add(family.transformer_class)
        given.append("transformer=transformer")
        lines += [
            f"transformer = {family.transformer_class}.from_pretrained(",
            '    bundle, subfolder="transformer", dtype=dtype',
            ")",
        ]
    uniform = run.schedule.end_at(model, stock=True) is None  # the pipeline's own grid otherwise
    lines += [
        f"pipe = {family.pipeline}.from_pretrained(",
        f"    {', '.join(given)}",
        ")",
        "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(",
        f"    pipe.scheduler.config, {', '.join(_schedule(run))}",
        ")",
        *(["pipe.load_lora_weights(bundle)"] if lora else []),
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "",
        f"steps = {run.evaluate.steps}",
        "image = pipe(",
        f"    {_python(prompt)},",
        "    num_inference_steps=steps,",
        *(["    sigmas=[1 - i / steps for i in range(steps)],"] if uniform else []),
        *(f"    {argument}," for argument in _call(run)),
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
        'image.save("image.png")',
    ]
    imports = ["import torch", f"from diffusers import {', '.join(sorted(names))}", ""]
    return "\n".join([*imports, *lines])


def _python(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _absent(run: RunConfig) -> list[str]:
    """Text encoders that the base model was saved without, which diffusers wants to be told."""
    index = Path(run.model.path) / "model_index.json"
    parts = read_json(index) if index.is_file() else {}
    encoders = ("text_encoder", "tokenizer")
    return [n for n, part in parts.items() if part == [None, None] and n.startswith(encoders)]


def _schedule(run: RunConfig) -> list[str]:
    """Arguments of the scheduler that has the run's grid."""
    s = run.schedule
    shift = [f"shift={s.shift}", "use_dynamic_shifting=False"]
    if s.shift == "dynamic":
        shift = [
            "use_dynamic_shifting=True",
            f"base_shift={s.base_shift}",
            f"max_shift={s.max_shift}",
            f"base_image_seq_len={s.base_tokens}",
            f"max_image_seq_len={s.max_tokens}",
        ]
    return [*shift, f"shift_terminal={s.terminal}"]


def _call(run: RunConfig) -> list[str]:
    """Arguments of the pipeline's call that say the evaluation's guidance and size."""
    model = run.evaluation_model
    guidance = FAMILIES[model.family].stock_guidance(model)
    negative = ['negative_prompt=""'] if model.guidance_scale > 1 else []
    size = [f"height={model.height}", f"width={model.width}"]
    length = model.max_sequence_length
    return [
        *(f"{name}={value}" for name, value in guidance.items()),
        *negative,
        *size,
        *([] if length is None else [f"max_sequence_length={length}"]),
    ]
