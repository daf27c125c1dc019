"""FLOPs of a training step, the device's peak, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from open_mythos import MythosConfig
from open_mythos.accounting import flops_per_token
from open_mythos.training.loops import LoopPlan
from open_mythos.training.meter import _known_peak, matmul_tflops, memory, peak_tflops, train_flops

CFG = MythosConfig(vocab_size=50, dim=32, n_heads=4, max_seq_len=64, max_loop_iters=4)


@pytest.mark.parametrize("loops", [1, 3, 8])
def test_loops_with_gradient_cost_three_forwards(loops: int):
    once = flops_per_token(CFG, loops, context=32)
    assert train_flops(CFG, LoopPlan(0, loops), 64) == 3 * once
    assert train_flops(CFG, LoopPlan(0, loops), 63) == 3 * once


def test_loops_without_gradient_cost_one_forward():
    loop = flops_per_token(CFG, 2, context=5) - flops_per_token(CFG, 1, context=5)
    assert train_flops(CFG, LoopPlan(7, 3), 10) == train_flops(CFG, LoopPlan(0, 3), 10) + 7 * loop


def test_sequences_that_have_not_begun_do_no_model_work():
    late = train_flops(CFG, LoopPlan(4, 4, starts=(0, 4)), 10)
    assert late == train_flops(CFG, LoopPlan(2, 4), 10)
    assert train_flops(CFG, LoopPlan(0, 4, starts=(3, 3)), 10) == train_flops(CFG, LoopPlan(0, 1), 10)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA Quadro K620", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None):
    assert _known_peak(name) == peak


def test_peak_on_the_cpu_is_none_unless_asked_for():
    cpu = torch.device("cpu")
    assert peak_tflops(cpu, "auto") == (None, "none on the CPU")
    assert peak_tflops(cpu, 12) == (12.0, "config")
    measured, source = peak_tflops(cpu, "measured")
    assert measured == matmul_tflops(cpu) > 0
    assert source == "measured matrix product"


def test_memory_is_this_process_in_bytes():
    now, peak = memory(torch.device("cpu"))
    assert peak is not None
    assert peak > 50e6
    held = torch.ones(50_000_000)
    after, peak_after = memory(torch.device("cpu"))
    assert peak_after is not None
    assert peak_after >= peak
    if Path("/proc/self/statm").exists():
        assert now is not None
        assert after is not None
        assert 150e6 < after - now < 300e6
        assert peak_after >= after
    assert held[-1] == 1
