"""Compiled, recomputed and lowered steps against the plain one; how often a step is compiled.

The compiler's own backend is tested on a GPU (test_gpu_training.py), where it is for; here its graphs run plainly.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos.config import ConfigError, MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.training.acceleration import accelerate, lowered
from open_mythos.training.objective import LoopPlan, Objective

# The compiler itself warns, of tensors it looks at and of its own deprecated parts.
pytestmark = pytest.mark.filterwarnings("ignore")


def build(attn_type: str = "gqa", **changes: Any) -> Objective:
    fields: dict[str, Any] = {
        "vocab_size": 17, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "attn_type": attn_type, "prelude_layers": 2,
        "coda_layers": 2, "n_experts": 4, "n_experts_per_tok": 2, "n_shared_experts": 1, "expert_dim": 8,
        "lora_rank": 2, "max_loop_iters": 4, "max_seq_len": 16, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    objective = Objective(OpenMythos(MythosConfig(**{**fields, **changes}))).train()
    with torch.no_grad():  # nothing at its starting value, where an error could hide
        for p in objective.parameters():
            p += 0.05 * torch.randn_like(p)
    return objective


def batch(device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 17, (2, 12), generator=generator).to(device)
    return {"ids": ids, "targets": ids.roll(-1, 1)}


def run(objective: Objective, plan: LoopPlan, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    objective.zero_grad()
    with lowered(objective, dtype):
        loss = objective(batch(), plan)
        loss.backward()
    grads = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_recomputed_loops_equal_kept_ones(attn_type: str) -> None:
    plain = build(attn_type).double()
    again = copy.deepcopy(plain)
    accelerate(again, recompute="loop")
    for plan in (LoopPlan(0, 3), LoopPlan(2, 2)):
        assert_same(run(again, plan), run(plain, plan), 1e-12)
    load, twice = (o.model.recurrent.block.ffn.expert_load for o in (plain, again))
    assert torch.equal(twice, 2 * load), "counts grow alike, so that every share stays as it was"


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_one_graph_for_any_number_of_loops(attn_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, the step equals the plain one; once with and once without gradients, whatever is asked."""
    compiled: list[str] = []
    real = torch.compile

    def eager(function: Any, **options: Any) -> Any:
        def backend(graph: Any, inputs: list[Tensor]) -> Any:
            compiled.append(function.__name__)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        return real(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", eager)
    torch._dynamo.reset()
    plain = build(attn_type).double()
    fast = copy.deepcopy(plain)
    accelerate(fast, compile=True)
    for plan in (LoopPlan(0, 1), LoopPlan(2, 3), LoopPlan(1, 2), LoopPlan(17, 5)):
        assert_same(run(fast, plan), run(plain, plan), 1e-10)
    fast.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(batch(), LoopPlan(0, 64)), plain.eval()(batch(), LoopPlan(0, 64)))
    counts = {name: compiled.count(name) for name in compiled}
    torch._dynamo.reset()
    # A third: evaluation mode, which counts no loads, is another program.
    assert counts["forward"] <= 3 + 4 * 2, counts


@pytest.mark.parametrize("recompute", ["none", "loop"])
def test_lowered_matrices_train_the_originals(recompute: str) -> None:
    exact = run(build(), LoopPlan(1, 3))
    objective = build()
    accelerate(objective, recompute=recompute)
    before = dict(objective.named_parameters())
    got = run(objective, LoopPlan(1, 3), torch.bfloat16)
    assert abs(got["loss"] - exact["loss"]) < 0.05
    assert got.keys() == exact.keys()
    assert all(value.dtype == torch.float32 for value in got.values())
    ours, theirs = (torch.cat([g.flatten() for n, g in r.items() if n != "loss"]) for r in (got, exact))
    assert (ours - theirs).norm() < 0.15 * theirs.norm()
    after = dict(objective.named_parameters())
    assert all(after[name] is p for name, p in before.items())


def test_lowered_keeps_vectors_and_buffers_and_survives_an_error() -> None:
    objective = build()
    injection, moe = objective.model.recurrent.injection, objective.model.recurrent.block.ffn

    def fails() -> None:
        with lowered(objective, torch.bfloat16):
            assert {p.dtype for p in injection.parameters()} == {torch.float32}
            assert (moe.router_bias.dtype, moe.w_in.dtype) == (torch.float32, torch.bfloat16)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert all(p.dtype == torch.float32 for p in objective.parameters())


def test_a_tied_head_is_lowered_once() -> None:
    objective = build(tie_embeddings=True)
    with lowered(objective, torch.bfloat16):
        assert objective.model.head.weight is objective.model.embed.weight
    got = run(objective, LoopPlan(0, 1), torch.bfloat16)
    assert got["model.embed.weight"].dtype == torch.float32


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match="recompute = 'all' is not allowed"):
        accelerate(build(), recompute="all")
    with pytest.raises(ConfigError, match="recompute = 'selective' is not allowed"):
        accelerate(build(), recompute="selective")
