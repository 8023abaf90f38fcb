"""The benchmark scripts run end to end; what they measure is not judged here."""

from __future__ import annotations

import gpu
import laptop
import pytest
import torch
from conftest import small_run

BENCH = gpu.Bench(torch.device("cpu"), torch.float32, 1)


def test_laptop_benchmark_measures_an_iteration_and_its_floor() -> None:
    threads = torch.get_num_threads()
    try:
        rows = {what: value for what, value, _ in laptop.measure(small_run(), 1, 1)}
    finally:
        torch.set_num_threads(threads)
    # 2 prompts: the anchor's 3, and 3 samples after each of 3 branches with spans 1, 1, 2
    assert rows["network evaluations of one rollout"] == str(2 * (3 + 3 * (15 + 14 + 12)))
    for what in ("rollout", "bare forward of the same batches"):
        assert float(rows[what].removesuffix(" ms each")) > 0
    assert rows["speed-up over one at a time"].endswith(" x")


@pytest.mark.parametrize("name", ["tiny", "tiny_sd3"])
def test_gpu_benchmark_counts_the_flops_of_the_architecture(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    a = gpu.ARCHITECTURES[name]
    model = gpu.build(a, BENCH, 64, 96)
    x = torch.randn(1, *model.image_shape)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.velocity(x, 0.5, gpu.prompts(a, BENCH, 1))
    counted = counter.get_total_flops()
    # left out: embeddings of time and pooled text, and the output's modulation
    assert gpu.forward_flops(a, 64, 96) == pytest.approx(counted, rel=0.12)


@pytest.mark.parametrize("name", ["tiny", "tiny_sd3"])
def test_gpu_benchmark_runs_end_to_end_on_a_cpu(name: str) -> None:
    work = gpu.Work(steps=4, active=2, group=2, batch=1)
    evaluations, iterations = gpu.measure(name, BENCH, [32], [1, 2], work, compiled=False)
    assert [row[3] for row in evaluations] == ["1", "2"]
    assert all(len(row) == len(gpu.EVALUATION_HEAD) for row in evaluations)
    assert [row[3] for row in iterations] == ["no", "no", "yes"]
    assert iterations[1][2] == "1"  # one sample at a time
    assert all(len(row) == len(gpu.ITERATION_HEAD) for row in iterations)
    # 4 steps, 2 active: the anchor's 2, and 2 samples after each branch
    assert iterations[0][4].endswith("/ 2")
    assert "batch" in gpu.table(gpu.EVALUATION_HEAD, evaluations)
