"""The parts of a pipeline from a folder or a hub id, each refused in one line that names it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from egrpo.errors import UserError, during, refusing
from egrpo.settings import is_hub_id

if TYPE_CHECKING:
    from egrpo.config.models import Model


def resolve_device(name: str, key: str = "model.device") -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"{key}: {name!r} is not a torch device (auto, cpu, cuda)") from None


def from_pretrained(cls: Any, source: str | Path, what: str, remedy: str, **options: Any) -> Any:
    """A module in diffusers' or transformers' format, of which no weight is missing.

    Raises:
        UserError: beginning with ``what``; with ``remedy`` where weights are missing, for which
            the libraries would take random values.
    """
    with refusing(what):
        module, report = cls.from_pretrained(source, output_loading_info=True, **options)
    missing = report["missing_keys"]
    if missing:
        raise UserError(
            f"{what}: {len(missing)} weights are missing, such as {min(missing)}; {remedy}"
        )
    return module


def _where(settings: Model) -> dict[str, Any]:
    """How libraries find the pipeline at ``model.path``."""
    local = Path(settings.path).is_dir()
    if not local and not is_hub_id(settings.path):
        raise UserError(
            f"model.path: {settings.path}: no such folder, and not a hub id (owner/name)"
        )
    return {"revision": settings.revision, "local_files_only": local}


def _shape(settings: Model, class_name: str, part: str) -> dict[str, Any]:
    """A part's config.json, which must be of this class."""
    import diffusers

    source, where = settings.path, {**_where(settings), "subfolder": part}
    with refusing(f"model.path: {source}/{part}: cannot be loaded as {class_name}"):
        shape: dict[str, Any] = getattr(diffusers, class_name).load_config(source, **where)
        found = shape.get("_class_name", class_name)
    if found != class_name:  # diffusers would load the weights as far as they fit
        raise UserError(
            f"model.family: {settings.family} has a {class_name}, but {source}/{part} is a "
            f"{found}; set model.family to the family of these weights"
        )
    return shape


@during("loading")
def load_part(settings: Model, class_name: str, part: str, device: torch.device) -> Any:
    """A part of the pipeline at ``model.path``, frozen, on the device."""
    import diffusers

    _shape(settings, class_name, part)
    source, cls = settings.path, getattr(diffusers, class_name)
    where = {**_where(settings), "subfolder": part}
    what = f"model.path: {source}/{part}: cannot be loaded as {class_name}"
    dtype = getattr(torch, settings.dtype)
    module = from_pretrained(
        cls, source, what, "download it again", dtype=dtype, use_safetensors=True, **where
    )
    with refusing(f"model.device: {device} cannot be used"):  # no driver, no such index
        module.to(device)
    return module.eval().requires_grad_(False)


def load_text_pipeline(settings: Model, class_name: str, transformer_class: str) -> Any:
    """The stock pipeline with its text encoders, and of its transformer the shape alone."""
    import diffusers
    import transformers
    from diffusers.configuration_utils import FrozenDict

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline, source = getattr(diffusers, class_name), settings.path
    where, shape = _where(settings), _shape(settings, transformer_class, "transformer")
    with refusing(f"model.path: {source}: text encoders"):
        # diffusers wants a pipeline saved without T5 to be told so again
        index = pipeline.load_config(source, **where)
        absent = [k for k, entry in index.items() if entry in ([None, None], (None, None))]
        given = dict.fromkeys([*absent, "transformer", "vae"])
        dtype = getattr(torch, settings.dtype)
        pipe = pipeline.from_pretrained(source, dtype=dtype, **where, **given)
    # SD3 without T5 asks it how wide a text is
    object.__setattr__(pipe, "transformer", SimpleNamespace(config=FrozenDict(shape)))
    return pipe
