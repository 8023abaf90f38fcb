"""The benchmark scripts run end to end; what they measure is not judged here."""

from __future__ import annotations

import full_size
import gpu
import laptop
import pytest
import torch
from conftest import small_run
from torch.utils.flop_counter import FlopCounterMode


def test_laptop_benchmark_measures_an_iteration_and_its_floor():
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
def test_gpu_benchmark_counts_the_flops_of_the_architecture(name):
    a, of = full_size.ARCHITECTURES[name], (torch.device("cpu"), torch.float32)
    model = full_size.build(a, *of, 64, 96)
    x = torch.randn(1, *model.image_shape)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.velocity(x, 0.5, full_size.prompts(a, *of, 1))
    counted = counter.get_total_flops()
    # left out: embeddings of time and pooled text, and the output's modulation
    assert full_size.forward_flops(a, 64, 96) == pytest.approx(counted, rel=0.12)


@pytest.mark.slow
def test_gpu_benchmark_runs_end_to_end_on_a_cpu_and_loses_no_row(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.SIZES, "tiny", (64,))

    def broken(*_: object) -> None:
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setattr(gpu.Case, "decode", broken)
    page = tmp_path / "gpu.md"
    words = ["gpu.py", "--models", "tiny", "--limit", "600", "--write", str(page)]
    monkeypatch.setattr("sys.argv", words)
    gpu.main()
    rows = [
        line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| tiny")
    ]
    assert all(len(row) == len(gpu.HEAD) for row in rows)
    failed = [row for row in rows if "RuntimeError: an illegal memory access" in row[4]]
    assert [row[2] for row in failed] == ["decoding"]
    whole = [row for row in rows if row not in failed]
    assert len(whole) >= 10
    assert all(float(row[6]) > 0 for row in whole)
    rollouts = [row for row in whole if "rollout" in row[2]]
    assert {row[4] for row in rollouts} == {str(1 + 12 * 15)}  # 12 samples after one branch point
