"""The reference models of the benchmarks. Only plain values: the release under test reads them too."""

from __future__ import annotations

from typing import Any

CONFIG_S: dict[str, Any] = {
    "vocab_size": 4096, "dim": 512, "n_heads": 8, "max_seq_len": 512, "max_loop_iters": 8, "prelude_layers": 1,
    "coda_layers": 1, "attn_type": "mla", "kv_lora_rank": 128, "q_lora_rank": 256, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64, "v_head_dim": 64, "n_experts": 16, "n_experts_per_tok": 4, "expert_dim": 256,
    "n_shared_experts": 1, "lora_rank": 8,
}  # fmt: skip
CONFIG_M: dict[str, Any] = {
    "vocab_size": 50304, "dim": 768, "n_heads": 12, "n_kv_heads": 4, "max_seq_len": 1024, "max_loop_iters": 8,
    "prelude_layers": 2, "coda_layers": 2, "kv_lora_rank": 256, "q_lora_rank": 384, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64, "v_head_dim": 64, "n_experts": 16, "n_experts_per_tok": 4, "n_shared_experts": 1,
    "expert_dim": 768, "lora_rank": 8,
}  # fmt: skip
# To try a benchmark of M where there is no GPU.
TOY: dict[str, Any] = {
    **CONFIG_M, "vocab_size": 96, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "kv_lora_rank": 32,
    "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_experts": 4,
    "n_experts_per_tok": 2, "expert_dim": 32,
}  # fmt: skip
