"""Names, shapes and layout of upstream's tensors, and of ours. See :mod:`open_mythos.weights.upstream`.

Shape letters: D model width, H heads, K head width, R latent rank, Q query rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from open_mythos.config import MythosConfig

__all__ = ["State", "block_in", "block_out", "layers", "shapes", "under"]

State = dict[str, Tensor]


def shapes(cfg: MythosConfig) -> dict[str, tuple[int, ...]]:
    """Upstream's tensor names and shapes, rotary tables left out."""
    D, rank, shared = cfg.dim, cfg.lora_rank, cfg.expert_dim * cfg.n_experts_per_tok
    out: dict[str, tuple[int, ...]] = {
        "embed.weight": (cfg.vocab_size, D),
        "head.weight": (cfg.vocab_size, D),
        "norm.weight": (D,),
        **{f"recurrent.{name}": (D,) for name in ("norm.weight", "injection.log_A", "injection.B")},
        "recurrent.injection.log_dt": (1,),
        "recurrent.act.halt.weight": (1, D),
        "recurrent.act.halt.bias": (1,),
        "recurrent.lora.down.weight": (rank, D),
        "recurrent.lora.B": (rank, D),
        "recurrent.lora.scale.weight": (cfg.max_loop_iters, rank),
    }
    for block, _ in layers(cfg):
        out |= {f"{block}.{norm}.weight": (D,) for norm in ("attn_norm", "ffn_norm")}
        out |= {f"{block}.attn.{name}.weight": shape for name, shape in _attention_shapes(cfg).items()}
        ffn = {"": cfg.dense_dim}
        if block == "recurrent.block":
            out |= {
                f"{block}.ffn.router.weight": (cfg.n_experts, D),
                f"{block}.ffn.router_bias": (cfg.n_experts,),
            }
            ffn = {f"routed_experts.{i}.": cfg.expert_dim for i in range(cfg.n_experts)}
            ffn |= {f"shared_experts.{i}.": shared for i in range(cfg.n_shared_experts)}
        for name, width in ffn.items():
            out |= {f"{block}.ffn.{name}{part}.weight": (width, D) for part in ("gate", "up")}
            out[f"{block}.ffn.{name}down.weight"] = (D, width)
    return out


def _attention_shapes(cfg: MythosConfig) -> dict[str, tuple[int, ...]]:
    D, H = cfg.dim, cfg.n_heads
    if cfg.attn_type == "gqa":
        narrow = (cfg.n_kv_heads * cfg.head_dim, D)
        return {"wq": (D, D), "wk": narrow, "wv": narrow, "wo": (D, D)}
    Q, R = cfg.q_lora_rank, cfg.kv_lora_rank
    return {
        "q_down": (Q, D),
        "q_norm": (Q,),
        "q_up_nope": (H * cfg.qk_nope_head_dim, Q),
        "q_up_rope": (H * cfg.qk_rope_head_dim, Q),
        "kv_down": (R + cfg.qk_rope_head_dim, D),
        "kv_norm": (R,),
        "kv_up": (H * (cfg.qk_nope_head_dim + cfg.v_head_dim), R),
        "wo": (D, H * cfg.v_head_dim),
    }


def layers(cfg: MythosConfig) -> Iterator[tuple[str, str]]:
    """(upstream's name, ours) of every transformer block."""
    for part in ("prelude", "coda"):
        for i in range(getattr(cfg, f"{part}_layers")):
            yield f"{part}.{i}", f"{part}_layers.{i}"
    yield "recurrent.block", "recurrent.block"


def under(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries below a module, their names from there on."""
    return {
        name[len(prefix) + 1 :]: tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")
    }


def _to_halves(rows: Tensor, width: int) -> Tensor:
    """Rows of a rotated projection, heads of ``width``: neighbours (2i, 2i+1) become (i, i + K/2)."""
    return rows.view(-1, width // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _to_pairs(rows: Tensor, width: int) -> Tensor:
    """Inverse of :func:`_to_halves`."""
    return rows.view(-1, 2, width // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def block_in(block: State, cfg: MythosConfig, name: str, moe: bool) -> State:
    """One transformer block under our names."""
    attn, ffn = under(block, "attn"), under(block, "ffn")
    out = {f"{norm}.weight": block[f"{norm}.weight"].clone() for norm in ("attn_norm", "ffn_norm")}
    converted = _mla_in(attn, cfg) if cfg.attn_type == "mla" else _gqa_in(attn, cfg)
    out |= {f"attn.{key}": tensor for key, tensor in converted.items()}
    converted = _moe_in(ffn, cfg) if moe else _swiglu_in([ffn])
    out |= {f"ffn.{key}": tensor for key, tensor in converted.items()}
    return {f"{name}.{key}": tensor for key, tensor in out.items()}


def block_out(block: State, cfg: MythosConfig, name: str, moe: bool) -> State:
    """One transformer block under upstream's names."""
    attn, ffn = under(block, "attn"), under(block, "ffn")
    out = {f"{norm}.weight": block[f"{norm}.weight"].clone() for norm in ("attn_norm", "ffn_norm")}
    converted = _mla_out(attn, cfg) if cfg.attn_type == "mla" else _gqa_out(attn, cfg)
    out |= {f"attn.{key}": tensor for key, tensor in converted.items()}
    converted = _moe_out(ffn, cfg) if moe else _swiglu_out(ffn, 1)[0]
    out |= {f"ffn.{key}": tensor for key, tensor in converted.items()}
    return {f"{name}.{key}": tensor for key, tensor in out.items()}


def _gqa_in(attn: State, cfg: MythosConfig) -> State:
    out = {name: tensor.clone() for name, tensor in attn.items()}
    for name in ("wq.weight", "wk.weight"):
        out[name] = _to_halves(attn[name], cfg.head_dim)
    return out


def _gqa_out(attn: State, cfg: MythosConfig) -> State:
    out = {name: tensor.clone() for name, tensor in attn.items()}
    for name in ("wq.weight", "wk.weight"):
        out[name] = _to_pairs(attn[name], cfg.head_dim)
    return out


def _mla_in(attn: State, cfg: MythosConfig) -> State:
    """Queries become [nope | rope] per head in one matrix; the shared rope key's rows are permuted."""
    rope, nope, rank = cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    out = {name: tensor.clone() for name, tensor in attn.items() if not name.startswith("q_up_")}
    plain = attn["q_up_nope.weight"].view(cfg.n_heads, nope, -1)
    rotated = _to_halves(attn["q_up_rope.weight"], rope).view(cfg.n_heads, rope, -1)
    out["q_up.weight"] = torch.cat((plain, rotated), 1).flatten(0, 1)
    down = attn["kv_down.weight"]
    out["kv_down.weight"] = torch.cat((down[:rank], _to_halves(down[rank:], rope)))
    return out


def _mla_out(attn: State, cfg: MythosConfig) -> State:
    rope, nope, rank = cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    out = {name: tensor.clone() for name, tensor in attn.items() if name != "q_up.weight"}
    plain, rotated = attn["q_up.weight"].view(cfg.n_heads, nope + rope, -1).split((nope, rope), 1)
    out["q_up_nope.weight"] = plain.flatten(0, 1).clone()
    out["q_up_rope.weight"] = _to_pairs(rotated.flatten(0, 1), rope)
    down = attn["kv_down.weight"]
    out["kv_down.weight"] = torch.cat((down[:rank], _to_pairs(down[rank:], rope)))
    return out


def _swiglu_in(experts: list[State]) -> State:
    """Several SwiGLUs as one: rows [all gates | all ups], and the down columns side by side."""
    gates = [expert["gate.weight"] for expert in experts]
    ups = [expert["up.weight"] for expert in experts]
    downs = [expert["down.weight"] for expert in experts]
    return {"gate_up.weight": torch.cat((*gates, *ups)), "down.weight": torch.cat(downs, 1)}


def _swiglu_out(ffn: State, parts: int) -> list[State]:
    """Inverse of :func:`_swiglu_in`."""
    gate, up = ffn["gate_up.weight"].chunk(2)
    pieces = zip(gate.chunk(parts), up.chunk(parts), ffn["down.weight"].chunk(parts, 1), strict=True)
    return [
        {"gate.weight": g.clone(), "up.weight": u.clone(), "down.weight": d.clone()} for g, u, d in pieces
    ]


def _moe_in(ffn: State, cfg: MythosConfig) -> State:
    routed = [under(ffn, f"routed_experts.{i}") for i in range(cfg.n_experts)]
    bias = ffn["router_bias"]
    out = {
        "router.weight": ffn["router.weight"].clone(),
        "router_bias": bias.to(torch.promote_types(bias.dtype, torch.float32), copy=True),
        "expert_load": torch.zeros(cfg.n_experts, dtype=torch.int64, device=bias.device),
        "w_in": torch.stack([torch.cat((e["gate.weight"], e["up.weight"])).t() for e in routed]),
        "w_out": torch.stack([expert["down.weight"].t() for expert in routed]),
    }
    if cfg.n_shared_experts:
        shared = [under(ffn, f"shared_experts.{i}") for i in range(cfg.n_shared_experts)]
        out |= {f"shared.{name}": tensor for name, tensor in _swiglu_in(shared).items()}
    return out


def _moe_out(ffn: State, cfg: MythosConfig) -> State:
    out = {name: ffn[name].clone() for name in ("router.weight", "router_bias")}
    for i in range(cfg.n_experts):
        gate, up = ffn["w_in"][i].t().chunk(2)
        expert = {"gate.weight": gate, "up.weight": up, "down.weight": ffn["w_out"][i].t()}
        out |= {f"routed_experts.{i}.{name}": tensor.contiguous().clone() for name, tensor in expert.items()}
    if cfg.n_shared_experts:
        for i, expert in enumerate(_swiglu_out(under(ffn, "shared"), cfg.n_shared_experts)):
            out |= {f"shared_experts.{i}.{name}": tensor for name, tensor in expert.items()}
    return out
