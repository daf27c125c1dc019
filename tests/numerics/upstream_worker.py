"""Run upstream OpenMythos 0.5.0 in a process of its own and write down what it computes.

Usage: python upstream_worker.py UPSTREAM_DIR OUT_DIR. Its import name is ours, hence the separate process;
its package imports transformers, hence main.py alone is loaded. Nothing of this repository is imported here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LOOPS = (1, 3, 8)
THRESHOLDS = (0.5, 0.99, 1.5)
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 24,
    "max_loop_iters": 5,
    "prelude_layers": 2,
    "coda_layers": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 7,
    "n_experts": 5,
    "n_shared_experts": 2,
    "n_experts_per_tok": 2,
    "expert_dim": 12,
    "rope_theta": 10000.0,
    "lora_rank": 3,
}


def load(folder: Path) -> types.ModuleType:
    """Upstream's main.py under the name that its pickles refer to."""
    package = types.ModuleType("open_mythos")
    package.__path__ = []
    sys.modules["open_mythos"] = package
    spec = importlib.util.spec_from_file_location("open_mythos.main", folder / "open_mythos" / "main.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["open_mythos.main"] = module
    spec.loader.exec_module(module)
    return module


def make_double(upstream: types.ModuleType) -> None:
    """Upstream rotates in float32 whatever the dtype. These two functions do the same in float64."""

    def precompute_rope_freqs(dim: int, max_len: int, theta: float = 500000.0) -> torch.Tensor:
        freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        angles = torch.outer(torch.arange(max_len, dtype=torch.float64), freqs)
        return torch.polar(torch.ones_like(angles), angles)

    def apply_rope(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis[None, :, None]).flatten(-2).to(x.dtype)

    upstream.precompute_rope_freqs = precompute_rope_freqs
    upstream.apply_rope = apply_rope


def build(upstream: types.ModuleType, attn_type: str, dtype: torch.dtype) -> Any:
    """A model in which every tensor matters: nothing is zero, one, or too small to be seen."""
    torch.manual_seed(1)
    model = upstream.OpenMythos(upstream.MythosConfig(**SIZES, attn_type=attn_type))
    if dtype == torch.float64:
        model.double()  # never .to(dtype): that makes upstream's complex tables real
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.recurrent.act.halt.bias.fill_(-1.5)
        model.recurrent.block.ffn.router_bias.normal_(std=0.3)
    return model.eval()


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Contiguous copies, because safetensors takes no views and no shared memory."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


def gradients(model: Any, ids: torch.Tensor, probe: torch.Tensor, loops: int) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of Σ probe · logits by every parameter."""
    model.zero_grad(set_to_none=True)
    logits = model(ids, n_loops=loops)
    (logits * probe).sum().backward()
    found = {"logits": logits}
    for name, parameter in model.named_parameters():
        found[f"grad.{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def decode(model: Any, ids: torch.Tensor, prompt: int, loops: int) -> torch.Tensor:
    """Logits of a prompt and then of one token at a time through upstream's cache."""
    cache: dict[str, Any] = {}
    parts = [model(ids[:, :prompt], n_loops=loops, kv_cache=cache)]
    steps = range(prompt, ids.shape[1])
    parts += [model(ids[:, i : i + 1], n_loops=loops, kv_cache=cache, start_pos=i) for i in steps]
    return torch.cat(parts, 1)


def main(folder: Path, out: Path) -> None:
    """Every case, first as upstream is, then in double precision."""
    upstream = load(folder)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(2))
    for attn_type in ("gqa", "mla"):
        model = build(upstream, attn_type, torch.float32)
        model.cfg.act_threshold = 0.99
        save(out / f"{attn_type}.float32.state.safetensors", model.state_dict())
        with torch.no_grad():
            logits = {str(loops): model(ids, n_loops=loops) for loops in LOOPS}
        save(out / f"{attn_type}.float32.safetensors", {"ids": ids, **logits})
        torch.save({"step": 3, "model": model.state_dict(), "cfg": model.cfg}, out / f"{attn_type}.pt")
    make_double(upstream)
    for attn_type in ("gqa", "mla"):
        model = build(upstream, attn_type, torch.float64)
        probe = torch.randn(2, 11, SIZES["vocab_size"], dtype=torch.float64)
        state = model.state_dict()  # safetensors has no complex128
        weights = {name: tensor for name, tensor in state.items() if not tensor.is_complex()}
        save(out / f"{attn_type}.state.safetensors", weights)
        for threshold in THRESHOLDS:
            model.cfg.act_threshold = threshold
            for loops in LOOPS:
                found = gradients(model, ids, probe, loops)
                with torch.no_grad():
                    found["decoded"] = decode(model, ids, 6, loops)
                path = out / f"{attn_type}.{threshold}.{loops}.safetensors"
                save(path, {"ids": ids, "probe": probe, **found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
