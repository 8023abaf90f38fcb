"""Features kept from one step to the next: a sampler that predicts some of its evaluations.

TaylorSeer (arXiv 2503.06923) by diffusers' hooks: on the steps between, the blocks of the
transformer are skipped and what its last layer returns is extrapolated from the steps before. What
is kept is as small as a latent; keeping the attention of every block, as the full mode does, would
take 2 GiB for each sample of FLUX.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from egrpo.models.modules import repeated_blocks

if TYPE_CHECKING:
    from egrpo.config.models import FeatureCache


def skippable(network: Any) -> list[str]:
    """Names of the blocks that need not run while the last layer's output is predicted.

    A block without text output returns None there, which the hooks cannot stand in for (SD3's last
    one; so diffusers' own lite mode fails). It runs, on zeros.
    """
    blocks = repeated_blocks(network).items()
    return [name for name, block in blocks if not getattr(block, "context_pre_only", False)]


class KeptFeatures:
    """The features that one module keeps, batch by batch."""

    def __init__(self, module: Any, settings: FeatureCache, dtype: torch.dtype) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        self.module = module
        self.sigma = float("nan")
        self.before: set[str] = set()
        self.now: set[str] = set()
        config = TaylorSeerCacheConfig(
            cache_interval=settings.interval,
            disable_cache_before_step=settings.warm_up,
            max_order=settings.order,
            taylor_factors_dtype=dtype,
            skip_predict_identifiers=[re.escape(name) for name in skippable(module)],
            cache_identifiers=["proj_out"],
        )
        apply_taylorseer_cache(module, config)

    @contextmanager
    def of(self, paths: tuple[object, ...], sigma: float) -> Iterator[None]:
        """Within it the module uses and renews what it keeps of the batch with these paths.

        A batch that is cut differently than a step ago has nothing to go by: all that was kept is
        dropped, and the warm-up begins again.
        """
        from diffusers.models.cache_utils import CacheMixin

        name = str(paths)
        if sigma != self.sigma:
            self.before, self.now, self.sigma = self.now, set(), sigma
        if self.before and name not in self.before:
            self.forget()
        self.now.add(name)
        with CacheMixin.cache_context(self.module, name):
            yield

    def forget(self) -> None:
        """Free everything."""
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(self.module).reset_stateful_hooks()
        self.before, self.now = set(), set()
