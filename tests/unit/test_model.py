"""The model as an object: dtypes, devices, copies, state dicts, modes, initialisation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos import (
    KVCache,
    MythosConfig,
    OpenMythos,
    from_pretrained,
    precompute_rope_freqs,
    save_pretrained,
)
from open_mythos.model.layers import apply_rope, rope_table
from recorded import Operators

ATTENTION = ("gqa", "mla")


def config(attn_type: str = "mla", **changes: Any) -> MythosConfig:
    sizes = {
        "vocab_size": 31, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "max_loop_iters": 4,
        "prelude_layers": 1, "coda_layers": 1, "attn_type": attn_type, "kv_lora_rank": 8, "q_lora_rank": 12,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6, "n_experts": 4, "n_shared_experts": 1,
        "n_experts_per_tok": 4, "expert_dim": 8, "lora_rank": 2,
    }  # fmt: skip
    return MythosConfig(**{**sizes, **changes})


def build(attn_type: str = "mla", seed: int = 0, **changes: Any) -> OpenMythos:
    torch.manual_seed(seed)
    return OpenMythos(config(attn_type, **changes))


def some_ids(*shape: int) -> Tensor:
    return torch.randint(0, 31, shape or (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_every_dtype_runs_forward_backward_cache_and_generation(attn_type: str, dtype: torch.dtype) -> None:
    ids = some_ids()
    exact = build(attn_type).double().eval()(ids, 4).detach()
    model = build(attn_type).to(dtype).eval()
    out = model(ids, 4)
    assert out.dtype == dtype
    atol = {torch.bfloat16: 0.25, torch.float16: 0.03, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.detach().double(), exact, rtol=0, atol=atol)
    model.train()(ids, 4).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == dtype, name
        assert bool(parameter.grad.isfinite().all()), name
    assert model.generate(ids, max_new_tokens=3, n_loops=2).shape == (2, 12)


def test_dtypes_by_method_and_back_again() -> None:
    model = build()
    before = model.state_dict()["embed.weight"].clone()
    assert model.half()(some_ids(), 1).dtype == torch.float16
    assert model.float()(some_ids(), 1).dtype == torch.float32
    assert torch.equal(model.embed.weight, before.half().float())
    assert model.double()(some_ids(), 1).dtype == torch.float64


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_a_model_made_under_another_default_dtype(default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    try:
        model = OpenMythos(config())
        assert model(some_ids(), 2).dtype == default
        assert model.recurrent.block.ffn.router_bias.dtype == torch.float32  # type: ignore[union-attr]
    finally:
        torch.set_default_dtype(torch.float32)


def test_meta_construction_and_materialisation() -> None:
    with torch.device("meta"):
        model = OpenMythos(config())
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())
    assert build().to("meta").embed.weight.is_meta
    model.to_empty(device="cpu")
    assert model.head.weight is model.embed.weight
    model.load_state_dict(build().state_dict())
    assert torch.equal(model(some_ids(), 3), build()(some_ids(), 3))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_reset_parameters_leaves_nothing_of_what_was_there(attn_type: str) -> None:
    with torch.device("meta"):
        model = OpenMythos(config(attn_type, state_norm=True, update_norm=True))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    fresh = build(attn_type, state_norm=True, update_norm=True)
    for each in (model, fresh):
        torch.manual_seed(0)
        each.reset_parameters()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
        assert not (tensor == 7).any(), name


def test_deepcopy_is_independent_and_tied() -> None:
    model = build()
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embed.weight
    assert twin.embed.weight is not model.embed.weight
    assert torch.equal(twin(some_ids(), 3), model(some_ids(), 3))
    with torch.no_grad():
        twin.embed.weight.zero_()
    assert model.embed.weight.any()


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False}, {"lora_rank": 0, "state_norm": True}], ids=str
)
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_state_dict_round_trip(attn_type: str, changes: dict[str, Any]) -> None:
    model, other = build(attn_type, **changes), build(attn_type, seed=1, **changes)
    for _ in range(2):
        model(some_ids(), 2)  # the balancing state belongs to it
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert state["recurrent.block.ffn.expert_load"].any()
    report = other.load_state_dict(state)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert torch.equal(other.eval()(some_ids(), 3), model.eval()(some_ids(), 3))
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_positions_are_not_in_the_state_dict_and_a_million_cost_nothing() -> None:
    with Operators() as many:
        model = OpenMythos(config(max_seq_len=1_000_000, rope_theta=config().rope_theta))
    with Operators() as few:
        small = build()
    assert many.calls
    assert many.calls == few.calls
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert not [name for name in shapes if "rope" in name or "freq" in name]
    assert [n for n, _ in small.named_buffers()] == [
        "recurrent.block.ffn.router_bias",
        "recurrent.block.ffn.expert_load",
    ]
    small.load_state_dict(model.state_dict())
    assert torch.equal(small(some_ids(), 2), model(some_ids(), 2))


# Rotary positions.


def test_rope_turns_pairs_by_position() -> None:
    x = torch.randn(1, 5, 2, 6, dtype=torch.float64)
    positions = torch.tensor([[0, 3, 4, 10, 1000]])
    out = apply_rope(x, rope_table(positions, 6, 50.0, torch.float64))
    torch.testing.assert_close(out[:, 0], x[:, 0])
    for s, position in enumerate(positions[0].tolist()):
        for i in range(3):
            angle = torch.full((2,), position * 50.0 ** (-2 * i / 6), dtype=torch.float64)
            turn = torch.polar(torch.ones_like(angle), angle)
            pair = torch.complex(x[0, s, :, i], x[0, s, :, i + 3]) * turn
            torch.testing.assert_close(out[0, s, :, i], pair.real)
            torch.testing.assert_close(out[0, s, :, i + 3], pair.imag)


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(a: int, b: int) -> Tensor:
        tables = [rope_table(torch.tensor([[p]]), 8, 10000.0, torch.float64) for p in (a, b)]
        return (apply_rope(q, tables[0]) * apply_rope(k, tables[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100))
    assert (score(7, 3) - score(8, 3)).abs() > 1e-3


def test_rope_keeps_dtype_and_the_published_table() -> None:
    table = precompute_rope_freqs(8, 5, 10000.0)
    assert torch.equal(table, rope_table(torch.arange(5)[None], 8, 10000.0))
    assert apply_rope(torch.randn(1, 5, 1, 8).bfloat16(), table).dtype == torch.bfloat16


# Modes.


def test_forward_leaves_the_mode_and_the_generator_alone_in_evaluation() -> None:
    model = build(initial_state="random", dropout=0.3).eval()
    state = torch.get_rng_state()
    first = model(some_ids(), 3)
    assert torch.equal(first, model(some_ids(), 3))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert not torch.equal(model(some_ids(), 3), model(some_ids(), 3))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_dropout_acts_in_training_only(attn_type: str) -> None:
    model = build(attn_type, dropout=0.5)
    assert torch.equal(model.eval()(some_ids(), 2), build(attn_type).eval()(some_ids(), 2))
    model.train()
    assert not torch.equal(model(some_ids(), 2), model(some_ids(), 2))


def test_int32_ids_and_default_loops() -> None:
    model = build().eval()
    assert torch.equal(model(some_ids().int()), model(some_ids(), 4))
    assert torch.equal(model(some_ids(), n_loops=None), model(some_ids(), 4))
    assert not torch.equal(model(some_ids(), 40), model(some_ids(), 4))


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 9), torch.ones(2, 9, dtype=torch.bool), torch.full((2, 9), 7)]
)
def test_a_mask_of_any_type_without_padding_changes_nothing(mask: Tensor) -> None:
    model = build().double().eval()
    torch.testing.assert_close(
        model(some_ids(), 2, attention_mask=mask), model(some_ids(), 2), rtol=0, atol=1e-12
    )


def test_forward_composes_prelude_step_and_coda() -> None:
    model, ids = build(halting="off").eval(), some_ids()
    e = model.prelude(ids)
    h = model.initial_state(e)
    for t in range(3):
        h = model.step(h, e, t)
    assert torch.equal(model.coda(h), model(ids, 3))
    assert not model.initial_state(e).any()
    assert torch.equal(build(initial_state="prelude").initial_state(e), e)


@torch.no_grad()
def test_the_scaled_initialisation_has_unit_scale_everywhere() -> None:
    """Embeddings, injected input and logits: each about one at initialisation, at any width."""
    for dim in (32, 128):
        model, ids = build(dim=dim).eval(), some_ids(8, 32)
        assert (model.embed(ids) * dim**0.5).std() == pytest.approx(1.0, abs=0.1)
        assert model.prelude(ids).square().mean() == pytest.approx(1.0, abs=0.05)
        assert 0.5 < model(ids, 4).std() < 2
    torch.manual_seed(3)
    model = OpenMythos(config(dim=128, expert_dim=64))
    assert model.recurrent.block.ffn.w_in.std() == pytest.approx(128**-0.5, rel=0.05)  # type: ignore[union-attr]
    assert model.recurrent.block.ffn.w_out.std() == pytest.approx(64**-0.5, rel=0.05)  # type: ignore[union-attr]
    upstream = OpenMythos(
        MythosConfig.upstream(**{n: getattr(model.cfg, n) for n in ("vocab_size", "dim", "n_heads")})
    )
    assert upstream.recurrent.block.ffn.w_in.std() == pytest.approx(0.02, rel=0.05)  # type: ignore[union-attr]


def test_the_same_seed_gives_the_same_model_and_training() -> None:
    runs = []
    for _ in range(2):
        model = build(dropout=0.1, initial_state="random")
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for _ in range(3):
            optimiser.zero_grad()
            model(some_ids(), 3).square().mean().backward()
            optimiser.step()
        runs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_deep_state_stays_bounded() -> None:
    """Two hundred loops: no overflow, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = build().to(dtype).eval()
        with torch.no_grad():
            assert model(some_ids(), 200).isfinite().all()


def test_autocast_matches_the_full_precision_model() -> None:
    for attn_type in ATTENTION:
        model = build(attn_type).eval()
        with torch.no_grad():
            exact = model(some_ids(), 3)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                cache = KVCache()
                near = torch.cat([model(part, 3, cache) for part in some_ids().split(3, 1)], 1)
        torch.testing.assert_close(near.float(), exact, rtol=0, atol=0.3)


def test_numpy_counts_are_loop_counts() -> None:
    model = build()
    for n_loops in np.arange(1, 3):
        assert torch.equal(model(some_ids(), n_loops), model(some_ids(), int(n_loops)))
    for bad in (np.int64(0), np.float64(2.0), np.bool_(True), np.array([1, 2])):
        with pytest.raises(ValueError, match=r"^n_loops = .* is not allowed: it must be a whole number"):
            model(some_ids(), bad)


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns about its own doings
def test_the_compiled_model_computes_the_same() -> None:
    """Traced, not lowered: what a compiler sees must be free of what it cannot take."""
    model = build("gqa")
    ids = torch.randint(0, model.cfg.vocab_size, (2, 6))
    plain = model(ids, n_loops=2)
    compiled = torch.compile(model, backend="aot_eager")(ids, n_loops=2)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def test_extra_loops_run_before_the_asked_ones_while_training() -> None:
    """The state is the one after all loops, and each number comes up."""
    torch.manual_seed(0)
    model = build(extra_loops=1.0, halting="off").double()
    plain = build(extra_loops=0.0, halting="off").double()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, model.cfg.vocab_size, (2, 5))
    seen = []
    for _ in range(24):
        model.train()
        logits = model(ids, 3)
        totals = [plain.eval()(ids, 3 + extra) for extra in range(4)]
        seen.append([bool(torch.allclose(logits, total, atol=1e-12)) for total in totals].index(True))
        with torch.no_grad():
            torch.testing.assert_close(model(ids, 3), totals[0])
        model.recurrent.block.ffn.router_bias.copy_(plain.recurrent.block.ffn.router_bias)
    assert set(seen) == {0, 1, 2, 3}
    torch.testing.assert_close(model.eval()(ids, 3), plain(ids, 3))


def test_a_training_loop_resumed_from_a_state_dict_draws_the_same_extra_loops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = build(extra_loops=4.0)
    fresh = list(whole.state_dict())
    ids = torch.randint(0, whole.cfg.vocab_size, (2, 5))

    def train(model: OpenMythos, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(ids, 2).square().mean().backward()
            optimizer.step()

    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    train(whole, optimizer, 3)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    save_pretrained(whole, tmp_path / "model")
    train(whole, optimizer, 5)
    resumed = build(extra_loops=4.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1), 5)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    # Weights to use are weights alone.
    assert list(from_pretrained(tmp_path / "model").state_dict()) == fresh


def test_a_recomputation_runs_as_many_extra_loops_as_its_pass() -> None:
    torch.manual_seed(0)
    model = build(extra_loops=4.0).double()
    ids = torch.randint(0, model.cfg.vocab_size, (2, 5))
    gradients = []
    for recomputed in (False, True):
        same = copy.deepcopy(model)
        logits = checkpoint(same, ids, 2, use_reentrant=False) if recomputed else same(ids, 2)
        logits.square().sum().backward()
        gradients.append(same.recurrent.norm.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
