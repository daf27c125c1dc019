"""Capturing CUDA graphs where other threads use the device, and garbage may wait to be collected."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["capturing"]


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """What is launched within is captured into the graph.

    A graph that is freed while another one is captured spoils it, as does what other threads ask of the device. So
    garbage, in which there may be graphs, waits, and only this thread's calls count.

    Args:
        graph: empty.
        pool: memory to share with other graphs, see :func:`torch.cuda.graph`.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        if collected:
            gc.enable()
