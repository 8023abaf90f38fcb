"""Grids and the learning rate that settings come to. Needs no torch."""

from __future__ import annotations

from egrpo.config.models import RunConfig
from egrpo.core.schedule import Sigmas


def training_sigmas(run: RunConfig) -> Sigmas:
    """The grid that a run samples on."""
    return run.schedule.sigmas(run.model, run.method.steps, stock=run.method.stock_grid)


def monitor_sigmas(run: RunConfig) -> Sigmas:
    """The grid of the monitors: evaluation's steps at training's size."""
    return run.schedule.sigmas(run.model, run.evaluate.steps, stock=True)


def evaluation_sigmas(run: RunConfig) -> Sigmas:
    """The grid of the evaluation, which is the same for all methods."""
    return run.schedule.sigmas(run.evaluation_model, run.evaluate.steps, stock=True)


def learning_rate(run: RunConfig) -> float:
    """The rate the optimizer gets."""
    lora = run.model.tuning == "lora"
    rate = run.train.learning_rate_lora if lora else run.train.learning_rate_full
    return rate * run.train.learning_rate_scale
