"""What PyTorch did, for tests of work that must not grow: counted, since time depends on the machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operators(TorchDispatchMode):
    """A context that keeps each operator's name and the devices and shapes of its outputs, in ``calls``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[tuple[str, torch.Size], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = tuple((x.device.type, x.shape) for x in tree_leaves(out) if isinstance(x, Tensor))
        self.calls.append((str(func), made))
        return out
