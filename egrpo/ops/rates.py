"""How long a model's work takes on a card, as a table: read, written, looked up. Needs no torch.

A row says what one card needs for one model at one size. ``rates.tsv`` beside this module ships
with the package; ``egrpo measure`` writes another one for the user's own card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from egrpo.config.models import Model
from egrpo.errors import UserError
from egrpo.store.files import write_text
from egrpo.store.weights import read_config

SHIPPED = Path(__file__).with_name("rates.tsv")
"""The rates that ship with the package."""


@dataclass(frozen=True)
class Rate:
    """What a card needs for one model, size and type; times in milliseconds, None: not measured.

    Attributes:
        card: as torch names it.
        model: shape of the transformer, see :func:`architecture`.
        name: hub id of the weights; empty where they were a folder.
        height, width: of an image, in pixels.
        dtype: of the weights, ``model.dtype``.
        sampling_ms: one network evaluation of one latent while sampling, without gradients.
        training_ms: one forward and backward of one latent.
        decoding_ms: one image decoded by the VAE.
        source: when it was measured, with which versions and batches.
    """

    card: str
    model: str
    name: str
    height: int
    width: int
    dtype: str
    sampling_ms: float
    training_ms: float | None
    decoding_ms: float | None
    source: str

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What there is one row of."""
        return self.card, self.model, self.height, self.width, self.dtype

    def scaled(self, height: int, width: int) -> Rate:
        """The rate of another size, as if all times grew with the number of pixels.

        Attention grows faster, and small batches are bound by other things: an estimate.
        """
        factor = height * width / (self.height * self.width)
        known = {name: time for name in TIMES if (time := getattr(self, name)) is not None}
        times = {name: factor * time for name, time in known.items()}
        return replace(self, height=height, width=width, **times)


COLUMNS = tuple(field.name for field in fields(Rate))
WHOLE, TIMES = ("height", "width"), ("sampling_ms", "training_ms", "decoding_ms")


def read_rates(path: Path = SHIPPED) -> list[Rate]:
    """The rows of a table of rates: tab-separated, an empty cell where nothing was measured.

    Raises:
        UserError: naming file and line, if it cannot be read or a number is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not lines or tuple(lines[0].split("\t")) != COLUMNS:
        raise UserError(f"{path}: the first line must name the columns {', '.join(COLUMNS)}")
    rates = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            rates.append(_rate(dict(zip(COLUMNS, line.split("\t"), strict=True))))
        except ValueError as error:
            raise UserError(
                f"{path}: line {number}: {error}; `egrpo measure` writes such a file again once "
                "this one is deleted"
            ) from None
    return rates


def _rate(cells: Mapping[str, str]) -> Rate:
    """A row; ValueError says what is wrong with it."""
    numbers: dict[str, Any] = {name: int(cells[name]) for name in WHOLE}
    numbers |= {name: float(cells[name]) for name in TIMES if cells[name]}
    if "sampling_ms" not in numbers or not all(0 < n < math.inf for n in numbers.values()):
        raise ValueError("sizes and milliseconds must be above 0, and sampling_ms is needed")
    return Rate(**{**cells, **dict.fromkeys(TIMES), **numbers})


def write_rates(path: Path, rates: Iterable[Rate]) -> None:
    """Add rows to a table, at its end, in place of those of the same card, model, size and type.

    Raises:
        UserError: if the table that is there is damaged, or the disk is full.
    """
    added = {rate.key: rate for rate in rates}
    before = read_rates(path) if path.exists() else []
    kept = [rate for rate in before if rate.key not in added]
    write_text(path, table_of([*kept, *added.values()]) + "\n")


def table_of(rates: Iterable[Rate]) -> str:
    """Rows with their head, tab-separated, as files hold them."""
    rows = ([_cell(getattr(rate, name)) for name in COLUMNS] for rate in rates)
    return "\n".join("\t".join(cells) for cells in (COLUMNS, *rows))


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


# -- which rate is a run's ------------------------------------------------------------------------


LAYERS = re.compile(r"n_layers|num_(\w+_)?layers")
"""Numbers of blocks: ``num_layers`` and ``num_single_layers`` of FLUX, ``n_layers`` of Z-Image."""


def layers_and_width(config: Mapping[str, Any]) -> tuple[int, int]:
    """Blocks of a transformer and width of its tokens, by its config.json.

    Raises:
        KeyError, TypeError, ValueError: if it says neither.
    """
    width = config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]
    kinds = [n for key, n in config.items() if LAYERS.fullmatch(key) and isinstance(n, int)]
    if not sum(kinds):
        raise KeyError("layers")
    return sum(kinds), int(width)


def architecture(family: str, config: Mapping[str, Any]) -> str:
    """What an evaluation's time depends on, by the transformer's config.json: ``flux-57x3072``.

    Family, blocks, width, and blocks with a second attention, in which SD3.5-medium differs from
    SD3-medium. Weights of one shape take one time, so fine-tuned ones are found too.

    Raises:
        KeyError, TypeError, ValueError: if the config does not say its shape.
    """
    layers, width = layers_and_width(config)
    dual = len(config.get("dual_attention_layers") or ())
    return f"{family}-{layers}x{width}" + (f"-dual{dual}" if dual else "")


def find_rate(rates: Sequence[Rate], model: Model) -> tuple[Rate | None, str]:
    """The rate of a model at its size, and what must be said of it (empty: it is exactly that).

    Of several the last one counts. Where the size is missing, the nearest one is scaled.

    Raises:
        UserError: if the folder of the model has no readable config.json.
    """
    shape = _shape(model)
    what = f"{shape or model.path} in {model.dtype}"
    found = [r for r in reversed(rates) if r.dtype == model.dtype and _fits(r, model, shape)]
    if not found:
        return None, f"no rate of {what}: `egrpo measure` on such a card makes one"
    size = model.height, model.width
    for rate in found:
        if (rate.height, rate.width) == size:
            return rate, ""
    nearest = min(found, key=lambda r: abs(math.log(r.height * r.width / math.prod(size))))
    here, there = f"{model.height}x{model.width}", f"{nearest.height}x{nearest.width}"
    return nearest.scaled(*size), f"{what} at {here}: the rate of {there}, scaled by pixels"


def _shape(model: Model) -> str | None:
    """The shape in the model's folder; None for a hub id, or a folder not downloaded yet."""
    folder = Path(model.path)
    if not folder.is_dir():
        return None
    config = read_config(folder / "transformer")
    try:
        return architecture(model.family, config)
    except (LookupError, TypeError, ValueError):
        raise UserError(
            f"{folder}/transformer: config.json does not say the transformer's shape; download it "
            "again"
        ) from None


def _fits(rate: Rate, model: Model, shape: str | None) -> bool:
    """Whether a rate is of the model's shape, or, where that is not known, of its name."""
    if shape is not None:
        return rate.model == shape
    return bool(rate.name) and Path(rate.name).name == Path(model.path).name


def on_card(rates: Sequence[Rate], card: str) -> list[Rate]:
    """The rates of one card, by its name or a part of it that no other card's name has.

    Raises:
        UserError: naming the cards that are known.
    """
    cards, wanted = list(dict.fromkeys(rate.card for rate in rates)), card.casefold()
    meant = [c for c in cards if c.casefold() == wanted] or [
        c for c in cards if wanted in c.casefold()
    ]
    if len(meant) != 1:
        wrong = "could be any of several cards" if meant else "no rates of such a card"
        raise UserError(
            f"--card {card}: {wrong}; known: {'; '.join(meant or cards)}. `egrpo measure` on a "
            "machine that has it makes some"
        )
    return [rate for rate in rates if rate.card == meant[0]]
