"""Which models the kernels of :class:`~open_mythos.inference.graph_runner.GraphRunner` serve."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from open_mythos.config import MythosConfig
from open_mythos.inference.pages import PagePool
from open_mythos.model import (
    ACTHalting,
    Expert,
    GQAttention,
    LoRAAdapter,
    LTIInjection,
    MLAttention,
    MoEFFN,
    OpenMythos,
    RecurrentBlock,
    RMSNorm,
    TransformerBlock,
)
from open_mythos.model.decode import changed_call, replaced_method
from open_mythos.rows.launch import SPLITS

__all__ = ["changed", "too_large", "unserved", "unserved_config"]

_DTYPES = (torch.bfloat16, torch.float32)
_SERVED = {
    OpenMythos, RecurrentBlock, TransformerBlock, MLAttention, GQAttention, MoEFFN, Expert, LTIInjection, LoRAAdapter,
    ACTHalting, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity,
}  # fmt: skip


def unserved(model: OpenMythos, pool: PagePool) -> str | None:
    """Why the kernels do not serve this model and this pool, or None."""
    cfg, weight = model.cfg, model.embed.weight
    if weight.device.type != "cuda":
        return f"the model is on {weight.device.type}, and the kernels run on cuda"
    if weight.dtype not in _DTYPES:
        return f"the weights are {weight.dtype}, and the kernels serve torch.bfloat16 and torch.float32"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if pool.codec is not None:
        return "keys and values are kept in another form"
    if pool.table.numel() >= 2**31:
        return f"the table of pages has {pool.table.numel()} entries, and the kernels count to {2**31 - 1}"
    return unserved_config(cfg) or too_large(model, len(pool.table)) or changed(model)


def too_large(model: OpenMythos, rows: int) -> str | None:
    """What the kernels would have to count beyond 32 bits; experts and tokens of pages are counted in 64."""
    cfg, held = model.cfg, 1 << (rows - 1).bit_length()
    most = (2**31 - 1) // (
        cfg.n_heads * SPLITS * (cfg.kv_lora_rank if cfg.attn_type == "mla" else cfg.head_dim)
    )
    if held > most:
        return f"{rows} rows, for {held} of which there has to be room, are more than the {most} that attention serves"
    if held * cfg.vocab_size >= 2**31:
        return f"the logits of {held} rows have {held * cfg.vocab_size} elements, and the kernels count to {2**31 - 1}"
    for name, p in model.named_parameters():
        if p.numel() >= 2**31 and p.dim() < 3:
            return f"{name} has {p.numel()} elements, and the kernels count to {2**31 - 1}"
    return None


def unserved_config(cfg: MythosConfig) -> str | None:
    """Why the kernels do not serve models of this config, or None."""
    for name in ("alibi", "previous_heads"):
        if getattr(cfg, name):
            return f"{name} = {getattr(cfg, name)!r}"
    if cfg.halting not in ("select", "off"):
        return f"halting = {cfg.halting!r}"
    return None


def changed(model: OpenMythos) -> str | None:
    """What makes calling the modules do something else than their classes say."""
    if _has_any_global_hook():
        return "there are global hooks"
    if model.training:
        return "the model is in training mode"
    replaced = replaced_method()
    if replaced is not None:
        return replaced
    dtype, biased = model.embed.weight.dtype, model.recurrent.act.halt
    for name, module in model.named_modules():
        why = changed_call(module) if type(module) in _SERVED else f"is of class {type(module).__name__}"
        if why is not None:
            return f"{name or 'the model'} {why}"
        if isinstance(module, nn.Linear) and module.bias is not None and module is not biased:
            return f"{name} has a bias"
        if isinstance(module, nn.RMSNorm) and module.eps != model.cfg.norm_eps:
            return f"{name}.eps is {module.eps}"
        for key, p in module._parameters.items():
            if p is not None and (p.dtype != dtype or not p.is_contiguous()):
                return f"{name}.{key} is {p.dtype} and the embedding {dtype}, or it is not contiguous"
    return None
