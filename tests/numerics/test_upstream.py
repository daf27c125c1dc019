"""The preset `MythosConfig.upstream` against upstream 0.5.0 itself, in a subprocess with the same weights.

Upstream rotates queries and keys in float32 even in a float64 model. For the float64 comparison the
subprocess replaces its two rotary functions, and nothing else, by the same ones in float64; the float32
comparison is with upstream as released.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from open_mythos import KVCache, OpenMythos
from open_mythos.weights import load_upstream, to_upstream_state_dict
from open_mythos.weights.upstream import from_upstream_state_dict

pytestmark = pytest.mark.upstream

WORKER = Path(__file__).with_name("upstream_worker.py")
CASES = [
    (attn, threshold, loops)
    for attn in ("gqa", "mla")
    for threshold in (0.5, 0.99, 1.5)
    for loops in (1, 3, 8)
]
ROPE_THETA = 10000.0


@pytest.fixture(scope="module")
def runs(upstream_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what upstream computed, for all cases at once."""
    out = tmp_path_factory.mktemp("upstream")
    command = [sys.executable, str(WORKER), str(upstream_dir), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def fields_of(threshold: float) -> dict[str, Any]:
    """What the float64 weights do not tell, having no rotary tables."""
    return {"act_threshold": threshold, "rope_theta": ROPE_THETA, "n_heads": 4}


def ours(runs: Path, attn: str, threshold: float) -> OpenMythos:
    return load_upstream(runs / f"{attn}.state.safetensors", fields_of(threshold))


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize(("attn", "threshold", "loops"), CASES)
def test_forward_and_gradients_in_float64(runs: Path, attn: str, threshold: float, loops: int):
    theirs = load_file(runs / f"{attn}.{threshold}.{loops}.safetensors")
    model = ours(runs, attn, threshold)
    logits = model(theirs["ids"], n_loops=loops)
    assert worst(logits, theirs["logits"]) <= 1e-10
    (logits * theirs["probe"]).sum().backward()
    grads = {name.removeprefix("grad."): t for name, t in theirs.items() if name.startswith("grad.")}
    grads["recurrent.block.ffn.router_bias"] = torch.zeros(model.cfg.n_experts)
    converted = from_upstream_state_dict(grads, model.cfg)
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert worst(found, converted[name]) <= 1e-8, name
    assert sum(float(t.abs().sum()) > 0 for t in converted.values()) >= len(converted) - 3


@pytest.mark.parametrize("kind", ["dict", "cache"])
@pytest.mark.parametrize(("attn", "threshold", "loops"), CASES)
def test_cached_decode_in_float64(runs: Path, attn: str, threshold: float, loops: int, kind: str):
    theirs = load_file(runs / f"{attn}.{threshold}.{loops}.safetensors")
    model, ids = ours(runs, attn, threshold), theirs["ids"]
    cache: Any = {} if kind == "dict" else KVCache()
    with torch.no_grad():
        parts = [model(ids[:, :6], n_loops=loops, kv_cache=cache)]
        parts += [
            model(ids[:, i : i + 1], n_loops=loops, kv_cache=cache, start_pos=i)
            for i in range(6, ids.shape[1])
        ]
    assert worst(torch.cat(parts, 1), theirs["decoded"]) <= 1e-10


@pytest.mark.parametrize("loops", [1, 3, 8])
@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_forward_in_float32_as_released(runs: Path, attn: str, loops: int):
    theirs = load_file(runs / f"{attn}.float32.safetensors")
    model = load_upstream(runs / f"{attn}.float32.state.safetensors", {"act_threshold": 0.99})
    with torch.no_grad():
        logits = model(theirs["ids"], n_loops=loops)
    scale = float(theirs[str(loops)].abs().max())
    assert worst(logits, theirs[str(loops)]) <= 1e-5 * scale


@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_a_training_checkpoint_with_its_config_object(runs: Path, attn: str):
    model = load_upstream(runs / f"{attn}.pt")
    plain = load_upstream(runs / f"{attn}.float32.state.safetensors", {"act_threshold": 0.99})
    assert model.cfg.rope_theta == plain.cfg.rope_theta == ROPE_THETA
    assert model.cfg.max_seq_len == 24
    ids = torch.arange(8).view(1, 8)
    assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("attn", ["gqa", "mla"])
def test_export_gives_upstreams_state_dict_back_to_the_bit(runs: Path, attn: str):
    theirs = load_file(runs / f"{attn}.float32.state.safetensors")
    back = to_upstream_state_dict(load_upstream(theirs, {"act_threshold": 0.99}))
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name


def broken(state: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state with one mistake each that a wrong conversion would make."""
    name = "recurrent.block.ffn.routed_experts.0"
    gate, up = state[f"{name}.gate.weight"], state[f"{name}.up.weight"]
    yield "gate and up swapped", {**state, f"{name}.gate.weight": up, f"{name}.up.weight": gate}
    name = "prelude.0.attn.wq.weight"
    yield "one query row moved", {**state, name: state[name].roll(1, 0)}


def test_the_comparison_sees_a_wrong_conversion(runs: Path):
    theirs = load_file(runs / "gqa.0.99.3.safetensors")
    state = load_file(runs / "gqa.state.safetensors")
    for what, wrong in broken(state):
        with torch.no_grad():
            logits = load_upstream(wrong, fields_of(0.99))(theirs["ids"], n_loops=3)
        assert worst(logits, theirs["logits"]) > 1e-3, what
