"""One step of the whole model in a single kernel call: a few tokens whose past is cached, float32, on the CPU.

:func:`decode` stands in for ``prelude``, ``think`` and ``coda`` of one forward without calling any module. So it
looks at all of them first, at every step: a hook, a replaced method, a parametrised weight, another class or
another shape anywhere makes it step aside, and the plain path runs. Nothing is kept from step to step.

Shape letters: B batch, S new tokens, C context tokens, D model width, T loops, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from open_mythos import kernels
from open_mythos.config import MythosConfig
from open_mythos.model.attention import GQAttention, MLAttention, SequenceContext
from open_mythos.model.cache import KVCache
from open_mythos.model.layers import Expert, RMSNorm
from open_mythos.model.moe import MoEFFN
from open_mythos.model.recurrence import ACTHalting, HaltingWeights, LoRAAdapter, LTIInjection
from open_mythos.model.transformer import OpenMythos, RecurrentBlock, TransformerBlock

__all__ = ["decode"]

# The methods whose work the kernel does; replaced on a class or an object, they must be called.
_METHODS: dict[type, tuple[str, ...]] = {
    OpenMythos: ("prelude", "initial_state", "think", "step", "coda", "features"),
    RecurrentBlock: ("forward", "_advance"),
    TransformerBlock: ("forward",),
    MLAttention: ("forward",),
    GQAttention: ("forward",),
    MoEFFN: ("forward", "route"),
    Expert: ("forward",),
    LTIInjection: ("forward", "get_A"),
    LoRAAdapter: ("forward",),
    ACTHalting: ("forward",),
    HaltingWeights: ("observe",),
    RMSNorm: ("forward",),
    nn.Linear: ("forward",),
    nn.Embedding: ("forward",),
}
_ORIGINALS = [(kind, name, getattr(kind, name)) for kind, names in _METHODS.items() for name in names]


class _WatchedError(Exception):
    """The kernel would leave out something that the modules do."""


def decode(model: OpenMythos, ids: Tensor, ctx: SequenceContext, n_loops: int) -> Tensor | None:
    """Logits of the new tokens, whose keys and values go to the cache; or None where the plain path must run.

    Args:
        model: any model.
        ids: (B, S), checked.
        ctx: the context of these ids.
        n_loops: T.

    Returns:
        (B, S, V) or None.
    """
    cache, (batch, new) = ctx.cache, ids.shape
    if cache is None or (ctx.mask is None and new > 1) or not kernels.serves(batch * new, ctx.rope):
        return None
    try:
        fields, layers = _read(model)
    except _WatchedError:
        return None
    slots = _slots(model.cfg, cache, ctx.rope.new_empty(batch, new, 0), n_loops)
    ids, mask, rope = ids.to(torch.int64).contiguous(), ctx.mask, ctx.rope
    logits = rope.new_empty(batch, new, model.cfg.vocab_size)
    fields.update(threads=torch.get_num_threads(), N=batch * new, S=new, C=ctx.past + new, T=n_loops)
    fields.update(
        ids=ids.data_ptr(), logits=logits.data_ptr(), rope=rope.data_ptr(), rope_half=rope.stride(0)
    )
    fields.update(rope_batch=0 if rope.shape[1] == 1 else rope.stride(1))
    if mask is not None:
        mask = mask.expand(batch, 1, new, -1).contiguous()
        fields.update(mask=mask.data_ptr(), mask_batch=mask.stride(0), mask_token=mask.stride(2))
    kernels.step(kernels.Step(**fields), layers, slots)
    return logits


def _slots(cfg: MythosConfig, cache: KVCache, like: Tensor, n_loops: int) -> list[kernels.Slot]:
    """Room in the cache for the new tokens of each layer, in the order in which the layers run."""
    names = [f"prelude_{i}" for i in range(cfg.prelude_layers)]
    names += [cache.policy.slot(t) for t in range(n_loops)]
    names += [f"coda_{i}" for i in range(cfg.coda_layers)]
    if cfg.attn_type == "mla":
        new = {"latent": like.new_empty(*like.shape[:2], cfg.kv_lora_rank + cfg.qk_rope_head_dim)}
    else:
        heads = like.new_empty(*like.shape[:2], cfg.n_kv_heads, cfg.head_dim)
        new = {"k": heads, "v": heads}
    slots = []
    for name in names:
        keys, *values = cache.reserve(name, new).values()
        address = values[0].data_ptr() if values else None
        slots.append(kernels.Slot(keys.data_ptr(), address, keys.stride(0), keys.stride(1)))
    return slots


def _read(model: OpenMythos) -> tuple[dict[str, Any], list[kernels.Layer]]:
    """Sizes and addresses of the whole model: fields of the kernel's Step, and its layers.

    Raises:
        _WatchedError: calling the modules might do something else.
    """
    if _has_any_global_hook() or any(getattr(kind, name) is not own for kind, name, own in _ORIGINALS):
        raise _WatchedError
    cfg, loop = model.cfg, model.recurrent
    _check(model, OpenMythos)
    _check(loop, RecurrentBlock)
    _check(model.embed, nn.Embedding)
    random = cfg.initial_state == "random" and model.training
    if random or cfg.halting not in ("select", "off") or model.embed.max_norm is not None:
        raise _WatchedError
    width, eps = cfg.dim, cfg.norm_eps
    blocks = [*model.prelude_layers, loop.block, *model.coda_layers]
    fields = {
        "D": width,
        "H": cfg.n_heads,
        "E": cfg.n_experts,
        "F": cfg.expert_dim,
        "k": loop.block.ffn.topk,
        "n_prelude": len(model.prelude_layers),
        "n_coda": len(model.coda_layers),
        "vocab": cfg.vocab_size,
        "loop_dim": loop.loop_dim,
        "keeps_input": loop.cfg.block_output == "state",
        "starts_at_input": cfg.initial_state == "prelude",
        "eps": eps,
        "embed_scale": math.sqrt(width) if cfg.init == "scaled" else 1.0,
        "embed": _address(model.embed, "weight", cfg.vocab_size, width),
        "loop_norm": _norm(loop.norm, width, eps),
        "norm": _norm(model.norm, width, eps),
        "head": _linear(model.head, cfg.vocab_size, width),
    }
    if type(model.input_norm) is not nn.Identity:
        fields["input_norm"] = _norm(model.input_norm, width, eps)
    if loop.state_norm is not None:
        fields["state_norm"] = _norm(loop.state_norm, width, eps)
    return fields | _recurrence(loop, cfg) | _attention_sizes(cfg), [_layer(block, cfg) for block in blocks]


def _recurrence(loop: RecurrentBlock, cfg: MythosConfig) -> dict[str, Any]:
    """Fields for injection, LoRA and halting."""
    injection, lora, act = loop.injection, loop.lora, loop.act
    _check(injection, LTIInjection)
    fields: dict[str, Any] = {
        "log_A": _address(injection, "log_A", cfg.dim),
        "log_dt": _address(injection, "log_dt", 1),
        "B": _address(injection, "B", cfg.dim),
    }
    if lora is not None:
        _check(lora, LoRAAdapter)
        rows, rank = lora.scale.weight.shape
        fields["lora_down"] = _linear(lora.down, rank, cfg.dim)
        fields["lora_B"] = _address(lora, "B", rank, cfg.dim)
        fields["lora_scale"] = _address(lora.scale, "weight", rows, rank)
        fields |= {"lora_rows": rows, "L": rank}
    if cfg.halting == "select":
        _check(act, ACTHalting)
        _check(act.halt, nn.Linear)
        fields["halt"] = _address(act.halt, "weight", 1, cfg.dim)
        fields["halt_bias"] = _address(act.halt, "bias", 1)
        fields["still_running"] = 1 - HaltingWeights(cfg).threshold
    return fields


def _attention_sizes(cfg: MythosConfig) -> dict[str, Any]:
    if cfg.attn_type == "gqa":
        return {"G": cfg.n_kv_heads, "K": cfg.head_dim, "scale": cfg.head_dim**-0.5}
    nope, rope = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    sizes = {"K": nope, "P": rope, "R": cfg.kv_lora_rank, "Q": cfg.q_lora_rank, "V": cfg.v_head_dim}
    return sizes | {"scale": (nope + rope) ** -0.5}


def _layer(block: TransformerBlock, cfg: MythosConfig) -> kernels.Layer:
    """Addresses of one block."""
    _check(block, TransformerBlock)
    attn, ffn, width, eps = block.attn, block.ffn, cfg.dim, cfg.norm_eps
    if (block.dropout and block.training) or (attn.dropout and attn.training):
        raise _WatchedError
    fields = {
        "attn_norm": _norm(block.attn_norm, width, eps),
        "ffn_norm": _norm(block.ffn_norm, width, eps),
    }
    fields |= _latent(attn, cfg) if cfg.attn_type == "mla" else _grouped(attn, cfg)
    dense: nn.Module | None = ffn
    if type(ffn) is MoEFFN:
        _check(ffn, MoEFFN)
        count, hidden = cfg.n_experts, cfg.expert_dim
        fields["router"] = _linear(ffn.router, count, width)
        fields["router_bias"] = _address(ffn, "router_bias", count)
        fields["w_in"] = _address(ffn, "w_in", count, width, 2 * hidden)
        fields["w_out"] = _address(ffn, "w_out", count, hidden, width)
        dense = ffn.shared
    if dense is not None:
        _check(dense, Expert)
        size = cfg.shared_dim if dense is not ffn else cfg.dense_dim
        fields["gate_up"] = _linear(dense.gate_up, 2 * size, width)
        fields["down"] = _linear(dense.down, width, size)
        fields["Fs"] = size
    return kernels.Layer(**fields)


def _latent(attn: Any, cfg: MythosConfig) -> dict[str, int]:
    _check(attn, MLAttention)
    heads, rank, query = cfg.n_heads, cfg.kv_lora_rank, cfg.q_lora_rank
    nope, rope, value = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    return {
        "q_down": _linear(attn.q_down, query, cfg.dim),
        "q_norm": _norm(attn.q_norm, query, cfg.norm_eps),
        "q_up": _linear(attn.q_up, heads * (nope + rope), query),
        "kv_down": _linear(attn.kv_down, rank + rope, cfg.dim),
        "kv_norm": _norm(attn.kv_norm, rank, cfg.norm_eps),
        "kv_up": _linear(attn.kv_up, heads * (nope + value), rank),
        "wo": _linear(attn.wo, cfg.dim, heads * value),
    }


def _grouped(attn: Any, cfg: MythosConfig) -> dict[str, int]:
    _check(attn, GQAttention)
    heads, groups, size = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    fields = {
        "wq": _linear(attn.wq, heads * size, cfg.dim),
        "wk": _linear(attn.wk, groups * size, cfg.dim),
        "wv": _linear(attn.wv, groups * size, cfg.dim),
        "wo": _linear(attn.wo, cfg.dim, heads * size),
    }
    if attn.q_norm is not None:
        fields["q_norm"] = _norm(attn.q_norm, size, cfg.norm_eps)
        fields["k_norm"] = _norm(attn.k_norm, size, cfg.norm_eps)
    return fields


def _check(module: nn.Module, kind: type) -> None:
    """Calling the module does what its class says."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
        raise _WatchedError
    own = module.__dict__
    for name in _METHODS[kind]:
        if name in own:
            raise _WatchedError


def _address(module: nn.Module, name: str, *shape: int) -> int:
    """Where a weight of this shape begins: the C code trusts its sizes, so they are compared here."""
    tensor: Any = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    if tensor is None or tensor.shape != shape or not kernels.readable(tensor):
        raise _WatchedError
    return tensor.data_ptr()


def _linear(module: Any, rows: int, width: int) -> int:
    _check(module, nn.Linear)
    if module._parameters.get("bias") is not None:
        raise _WatchedError
    return _address(module, "weight", rows, width)


def _norm(module: Any, width: int, eps: float) -> int:
    _check(module, RMSNorm)
    if module.eps != eps:
        raise _WatchedError
    return _address(module, "weight", width)
