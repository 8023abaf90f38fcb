"""What measured spread says about a plan: the automatic threshold, and samples per step.

Spread is how far the rewards of one group differ; the yardstick is how far 10% random noise on the
final image makes them differ. A step whose spread stays below the yardstick gives samples that
rewards cannot tell apart (E-GRPO, arXiv 2601.00423, Fig. 1a). Needs no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from egrpo.core.plan import Plan

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """One measured (grid index, number of merged intervals).

    ``entropy``: closed form by measure; ``value``: spread of the trained rewards within a group,
    over the yardstick's.
    """

    step: int
    span: int
    entropy: Mapping[str, float]
    value: float


class Choice(NamedTuple):
    """An automatic threshold, in the measure asked for, and the curve it was read from.

    ``entropy``, ``fitted``: [n] ascending entropies and the monotone fit of spread over yardstick.
    """

    threshold: float
    entropy: Array
    fitted: Array


def choose_threshold(spreads: Sequence[Spread], measure: str, factor: float) -> Choice:
    """The least measured entropy at which spread exceeds ``factor`` times the yardstick.

    Spread is noisy and must not fall as entropy grows, so the curve is its isotonic regression on
    entropy (Barlow et al., "Statistical Inference under Order Restrictions", 1972). The threshold
    is rounded down to four decimals.

    Raises:
        ValueError: if the curve never exceeds the factor, or nothing was measured.
    """
    from scipy.optimize import isotonic_regression

    at: dict[float, list[float]] = defaultdict(list)
    for s in spreads:
        if math.isfinite(s.value):
            at[s.entropy[measure]].append(s.value)
    if not at:
        raise ValueError("the profile holds no measured spread of the trained rewards")
    entropy = np.array(sorted(at))
    values = np.array([np.mean(at[e]) for e in entropy])
    fitted = np.asarray(isotonic_regression(values, weights=[len(at[e]) for e in entropy]).x)
    enough = np.flatnonzero(fitted > factor)
    if not len(enough):
        raise ValueError(
            f"threshold auto: no step's rewards spread more than {factor:g} times the yardstick "
            f"(at most {fitted[-1]:.3g}); lower method.spread_factor, or give a number"
        )
    tau = math.floor(entropy[enough[0]] * 1e4) / 1e4
    return Choice(tau, entropy, fitted)


def allocate(plan: Plan, spreads: Sequence[Spread], group_size: int) -> tuple[int, ...]:
    """Samples of each active step: ``group_size`` on average, in proportion to measured spread.

    Between measured spans of a step the spread is interpolated. Each step keeps at least two, for
    a group of one says nothing.

    Raises:
        ValueError: if an active step was not measured.
    """
    steps = zip(plan.active, plan.spans, strict=True)
    share = np.array([_spread_at(spreads, *at) for at in steps])
    if share.sum() == 0.0:
        share = np.ones_like(share)
    free = (group_size - 2) * len(share)
    wanted = free * share / share.sum()
    extra = np.floor(wanted).astype(int)
    rest = free - int(extra.sum())  # largest remainders get what rounding left
    extra[np.argsort(extra - wanted, kind="stable")[:rest]] += 1
    return tuple(int(2 + n) for n in extra)


def _spread_at(spreads: Sequence[Spread], step: int, span: int) -> float:
    found = sorted((s.span, s.value) for s in spreads if s.step == step and math.isfinite(s.value))
    if not found:
        raise ValueError(f"the profile holds no measured spread at step {step}")
    spans, values = zip(*found, strict=True)
    return float(np.interp(span, spans, values))
