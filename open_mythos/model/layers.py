"""Norm, rotary positions and the dense feed-forward layer.

Shape letters: B batch, S sequence, H heads, K head width, D model width, F hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.ops import rms_norm, swiglu, turn_heads

__all__ = ["Expert", "RMSNorm", "apply_rope", "precompute_rope_freqs", "rope_table"]


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (arXiv 1910.07467)."""

    eps: float

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D), in x's dtype."""
        return rms_norm(x, self.weight, self.eps)


def rope_table(positions: Tensor, dim: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotation angles as (cos, sin) for each position (arXiv 2104.09864), real-valued.

    Made for the positions at hand, so that a long ``max_seq_len`` costs nothing and no table sits in the
    state dict. Angles are computed in float64 when ``dtype`` is float64 and in float32 otherwise.

    Args:
        positions: (B or 1, S) token positions.
        dim: K, rotated channels; even.
        theta: base of the frequencies.
        dtype: dtype of the model's activations.

    Returns:
        (2, B or 1, S, 1, K): cos twice side by side, then −sin and sin.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=compute) / dim
    angles = positions.to(compute).unsqueeze(-1) * theta**-exponent
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).unsqueeze(-2)


def precompute_rope_freqs(dim: int, max_len: int, theta: float = 500000.0) -> Tensor:
    """:func:`rope_table` for positions 0 … max_len − 1, (2, 1, max_len, 1, dim); the public release's name."""
    return rope_table(torch.arange(max_len).unsqueeze(0), dim, theta)


def apply_rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotate channel i against channel i + K/2 by the position's angle.

    The halves convention (as in Llama checkpoints); :mod:`open_mythos.weights` permutes interleaved weights.

    Args:
        x: (B, S, H, K).
        freqs: (2, B or 1, S, 1, K) from :func:`rope_table`.

    Returns:
        (B, S, H, K), in x's dtype; the arithmetic runs in the table's dtype.
    """
    return turn_heads(x, freqs)


class Expert(nn.Module):
    """SwiGLU feed-forward layer: down(silu(gate(x)) · up(x)) (arXiv 2002.05202), gate and up in one matrix.

    Args:
        dim: D.
        expert_dim: F.
    """

    def __init__(self, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * expert_dim, bias=False)
        self.down = nn.Linear(expert_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return swiglu(x, self.gate_up, self.down)
