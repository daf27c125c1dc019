"""What the kernels of a decode step hand from one to the next, and the parameters around the looped block.

Shape letters: N entries, R rows of the engine, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.inference.runner import RowState
from open_mythos.model import LTIInjection, OpenMythos
from open_mythos.model.recurrence import HaltingWeights
from open_mythos.rows.plain import Injection, wide

__all__ = ["Room", "injection_of"]


class Room:
    """What the kernels of a graph hand on, for N entries at most; graphs of fewer use its beginning."""

    def __init__(self, model: OpenMythos, count: int) -> None:
        cfg, weight = model.cfg, model.embed.weight
        self.dtype, self.wide, self.device = weight.dtype, wide(weight.dtype), weight.device
        slots = count * cfg.n_experts_per_tok
        if cfg.attn_type == "mla":
            both = cfg.kv_lora_rank + cfg.qk_rope_head_dim
            self.low = self._make(count, cfg.q_lora_rank + both)
            self.q = self._make(count, cfg.n_heads, both, narrow=True)
            self.mixed = self._make(count, cfg.n_heads * cfg.v_head_dim, narrow=True)
        else:
            self.low = self._make(count, (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim)
            self.q = self._make(count, cfg.n_heads, cfg.head_dim, narrow=True)
            self.mixed = self._make(count, cfg.n_heads * cfg.head_dim, narrow=True)
        self.inner, self.shared = self._make(count, cfg.dim), self._make(count, cfg.dim)
        self.dense = self._make(count, cfg.dense_dim, narrow=True)
        self.shared_hidden = self._make(count, max(cfg.shared_dim, 1), narrow=True)
        self.hidden, self.slots = self._make(slots, cfg.expert_dim, narrow=True), self._make(slots, cfg.dim)
        self.chosen = torch.zeros(count, cfg.n_experts_per_tok, dtype=torch.int32, device=self.device)
        self.weights = self._make(count, cfg.n_experts_per_tok)
        self.logits = self._make(count, cfg.vocab_size)

    def _make(self, *shape: int, narrow: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype if narrow else self.wide, device=self.device)


def injection_of(model: OpenMythos, state: RowState) -> Injection:
    """Parameters around the block, beside the rows' state."""
    loop, cfg = model.recurrent, model.cfg
    dtype = wide(model.embed.weight.dtype)
    weights: dict[str, Tensor] = {
        "loop_norm": loop.norm.weight,
        "log_A": loop.injection.log_A,
        "log_dt": loop.injection.log_dt,
        "B": loop.injection.B,
    }
    norms = {"input_norm": model.input_norm, "update_norm": loop.update_norm, "state_norm": loop.state_norm}
    weights |= {name: norm.weight for name, norm in norms.items() if isinstance(norm, nn.RMSNorm)}
    if loop.lora is not None:
        lora = loop.lora
        weights |= {"lora_down": lora.down.weight, "lora_B": lora.B, "lora_scale": lora.scale.weight}
    if cfg.halting == "select":
        weights |= {"halt": loop.act.halt.weight, "halt_bias": loop.act.halt.bias}
    if loop.loop_dim:
        exponent = torch.arange(0, loop.loop_dim, 2, device=state.h.device, dtype=dtype) / loop.loop_dim
        weights["sines"] = 10000.0**-exponent
    x = torch.zeros(state.h.shape, dtype=dtype, device=state.h.device)
    return Injection(
        state.e, state.h, state.before, state.chosen, x, state.mass, state.running.view(torch.int8),
        {name: tensor.detach() for name, tensor in weights.items()},
        loop_dim=loop.loop_dim, keep=cfg.block_output == "state",
        still=1 - HaltingWeights(cfg).threshold if cfg.halting == "select" else None,
        at_input=cfg.initial_state == "prelude", limits=(LTIInjection.LOW, LTIInjection.HIGH), eps=cfg.norm_eps,
    )  # fmt: skip
