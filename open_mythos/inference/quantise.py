"""Fewer bits: weights in int8 or bfloat16, and cache entries in int8. Nothing of it is chosen for you.

Shape letters: B batch, S new tokens, C context tokens (cached and new).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.model import KVCache, LoopPolicy, MoEFFN, OpenMythos
from open_mythos.model.cache import CacheError, Entry
from open_mythos.model.coded import CODES, CodedExperts, CodedLinear

__all__ = ["Int8Cache", "Int8Codec", "quantise"]


def quantise(model: OpenMythos, kind: Literal["int8", "bfloat16"] = "int8") -> OpenMythos:
    """A copy of the model whose matrices are kept in fewer bits, for inference. Activations keep their dtype.

    Coded are the linear maps of attention, of the dense and shared feed-forward layers and of the head, and the
    routed experts, nearly all that a token reads. Norms, the injection, the LoRA, the halting head and the router,
    which decides by small differences, stay as they are. So does the embedding, of which a token reads one row; a
    tied head gets a coded copy of it.

    Args:
        model: any model; it is not changed.
        kind: ``"int8"``, one factor for each stored row (see :class:`~open_mythos.model.coded.Coded`), or
            ``"bfloat16"``.

    Raises:
        ValueError: ``kind`` is something else, or the model is quantised already.
    """
    if kind not in CODES:
        raise ValueError(f"kind = {kind!r} is not allowed: it must be {' or '.join(map(repr, CODES))}")
    if not isinstance(model, OpenMythos):
        raise ValueError(f"model must be an OpenMythos, got {type(model).__name__}")
    if any(isinstance(module, CodedLinear) for module in model.modules()):
        raise ValueError("model is quantised already: quantise the one that it was made from")
    found = {name: module for name, module in model.named_modules() if _is_coded(name, module)}
    # What is about to be coded is not copied first; the embedding is, also where the head is tied to it.
    big = [p for module in found.values() for p in module.parameters(recurse=False)]
    copied = copy.deepcopy(model, {id(p): p for p in big if p is not model.embed.weight})
    for name, module in found.items():
        parent = copied.get_submodule(name.rpartition(".")[0])
        here = getattr(parent, name.rpartition(".")[2])  # its own parts are copies
        coded = CodedExperts(here, kind) if isinstance(module, MoEFFN) else CodedLinear(here, kind)
        setattr(parent, name.rpartition(".")[2], coded)
    copied.cfg = copied.cfg.replace(tie_embeddings=False)
    return copied.requires_grad_(False)


def _is_coded(name: str, module: nn.Module) -> bool:
    """Exactly these classes: whoever put another in its place meant something by it."""
    if type(module) is MoEFFN:
        return True
    parent = name.rpartition(".")[0].rpartition(".")[2]
    return (
        type(module) is nn.Linear
        and (name == "head" or parent in ("attn", "ffn", "shared"))
        and (not name.endswith(".router"))
    )


@dataclass(frozen=True)
class Int8Codec:
    """Cache entries in int8 whose neighbouring channels share a power of two (OCP Microscaling formats 1.0, MXINT8).

        x ≈ code · 2^e,   e = ceil(log2(max |x| / 127)) over the group,   code = round(x / 2^e)

    A product with a power of two is exact in every float dtype, so coding what was decoded changes nothing. An
    entry takes 8 bits a channel and 8 a group. A group with a number that is not finite is decoded as NaN.

    Args:
        group: channels that share one, 1 or more. The last group of a token, or of a head, may be shorter.
    """

    group: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise ValueError(
                f"group = {self.group!r} is not allowed: it must be a whole number of at least 1"
            )

    def encode(self, new: Entry) -> Entry:
        """By name, float (B, S, …, width) → int8 codes of the same shape, and exponents as ``name.exponent``."""
        stored: Entry = {}
        for name, x in new.items():
            width = x.shape[-1]
            blocks = F.pad(x, (0, -width % self.group)).unflatten(-1, (-1, self.group))
            wide = torch.promote_types(x.dtype, torch.float32)
            top = blocks.abs().amax(-1).to(wide)
            mantissa, exponent = torch.frexp(top / 127)  # in [0.5, 1), so a power of two has one less
            exponent = (exponent - (mantissa == 0.5).int()).clamp(-_FARTHEST, _FARTHEST)
            codes = (blocks.to(wide) * _power(-exponent, wide).unsqueeze(-1)).round()
            finite = top.isfinite()
            stored[name] = codes.where(finite.unsqueeze(-1), 0).to(torch.int8).flatten(-2)[..., :width]
            stored[f"{name}.exponent"] = exponent.where(finite, _NOT_FINITE).to(torch.int8)
        return stored

    def decode(self, stored: Entry, dtype: torch.dtype) -> Entry:
        """Back: what the codes stand for, in this dtype."""
        entry: Entry = {}
        for name, exponent in stored.items():
            if not name.endswith(".exponent"):
                continue
            codes = stored[name.removesuffix(".exponent")]
            scale = _power(exponent.int(), dtype).masked_fill(exponent == _NOT_FINITE, torch.nan)
            scale = scale.repeat_interleave(self.group, -1)[..., : codes.shape[-1]]
            entry[name.removesuffix(".exponent")] = codes.to(dtype) * scale
        return entry


_FARTHEST = 120  # exponents that leave room in float32 and bfloat16 for the codes
_NOT_FINITE = -128


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, int32, exactly: written into the bits of a float32."""
    return ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32).to(dtype)


class Int8Cache(KVCache):
    """A :class:`KVCache` that keeps its entries as :class:`Int8Codec`, about a quarter of float32's bytes.

    Every token is seen as it is stored, by itself and in the call that brings it too. So one call over a whole
    sequence, chunks, and one token at a time give the same.

    Args:
        policy: how loops share slots; :class:`EveryLoop` by default.
        capacity: tokens to make room for at once, per slot.
        codec: how they are kept.
    """

    plain = False

    def __init__(
        self, policy: LoopPolicy | None = None, capacity: int = 0, codec: Int8Codec | None = None
    ) -> None:
        super().__init__(policy, capacity)
        self._codec = Int8Codec() if codec is None else codec

    def write(self, slot: str, new: Entry) -> Entry:
        """As :meth:`KVCache.write`; the result is (B, C, …) as the codes say.

        Raises:
            CacheError: gradients are wanted, which rounding would stop.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in new.values()):
            raise CacheError("Int8Cache is for inference: rounding stops gradients, so use torch.no_grad()")
        dtype = next(iter(new.values())).dtype
        return self._codec.decode(super().write(slot, self._codec.encode(new)), dtype)
