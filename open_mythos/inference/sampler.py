"""Drawing tokens for requests that share a batch: each with its own settings and its own source of randomness.

Shape letters: n rows, V vocabulary, k tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.inference.pages import on_device
from open_mythos.inference.requests import Checked
from open_mythos.inference.sampling import candidates

__all__ = ["Sampler", "draw"]


class Sampler:
    """How one request draws.

    Args:
        checked: the request.
        number: of the request.
        device: where logits are.
    """

    def __init__(self, checked: Checked, number: int, device: torch.device) -> None:
        request, self.number = checked.request, number
        self.settings = (float(request.temperature), request.top_k, request.top_p)
        self.generator: torch.Generator | None = None
        if request.temperature != 0 and checked.seed is not None:
            self.generator = torch.Generator(device).manual_seed(checked.seed)


def draw(samplers: Sequence[Sampler], logits: Tensor) -> Tensor:
    """A token for each row, (n, V) → (n,) int64, below zero where logits are not finite.

    With a seed it is the one that :func:`~open_mythos.inference.sampling.sample` draws from this row alone.
    """
    tokens = logits.argmax(-1)
    groups: dict[tuple[float, int | None, float | None], list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler.generator is not None:
            groups.setdefault(sampler.settings, []).append(row)
    for (temperature, top_k, top_p), rows in groups.items():
        whole = len(rows) == len(samplers)
        index = on_device(rows, logits.device)
        chances, kept = candidates(logits if whole else logits[index], temperature, top_k, top_p)
        # What torch.multinomial does for one draw, with another generator in each row.
        noise = torch.empty_like(chances)
        for each, row in zip(noise, rows, strict=True):
            each.exponential_(generator=samplers[row].generator)
        drawn = (chances / noise).argmax(-1, keepdim=True)
        drawn = (drawn if kept is None else kept.gather(-1, drawn)).squeeze(1)
        tokens = drawn if whole else tokens.index_copy(0, index, drawn)
    return tokens.masked_fill(~logits.isfinite().all(-1), -1)
