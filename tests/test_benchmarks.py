"""The benchmark scripts run end to end; what they measure is not judged here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from conftest import ROOT, small_run


def script(name: str) -> ModuleType:
    """A file of ``benchmarks/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(ROOT) / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_laptop_benchmark_measures_an_iteration_and_its_floor() -> None:
    threads = torch.get_num_threads()
    try:
        rows = {what: value for what, value, _ in script("laptop").measure(small_run(), 1, 1)}
    finally:
        torch.set_num_threads(threads)
    # 2 prompts: the anchor's 3, and 3 samples after each of 3 branches with spans 1, 1, 2
    assert rows["network evaluations of one rollout"] == str(2 * (3 + 3 * (15 + 14 + 12)))
    for what in ("rollout", "bare forward of the same batches"):
        assert float(rows[what].removesuffix(" ms each")) > 0
    assert rows["speed-up over one at a time"].endswith(" x")
