"""Fewer bits: weights in int8 or bfloat16, and cache entries in int8. Nothing of it is chosen for you.

Shape letters: B batch, S new tokens, G key/value heads, K head width, R latent rank.
"""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

from open_mythos.model import MoEFFN, OpenMythos
from open_mythos.model.coded import CODES, CodedExperts, CodedLinear

__all__ = ["quantise"]


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
