"""Steps of the whole model in one kernel call each: a few tokens whose past is cached, float32, on the CPU.

:func:`decode` stands in for ``prelude``, ``think`` and ``coda`` of one forward, and :class:`Decoder` for forward
after forward of one token a row. They call no module. So they look at all of them first: a hook, a replaced method, a
parametrised weight, another class or another shape anywhere makes them step aside, and the plain path runs. What they
found is kept as a plan, and later calls make sure that no module, attribute, hook or weight has changed since.

Shape letters: B batch, S new tokens, C context tokens, D model width, T loops, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from open_mythos import kernels
from open_mythos.config import MythosConfig
from open_mythos.model.attention import GQAttention, MLAttention, SequenceContext
from open_mythos.model.blocks import RecurrentBlock, TransformerBlock
from open_mythos.model.cache import KVCache
from open_mythos.model.coded import Coded, CodedExperts, CodedLinear
from open_mythos.model.layers import Expert, RMSNorm, rope_table
from open_mythos.model.moe import MoEFFN
from open_mythos.model.recurrence import ACTHalting, HaltingWeights, LoRAAdapter, LTIInjection
from open_mythos.model.transformer import OpenMythos
from open_mythos.model.watch import Watch

__all__ = ["Decoder", "Plan", "changed_call", "decode", "plan_of", "replaced_method"]

# The methods whose work the kernel does; replaced on a class or an object, they must be called.
_METHODS: dict[type, tuple[str, ...]] = {
    OpenMythos: ("forward", "prelude", "initial_state", "think", "step", "coda", "features"),
    RecurrentBlock: ("forward", "_advance"),
    TransformerBlock: ("forward",),
    MLAttention: ("forward",),
    GQAttention: ("forward",),
    MoEFFN: ("forward", "route"),
    CodedExperts: ("forward", "route", "_routed"),
    CodedLinear: ("forward", "weight"),
    Expert: ("forward",),
    LTIInjection: ("forward", "get_A"),
    LoRAAdapter: ("forward",),
    ACTHalting: ("forward",),
    HaltingWeights: ("observe",),
    RMSNorm: ("forward",),
    nn.Linear: ("forward",),
    nn.Embedding: ("forward",),
}
_STORED = (torch.float32, torch.bfloat16, torch.int8)
_ORIGINALS = [(kind, name, getattr(kind, name)) for kind, names in _METHODS.items() for name in names]


def changed_call(module: nn.Module) -> str | None:
    """What makes calling one of the model's modules do something else than its class says; None if nothing does."""
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    if kind in (nn.ModuleList, nn.Identity):
        return None
    if kind not in _METHODS:
        return f"is of class {kind.__name__}"
    own = [name for name in _METHODS[kind] if name in module.__dict__]
    own += [name for owner, name, was in _ORIGINALS if owner is kind and getattr(kind, name) is not was]
    return f"has another method {own[0]!r}" if own else None


def replaced_method() -> str | None:
    """Which method of the model's classes is another one than when they were imported; None if none is."""
    for kind, name, own in _ORIGINALS:
        if getattr(kind, name) is not own:
            return f"{kind.__name__}.{name} was replaced"
    return None


class _WatchedError(Exception):
    """The kernel would leave out something that this module does, or that the config asks for."""

    def __init__(self, why: str, module: object = None) -> None:
        super().__init__(why)
        self.module = module


class Plan(Watch):
    """Addresses and sizes of a model's parts, and what they were read from.

    Args:
        model: any model.

    Attributes:
        fields: of the kernel's Step.
        layers: prelude, the looped block, coda; None where the modules must be called.
        reason: why they must be, or None.
    """

    def __init__(self, model: OpenMythos) -> None:
        super().__init__(model, lambda tensor: kernels.readable(tensor, *_STORED))
        self.fields: dict[str, Any] = {}
        self.layers: list[kernels.Layer] | None = None
        self.reason: str | None = None
        try:
            if self.hooked:
                listened = (m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks)
                raise _WatchedError("has hooks", next(listened))
            self.fields, self.layers = _read(model)
        except _WatchedError as error:
            names = {id(module): name or "the model" for name, module in model.named_modules()}
            self.reason = f"{names.get(id(error.module), '')} {error}".strip()
        except AttributeError as error:  # another class may lack what its place has
            self.reason = str(error)

    def step(self, batch: int, new: int, n_loops: int, slots: list[kernels.Slot]) -> kernels.Call:
        """A call of the kernel for B rows of S tokens and T loops."""
        assert self.layers is not None
        return kernels.Call(self.fields | {"N": batch * new, "S": new, "T": n_loops}, self.layers, slots)


_PLANS: WeakKeyDictionary[OpenMythos, Plan] = WeakKeyDictionary()


def plan_of(model: OpenMythos) -> Plan | str:
    """What the kernel needs to stand in for the model's modules, or why they must be called."""
    if _has_any_global_hook():
        return "there are global hooks"
    replaced = replaced_method()
    if replaced is not None:
        return replaced
    plan = _PLANS.get(model)
    if plan is None or not plan.holds():
        plan = _PLANS[model] = Plan(model)
    return plan if plan.reason is None else plan.reason


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
    (batch, new), rope, mask = ids.shape, ctx.rope, ctx.mask
    if ctx.cache is None or not ctx.cache.plain or not kernels.serves(batch * new, rope):
        return None
    plan = plan_of(model)
    if isinstance(plan, str):
        return None
    slots = _slots(model.cfg, ctx.cache, rope, batch, new, n_loops)
    call = plan.step(batch, new, n_loops, slots)
    call.set_rope(rope)
    if mask is None and new > 1:  # causality alone decides, which the kernel wants in writing
        mask = torch.ones(1, 1, new, new, dtype=torch.bool, device=ids.device).tril()
    if mask is not None:
        call.set_mask(mask.expand(batch, 1, new, -1).squeeze(1))
    return call.run(ids, ctx.past + new)


class Decoder:
    """One token a row, again and again, after what the cache holds: :func:`decode` with all preparation done once.

    The cache does not count the tokens before :meth:`close`. Make one with :meth:`begin`.
    """

    def __init__(self, model: OpenMythos, plan: Plan, cache: KVCache, n_loops: int, count: int) -> None:
        cfg, batch, past = model.cfg, cache.batch_size or 0, cache.length
        self._model, self._plan, self._cache, self._fed = model, plan, cache, 0
        self._width = cfg.rope_dim
        seen = None if cache.segments is None else cache.segments == 0  # the document that is not padding
        # Named, because the default may be another device, and the kernel is about to read this memory.
        cpu = torch.device("cpu")
        first = torch.tensor([[past]], device=cpu) if seen is None else seen.sum(1, keepdim=True)
        rope = rope_table(first + torch.arange(count, device=cpu), self._width, cfg.rope_theta)
        self._call = plan.step(batch, 1, n_loops, _slots(cfg, cache, rope, batch, count, n_loops))
        self._call.set_rope(rope)
        if seen is not None:
            self._call.set_mask(F.pad(seen, (0, count), value=True).unsqueeze(1))

    @classmethod
    def begin(cls, model: OpenMythos, cache: KVCache, n_loops: int, count: int) -> Decoder | None:
        """A decoder for up to ``count`` tokens a row, or None where the model itself must be called.

        Args:
            model: any model.
            cache: what one forward of at least ``n_loops`` loops has filled.
            n_loops: T.
            count: tokens to make room for; with the cached ones at most ``max_seq_len``.
        """
        weight = model.embed.weight
        if cache.packed or not cache.plain or count < 1 or not kernels.serves(cache.batch_size or 0, weight):
            return None
        plan = plan_of(model)
        return None if isinstance(plan, str) else cls(model, plan, cache, n_loops, count)

    def step(self, ids: Tensor) -> Tensor:
        """Token ids (B, 1) → logits (B, 1, V)."""
        logits = self._call.run(ids, self._cache.length + self._fed + 1, self._fed * self._width)
        self._fed += 1
        return logits

    def holds(self) -> bool:
        """Whether the next step may be taken here too, after somebody else had their turn."""
        return kernels.serves(1, self._model.embed.weight) and plan_of(self._model) is self._plan

    def close(self) -> None:
        """Hand the cache over, with the tokens that were fed counted."""
        cache = self._cache
        segments = None if cache.segments is None else F.pad(cache.segments, (0, self._fed))
        cache.commit(self._fed, segments)
        cache.trim(cache.length)


def _slots(
    cfg: MythosConfig, cache: KVCache, like: Tensor, batch: int, new: int, n_loops: int
) -> list[kernels.Slot]:
    """Room in the cache for the new tokens of each layer, in the order in which the layers run."""
    names = [f"prelude_{i}" for i in range(cfg.prelude_layers)]
    names += [cache.policy.slot(t) for t in range(n_loops)]
    names += [f"coda_{i}" for i in range(cfg.coda_layers)]
    one = like.new_empty(1)
    brings = {name: one.expand(batch, new, *shape) for name, shape in cfg.cached_shapes().items()}
    slots = []
    for name in names:
        keys, *values = cache.reserve(name, brings).values()
        address = values[0].data_ptr() if values else None
        slots.append(kernels.Slot(keys.data_ptr(), address, keys.stride(0), keys.stride(1)))
    return slots


def _read(model: OpenMythos) -> tuple[dict[str, Any], list[kernels.Layer]]:
    """Sizes and addresses of the whole model: fields of the kernel's Step, and its layers.

    Raises:
        _WatchedError: calling the modules might do something else.
    """
    cfg, loop = model.cfg, model.recurrent
    _check(model, OpenMythos)
    _check(loop, RecurrentBlock)
    _check(model.embed, nn.Embedding)
    if cfg.initial_state == "random" and model.training:
        raise _WatchedError("initial_state = 'random' draws in training mode")
    for name in ("alibi", "previous_heads"):
        if getattr(cfg, name):
            raise _WatchedError(f"{name} = {getattr(cfg, name)!r}")
    if cfg.halting not in ("select", "off"):
        raise _WatchedError(f"halting = {cfg.halting!r}")
    if model.embed.max_norm is not None:
        raise _WatchedError("has a max_norm", model.embed)
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
    for name in ("update_norm", "state_norm"):
        if (norm := getattr(loop, name)) is not None:
            fields[name] = _norm(norm, width, eps)
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
        fields["lora_down"] = _plain(lora.down, rank, cfg.dim)
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
    ffn: Any = block.ffn
    attn, width, eps = block.attn, cfg.dim, cfg.norm_eps
    if (block.dropout and block.training) or (attn.dropout and attn.training):
        raise _WatchedError("drops activations in training mode", block)
    fields: dict[str, Any] = {
        "attn_norm": _norm(block.attn_norm, width, eps),
        "ffn_norm": _norm(block.ffn_norm, width, eps),
    }
    fields |= _latent(attn, cfg) if cfg.attn_type == "mla" else _grouped(attn, cfg)
    dense: nn.Module | None = ffn
    if type(ffn) in (MoEFFN, CodedExperts):
        _check(ffn, type(ffn))
        count, hidden = cfg.n_experts, cfg.expert_dim
        if not 1 <= ffn.topk <= count:  # the C code would look for an expert that is not there
            raise _WatchedError(f"has topk = {ffn.topk} of {count} experts", ffn)
        fields["router"] = _linear(ffn.router, count, width)
        fields["router_bias"] = _address(ffn, "router_bias", count)
        fields["w_in"] = _experts(ffn, "in", count, width, 2 * hidden)
        fields["w_out"] = _experts(ffn, "out", count, hidden, width)
        dense = ffn.shared
    if dense is not None:
        _check(dense, Expert)
        size = cfg.shared_dim if dense is not ffn else cfg.dense_dim
        fields["gate_up"] = _linear(dense.gate_up, 2 * size, width)
        fields["down"] = _linear(dense.down, width, size)
        fields["Fs"] = size
    return kernels.Layer(**fields)


def _latent(attn: Any, cfg: MythosConfig) -> dict[str, Any]:
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


def _grouped(attn: Any, cfg: MythosConfig) -> dict[str, Any]:
    _check(attn, GQAttention)
    heads, groups, size = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    fields: dict[str, Any] = {
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
    why = f"is of class {type(module).__name__}" if type(module) is not kind else changed_call(module)
    if why is not None:
        raise _WatchedError(why, module)


def _address(module: nn.Module, name: str, *shape: int) -> int:
    """Where a weight of this shape begins: the C code trusts its sizes, so they are compared here."""
    tensor: Any = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    if tensor is None or tensor.shape != shape or not kernels.readable(tensor):
        raise _WatchedError(f"has another {name} than a float32 one of shape {shape} on the CPU", module)
    return tensor.data_ptr()


def _plain(module: Any, rows: int, width: int) -> int:
    _check(module, nn.Linear)
    if module._parameters.get("bias") is not None:
        raise _WatchedError("has a bias", module)
    return _address(module, "weight", rows, width)


def _linear(module: Any, rows: int, width: int) -> kernels.Matrix:
    if type(module) is not CodedLinear:
        return kernels.Matrix(_plain(module, rows, width), None, 4)
    _check(module, CodedLinear)
    return _coded(module.coded, rows, width)


def _experts(module: Any, name: str, *shape: int) -> kernels.Matrix:
    if type(module) is MoEFFN:
        return kernels.Matrix(_address(module, f"w_{name}", *shape), None, 4)
    return _coded(getattr(module, f"coded_{name}"), *shape)


def _coded(module: Any, *shape: int) -> kernels.Matrix:
    if type(module) is not Coded:
        raise _WatchedError(f"is of class {type(module).__name__}", module)
    codes = module.codes
    if codes.shape != shape or not kernels.readable(codes, torch.bfloat16, torch.int8):
        raise _WatchedError(f"has other codes than int8 or bfloat16 ones of shape {shape} on the CPU", module)
    factor = None if module.factor is None else _address(module, "factor", *shape[:-1])
    return kernels.Matrix(codes.data_ptr(), factor, codes.element_size())


def _norm(module: Any, width: int, eps: float) -> int:
    _check(module, RMSNorm)
    if module.eps != eps:
        raise _WatchedError(f"has eps = {module.eps}", module)
    return _address(module, "weight", width)
