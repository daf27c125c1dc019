"""How fast a run goes and what it holds: model FLOPs of a step, the device's peak, memory.

Shape letters: B batch, S sequence, T loops.
"""

from __future__ import annotations

import re
import sys
import time
from functools import cache
from pathlib import Path

import torch

from open_mythos.accounting import flops_per_token
from open_mythos.config import MythosConfig
from open_mythos.training.loops import LoopPlan

__all__ = ["matmul_tflops", "memory", "peak_tflops", "train_flops"]

# Dense bfloat16 TFLOP/s of the makers' data sheets, by words of the device's name; the first that fits counts.
_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H100", "PCIe"), 756),
    (("H100", "NVL"), 835),
    (("H100",), 989),
    (("H200",), 989),
    (("GH200",), 989),
    (("B200",), 2250),
    (("A100",), 312),
    (("L40S",), 362),
    (("L4",), 121),
    (("A10",), 125),
    (("4090",), 165),
    (("MI300X",), 1307),
)


def train_flops(cfg: MythosConfig, plan: LoopPlan, seq_len: int) -> float:
    """Model FLOPs of one training token: forward and backward, three times a forward, over prelude, coda and
    the loops with gradient; one forward over the loops without.

    Counted by :func:`~open_mythos.accounting.flops_per_token` at the mean causal context, (S + 1) // 2. What
    is computed twice (recompute) or for nothing (a sequence that has not begun) is not model work, so the
    share of the peak that comes of it is MFU (arXiv 2204.02311, appendix B), not hardware utilisation.

    Args:
        cfg: the model's.
        plan: loops that ran; per-sequence counts by their mean.
        seq_len: S.
    """
    context = (seq_len + 1) // 2
    once = flops_per_token(cfg, 1, context=context)
    loop = flops_per_token(cfg, 2, context=context) - once
    grad = min(float(plan.n_grad), plan.mean)
    return 3 * (once - loop) + 3 * grad * loop + (plan.mean - grad) * loop


def peak_tflops(device: torch.device, setting: float | str) -> tuple[float | None, str]:
    """What MFU is a share of, in TFLOP/s of one device, and where the figure comes from.

    Args:
        device: the device.
        setting: ``log.peak_tflops``: a number, "measured" or "auto".
    """
    if not isinstance(setting, str):
        return float(setting), "config"
    if setting == "auto":
        if device.type != "cuda":
            return None, "none on the CPU"
        known = _known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known, "data sheet, dense bfloat16"
    return matmul_tflops(device), "measured matrix product"


def _known_peak(name: str) -> float | None:
    words = set(re.split(r"[\s_-]+", name))
    if "MIG" in words:  # a part of a device
        return None
    return next((peak for key, peak in _PEAKS if words.issuperset(key)), None)


@cache
def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s of a large square matrix product: bfloat16 with N = 8192 on CUDA, float32 with N = 1024 else.

    The best of ten, so that a busy machine counts less.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    best = float("inf")
    for _ in range(11):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes in use now and at most so far: of tensors on a CUDA device, of this whole process on the CPU.

    None where the system does not tell. The host does not wait for the device.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None, peak
    used = pages * resource.getpagesize()
    return used, max(used, peak)  # the system brings its own peak up to date now and then
