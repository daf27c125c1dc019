"""From logits to a token: temperature, top-k, top-p.

Shape letters: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Settings", "candidates", "probabilities", "sample"]


@dataclass(frozen=True)
class Settings:
    """What a generation was asked for, checked.

    Attributes:
        max_new_tokens: tokens to add.
        n_loops: T.
        eos: id that ends a row, or None.
        columns: tokens that are fed at most, prompt and padding included.
        temperature: as :func:`sample` takes it; the same for the next three.
        top_k: likewise.
        top_p: likewise.
        generator: likewise.
    """

    max_new_tokens: int
    n_loops: int
    eos: int | None
    columns: int
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def pick(self, logits: Tensor) -> Tensor:
        """(B, V) → (B,), by :func:`sample`."""
        return sample(logits, self.temperature, self.top_k, self.top_p, self.generator)

    def chances(self, logits: Tensor) -> Tensor:
        """(…, V) → (…, V), by :func:`probabilities`."""
        return probabilities(logits, self.temperature, self.top_k, self.top_p)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: (B, V).
        temperature: 0 takes the likeliest.
        top_k: keep the k likeliest.
        top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least this (arXiv
            1904.09751), after temperature and top_k.
        generator: source of randomness.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    chances, kept = candidates(logits, temperature, top_k, top_p)
    drawn = torch.multinomial(chances, 1, generator=generator)
    return (drawn if kept is None else kept.gather(-1, drawn)).squeeze(1)


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that :func:`sample` draws from; (…, V) → (…, V), float32, sums of one."""
    if temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, likeliest, 1.0)
    chances, kept = candidates(logits, temperature, top_k, top_p)
    chances = chances / chances.sum(-1, keepdim=True)
    if kept is None:
        return chances
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, kept, chances)


def candidates(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities, which sum to less than one after top_p, of the tokens kept, (…, k), and their ids; None: all."""
    kept = None
    if top_k and top_k < logits.shape[-1]:
        logits, kept = logits.topk(top_k)
    if temperature != 1:
        # The likeliest token at zero: a small temperature then gives -inf for the others, and no inf - inf.
        logits = (logits - logits.amax(-1, keepdim=True)).float() / max(temperature, 1e-30)
    chances = logits.softmax(-1, dtype=torch.float32)
    if top_p is not None and top_p < 1:
        ranked, order = chances.sort(-1, descending=True)
        # A token stays while the mass before it is short of top_p; so the likeliest always stays.
        dropped = ranked.cumsum(-1) - ranked >= top_p
        chances = torch.zeros_like(ranked).scatter(-1, order, ranked.masked_fill(dropped, 0.0))
    return chances, kept
