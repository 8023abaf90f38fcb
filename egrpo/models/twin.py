"""The twin of a transformer: what samples in its stead, cheaper to evaluate.

Of E-GRPO's evaluations 99 in 100 finish samples whose log-probability nobody needs, so what makes
them may differ in its last bits from the network that trains. A twin has the adapter merged, its
blocks compiled, its products taken in float8, or features kept from step to step; sources of
trained edges and the training pass use the transformer itself.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from egrpo.errors import refusing, say
from egrpo.models.features import KeptFeatures
from egrpo.models.graphs import Graphs
from egrpo.models.modules import compile_blocks, repeated_blocks

if TYPE_CHECKING:
    from egrpo.config.models import Model

FLOAT8 = torch.float8_e4m3fn
SEED = 0
"""Of the rounding of merged weights: the same updates are rounded alike in every iteration."""

SMALL = re.compile(r"norm|mod|lora_")
"""Linear layers for which float8 gains nothing: modulation sees a row an image, not one a token."""


def rounded(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float32 ``value`` to a number of ``dtype`` below or above it, each as likely as it is near.

    So the mean is right where the nearest number would be the one from before the update
    (stochastic rounding; Gupta et al., arXiv 1502.02551). Numbers of ``dtype`` stay.
    """
    if dtype == torch.float32:
        return value
    lost = 23 + round(math.log2(torch.finfo(dtype).eps))  # of the 23 bits of the fraction
    options: Any = {"generator": generator, "device": value.device, "dtype": torch.int32}
    noise = torch.randint(2**lost, value.shape, **options)
    cut = (value.contiguous().view(torch.int32) + noise) & -(2**lost)
    return cut.view(torch.float32).to(dtype)


def padded_rows(rows: int, batch: int) -> int:
    """Rows of the batch that ``rows`` are padded to where blocks are compiled, ``batch`` at most.

    Two sizes, so that little is compiled and little is wasted.
    """
    return next((size for size in (max(1, batch // 4), batch) if size >= rows), rows)


class Twin:
    """The twin of one transformer.

    Attributes:
        network: shares all weights with the transformer but those it holds in another form.
        compiled: whether its blocks are.
        graphs: what replays its calls. With it, or compiled, batches are padded, see
            :func:`padded_rows`.
        batch: rows of the largest batch it is given.
        seconds: what compiling took so far.
        features: what it keeps from step to step.
    """

    def __init__(
        self, transformer: Any, settings: Model, adapted: Mapping[str, Any], *, compiled: bool
    ) -> None:
        """``adapted``: LoRA layers that are merged, by name."""
        shared: dict[int, Any] = {
            id(t): t for t in (*transformer.parameters(), *transformer.buffers())
        }
        dtype = getattr(torch, settings.dtype)
        shared |= {id(layer): _plain(layer, dtype) for layer in adapted.values()}
        self.network: Any = copy.deepcopy(transformer, shared).eval()
        self.adapted = [
            (layer, self.network.get_submodule(name)) for name, layer in adapted.items()
        ]
        if settings.fp8_sampling:
            for layer in float8_layers(self.network):
                layer.weight = nn.Parameter(_float8(layer.weight), requires_grad=False)
        self.features: KeptFeatures | None = None
        if settings.feature_cache is not None:
            self.features = KeptFeatures(self.network, settings.feature_cache, dtype)
        self.graphs = Graphs() if settings.cuda_graphs else None
        self.compiled, self.seconds = compiled, 0.0
        self.batch = 1
        self.seen: set[tuple[int, ...]] = set()
        if compiled:
            compile_blocks(self.network)

    @torch.no_grad()
    def follow(self) -> None:
        """Merge the adapter as it is at this moment."""
        generator = torch.Generator(self.network.device).manual_seed(SEED)
        for layer, mine in self.adapted:
            base = layer.get_base_layer().weight
            delta = layer.get_delta_weight("default").float()
            if mine.weight.dtype == base.dtype == torch.float32:
                mine.weight.copy_(base + delta)
            elif hasattr(mine.weight, "qdata"):
                whole = _float8(base.to(mine.weight.dtype))
                value = whole.qdata.float() + delta / whole.scale
                most = torch.finfo(FLOAT8).max
                mine.weight.qdata.copy_(rounded(value.clamp(-most, most), FLOAT8, generator))
            else:
                mine.weight.copy_(rounded(base.float() + delta, mine.weight.dtype, generator))

    def size(self, rows: int) -> int:
        """Rows of the batch that ``rows`` are padded to."""
        fixed = self.compiled or self.graphs is not None
        return padded_rows(rows, self.batch) if fixed else rows

    def call(
        self, x: Tensor, paths: tuple[object, ...] | None, sigma: float
    ) -> AbstractContextManager[None]:
        """Around a call of the network: the features kept for its batch, or the time to compile."""
        if self.features is None:
            return self.timed(x)
        if paths is None:
            raise ValueError("a network that keeps features needs the paths of its batch")
        return self.features.of(paths, sigma)

    @contextmanager
    def timed(self, x: Tensor) -> Iterator[None]:
        """Say what the first batch of a shape takes, which is compiled within."""
        if not self.compiled or tuple(x.shape) in self.seen:
            yield
            return
        begun = time.monotonic()
        with refusing("model.compile: the first batch failed, set it to false"):
            yield
        self.seen.add(tuple(x.shape))
        took = time.monotonic() - begun
        self.seconds += took
        say(f"model.compile: {took:.0f} s for batches of {len(x)}")


def _plain(layer: Any, dtype: torch.dtype) -> nn.Module:
    """A linear layer for the merged weights of an adapted one."""
    base = layer.get_base_layer()
    weight = base.weight.detach().to(dtype, copy=True)
    plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = base.bias
    return plain


def float8_layers(network: Any) -> Iterator[nn.Linear]:
    """Linear layers of the repeated blocks whose products may be taken in float8.

    They see a row a token; both sides are multiples of 16, as the kernels want.
    """
    for block in repeated_blocks(network).values():
        for name, layer in block.named_modules():
            if not isinstance(layer, nn.Linear) or SMALL.search(name):
                continue
            if layer.in_features % 16 == 0 and layer.out_features % 16 == 0:
                yield layer


def _float8(weight: Tensor) -> Any:
    """The weight in float8, a scale a row; inputs of its products are rounded row by row, too."""
    with refusing("model.fp8_sampling: needs pip install 'egrpo[float8]'"):
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization import Float8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

        row = PerRow()
        return Float8Tensor.from_hp(
            weight.detach(),
            granularity=row,
            mm_config=Float8MMConfig(use_fast_accum=True),
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=row),
        )
