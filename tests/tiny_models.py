"""Sizes of the tiny models that several test files share; `pythonpath` in pyproject.toml lets tests import them.

A file that needs another size merges its own into one of these, so that what it needs it for stands out.
"""

from __future__ import annotations

from typing import Any

import torch

from open_mythos import MythosConfig, OpenMythos

# Every part of the model is there, in the smallest form that is not a special case.
TINY: dict[str, Any] = {
    "vocab_size": 13,
    "dim": 16,
    "n_heads": 2,
    "n_kv_heads": 1,
    "max_seq_len": 40,
    "max_loop_iters": 4,
    "prelude_layers": 1,
    "coda_layers": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_experts": 4,
    "n_experts_per_tok": 2,
    "n_shared_experts": 1,
    "expert_dim": 8,
    "lora_rank": 2,
}
# Wider, and with several heads to a key head: states of tokens differ enough for exit rules to tell them apart.
SMALL: dict[str, Any] = {
    "vocab_size": 23,
    "dim": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 48,
    "max_loop_iters": 5,
    "prelude_layers": 1,
    "coda_layers": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_experts": 4,
    "n_experts_per_tok": 2,
    "n_shared_experts": 1,
    "expert_dim": 16,
    "lora_rank": 4,
}
# Widths that are no multiple of a vector, so that kernels meet the ends of rows.
ODD: dict[str, Any] = {
    "vocab_size": 61,
    "dim": 72,
    "n_heads": 3,
    "n_kv_heads": 3,
    "max_seq_len": 64,
    "max_loop_iters": 3,
    "prelude_layers": 1,
    "coda_layers": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 25,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 11,
    "v_head_dim": 9,
    "n_experts": 6,
    "n_experts_per_tok": 2,
    "n_shared_experts": 1,
    "expert_dim": 37,
    "lora_rank": 4,
}


def halting_model(sizes: dict[str, Any], seed: int = 0) -> OpenMythos:
    """A model in float64 whose tokens halt at different loops: a fresh halting head says the same of each."""
    torch.manual_seed(seed)
    model = OpenMythos(MythosConfig(**sizes)).double().eval()
    with torch.no_grad():
        model.recurrent.act.halt.weight.normal_(std=0.1)
        model.recurrent.act.halt.bias.fill_(-1.5)
    return model
