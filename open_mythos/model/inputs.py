"""What a call is given: loops and ids refused where they do not fit, and who may look at whom.

Shape letters: B batch, S new tokens, C context tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from open_mythos.model.cache import CacheError, KVCache

__all__ = ["TOKEN_DTYPES", "check_ids", "check_loops", "check_range", "segments", "visibility"]

TOKEN_DTYPES = (torch.int64, torch.int32)
"""Of token ids."""


def check_loops(n_loops: object) -> int:
    """The count as an int; NumPy's whole numbers, from an arange in a notebook, are as good as ours."""
    if isinstance(n_loops, bool) or not isinstance(n_loops, Integral) or n_loops < 1:
        raise ValueError(
            f"n_loops = {n_loops!r} is not allowed: it must be a whole number of at least 1, or None"
        )
    return int(n_loops)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Shape, dtype and, where reading them costs no device synchronisation, values."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in TOKEN_DTYPES:
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be an int64 or int32 tensor of shape (B, S), got {got}")
    if ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}: it must hold at least one token in each row"
        )
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range("input_ids", ids, vocab_size)


def check_range(name: str, ids: Tensor | Sequence[int], vocab_size: int) -> None:
    """Refuse ids that are not of the vocabulary; there is at least one. Reads a tensor's device."""
    low, high = (int(x) for x in (torch.aminmax(ids) if isinstance(ids, Tensor) else (min(ids), max(ids))))
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"{name} contains {bad}: it must be 0 to vocab_size - 1 ({vocab_size - 1})")


def segments(
    tokens: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, cache: KVCache | None
) -> Tensor | None:
    """Document of each cached and new column, -1 for padding: (B, C), or None when all are one document."""
    shape = tokens.shape[:2]
    for name, marks in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if marks is not None and (not isinstance(marks, Tensor) or marks.shape != shape):
            got = tuple(marks.shape) if isinstance(marks, Tensor) else type(marks).__name__
            raise ValueError(f"{name} must have the shape of input_ids, {tuple(shape)}, got {got}")
    if document_ids is not None and (document_ids.is_floating_point() or document_ids.dtype == torch.bool):
        raise ValueError(f"document_ids must be whole numbers, got {document_ids.dtype}")
    if document_ids is not None and document_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        lowest = int(document_ids.min())
        if lowest < 0:
            raise ValueError(
                f"document_ids contains {lowest}: it must be at least 0; mark padding in attention_mask"
            )
    before = None if cache is None else cache.segments
    if cache is not None and cache.packed and document_ids is None:
        raise CacheError(
            "the cache holds packed documents: pass document_ids, which say what the new tokens continue"
        )
    if attention_mask is None and document_ids is None and before is None:
        return None
    marks = torch.zeros(shape, dtype=torch.int64, device=tokens.device)
    if document_ids is not None:
        marks = document_ids.to(tokens.device, torch.int64)
    if attention_mask is not None:
        marks = marks.masked_fill(attention_mask.to(tokens.device) == 0, -1)
    if cache is not None and cache.length:
        if before is None:
            before = torch.zeros((shape[0], cache.length), dtype=torch.int64, device=tokens.device)
        marks = torch.cat((before, marks), 1)
    return marks


def visibility(segments: Tensor | None, past: int, new: int, device: torch.device) -> Tensor | None:
    """Who sees whom, (B or 1, 1, S, C) bool; None when it is plain causality or all keys.

    Padding is a document of its own, so that its rows have something to look at and nobody looks at it.
    """
    if segments is None and (past == 0 or new == 1):
        return None
    columns = torch.arange(past + new, device=device)
    mask = (columns <= columns[past:, None]).view(1, 1, new, past + new)
    if segments is not None:
        mask = mask & (segments[:, None, past:, None] == segments[:, None, None, :])
    return mask
