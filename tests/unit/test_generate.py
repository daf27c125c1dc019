"""Generation: sampling, end of text, streaming, seeds, modes. Padding and exactness: test_equivalence.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import EveryLoop, LastLoop, MythosConfig, OpenMythos, generate, stream
from open_mythos.inference.generate import sample

V = 29


def build(seed: int = 0, **changes: Any) -> OpenMythos:
    sizes = {
        "vocab_size": V, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32, "max_loop_iters": 3,
        "prelude_layers": 1, "coda_layers": 1, "attn_type": "gqa", "n_experts": 4, "n_shared_experts": 1,
        "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    return OpenMythos(MythosConfig(**{**sizes, **changes}))


IDS = torch.randint(0, V, (3, 5), generator=torch.Generator().manual_seed(0))


# Sampling.


def frequencies(logits: list[float], **settings: Any) -> Tensor:
    drawn = sample(torch.tensor(logits).repeat(20_000, 1), **settings)
    return torch.bincount(drawn, minlength=len(logits)) / 20_000


LOGITS = [0.0, 1.0, 2.0, 0.5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    expected = (torch.tensor(LOGITS) / temperature).softmax(0)
    torch.testing.assert_close(frequencies(LOGITS, temperature=temperature), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-3, 1e-30, 1e-300])
def test_low_temperatures_take_the_likeliest(temperature: float) -> None:
    assert frequencies([100.0, 3.0, 5e4, -7.0], temperature=temperature).tolist() == [0, 0, 1, 0]


def test_a_huge_temperature_is_uniform() -> None:
    expected = torch.full((4,), 0.25)
    torch.testing.assert_close(frequencies(LOGITS, temperature=1e300), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_the_k_likeliest(top_k: int) -> None:
    got = frequencies(LOGITS, top_k=top_k)
    kept = torch.tensor(LOGITS).topk(top_k).indices
    expected = torch.zeros(4).index_put((kept,), torch.tensor(LOGITS)[kept].softmax(0))
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("top_k", [None, 0, 4, 50, 10**9])
def test_top_k_beyond_the_vocabulary_keeps_all(top_k: int | None) -> None:
    assert (frequencies(LOGITS, top_k=top_k) > 0).all()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [2]), (0.5, [2]), (0.7, [1, 2]), (0.85, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, kept: list[int]) -> None:
    """The probabilities are .076, .207, .564 and .126."""
    got = frequencies(LOGITS, top_p=top_p)
    assert got.nonzero().flatten().tolist() == kept
    share = torch.tensor(LOGITS).softmax(0)[kept]
    torch.testing.assert_close(got[kept], share / share.sum(), rtol=0, atol=0.02)


def test_top_p_comes_after_top_k() -> None:
    assert frequencies(LOGITS, top_k=2, top_p=0.75).nonzero().flatten().tolist() == [1, 2]
    assert frequencies(LOGITS, top_k=2, top_p=0.7).nonzero().flatten().tolist() == [2]


# The loop around it.


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_p": 0.8, "top_k": 7}], ids=str
)
@pytest.mark.parametrize("policy", [None, EveryLoop(), LastLoop()])
def test_streaming_equals_generation(policy: Any, settings: dict[str, Any]) -> None:
    model = build()
    whole = generate(model, IDS, 6, 2, cache_policy=policy, **settings)
    steps = list(stream(model, IDS, 6, 2, cache_policy=policy, **settings))
    assert all(step.shape == (3,) and step.dtype == torch.int64 for step in steps)
    assert torch.equal(torch.cat((IDS, torch.stack(steps, 1)), 1), whole)
    assert torch.equal(model.generate(IDS, 6, 2, cache_policy=policy, **settings), whole)


def test_seeds_fix_the_draws_and_leave_the_default_generator_alone() -> None:
    model, state = build(), torch.get_rng_state()
    a, b, c = (model.generate(IDS, max_new_tokens=10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    d = model.generate(IDS, max_new_tokens=10)
    torch.manual_seed(9)
    assert torch.equal(model.generate(IDS, max_new_tokens=10), d)
    assert not torch.equal(model.generate(IDS, max_new_tokens=10), d)


def test_rows_are_drawn_independently() -> None:
    out = build().generate(IDS[:1].expand(20, -1), max_new_tokens=8, seed=0)
    assert len({tuple(row) for row in out.tolist()}) > 10


def test_loops_are_taken_per_call() -> None:
    model, loops = build(), []
    model.recurrent.register_forward_pre_hook(lambda _, args: loops.append(args[2]))
    for n_loops in (1, 3, None, 5):
        loops.clear()
        model.generate(IDS, 2, n_loops)
        assert loops == [*range(n_loops or 3)] * 2


def test_no_new_tokens_gives_the_prompt_back_and_the_longest_fits() -> None:
    model = build()
    assert torch.equal(model.generate(IDS, max_new_tokens=0), IDS)
    assert model.generate(IDS, max_new_tokens=28, n_loops=1).shape == (3, 33)
    full = torch.zeros(1, 32, dtype=torch.long)
    assert model.generate(full, max_new_tokens=1, n_loops=1).shape == (1, 33)


def test_the_vocabulary_may_be_smaller_than_the_default_top_k() -> None:
    assert build().generate(IDS, max_new_tokens=2, n_loops=1).shape == (3, 7)


# End of text.


class Scripted(OpenMythos):
    """Says token ``script[row][step]``, whatever it is fed."""

    script: Tensor
    fed: int

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        said = self.script[:, self.fed]
        self.fed += 1
        return torch.nn.functional.one_hot(said, V).float()[:, None].expand(-1, input_ids.shape[1], -1)


def scripted(script: list[list[int]], **changes: Any) -> Scripted:
    model = build(**changes)
    model.__class__ = Scripted
    model.script, model.fed = torch.tensor(script), 0  # type: ignore[assignment]
    return model  # type: ignore[return-value]


@pytest.mark.parametrize(("pad", "fill"), [(None, 7), (0, 0), (5, 5)])
def test_finished_rows_are_filled_and_all_finished_stops(pad: int | None, fill: int) -> None:
    script = [[1, 7, 2, 3, 9], [1, 2, 3, 7, 9], [7, 7, 1, 1, 9]]
    model = scripted(script, pad_token_id=pad)
    out = model.generate(IDS, max_new_tokens=5, temperature=0, eos_token_id=7)[:, 5:]
    assert out.tolist() == [[1, 7, fill, fill], [1, 2, 3, 7], [7, fill, fill, fill]]
    assert model.fed == 4


def test_the_configs_eos_is_the_default_and_without_one_nothing_stops() -> None:
    script = [[7, 1, 1]] * 3
    assert scripted(script, eos_token_id=7).generate(IDS, 3, temperature=0).shape == (3, 6)
    assert scripted(script, eos_token_id=7).generate(IDS, 3, temperature=0, eos_token_id=8).shape == (3, 8)
    assert scripted(script).generate(IDS, 3, temperature=0).shape == (3, 8)
    assert scripted(script).generate(IDS, 3, temperature=0, eos_token_id=7).shape == (3, 6)


# Modes.


def test_every_module_keeps_its_own_mode_and_dropout_is_off_meanwhile() -> None:
    model = build(dropout=0.5)
    evaluated = build(dropout=0.5).eval().generate(IDS, 6, temperature=0)
    model.train()
    model.recurrent.block.attn.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    assert torch.equal(model.generate(IDS, 6, temperature=0), evaluated)
    assert [module.training for module in model.modules()] == modes


def test_a_stream_gives_the_mode_back_between_steps_and_when_abandoned() -> None:
    model = build(dropout=0.5).train()
    steps = stream(model, IDS, 6, temperature=0)
    for _ in range(3):
        next(steps)
        assert all(module.training for module in model.modules())
    steps.close()
    assert all(module.training for module in model.modules())


def test_a_failure_gives_the_mode_back() -> None:
    model = build().train()
    model.recurrent.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(IDS, 2)
    assert all(module.training for module in model.modules())


def test_generation_builds_no_graph() -> None:
    model = build()
    assert not model.generate(IDS, 2).requires_grad
    assert torch.is_grad_enabled()
    step = next(stream(model, IDS, 2))
    assert torch.is_grad_enabled()
    assert not step.requires_grad


# Prompts.


def test_unequal_prompts_come_back_padded_on_the_left() -> None:
    out = build().generate([[1, 2, 3], torch.tensor([4]), (5, 6)], max_new_tokens=2, n_loops=1)
    assert out.shape == (3, 5)
    assert out[:, :3].tolist() == [[1, 2, 3], [0, 0, 4], [0, 5, 6]]


def test_int32_prompts_and_full_masks() -> None:
    model = build()
    a = model.generate(IDS, 4, temperature=0)
    assert torch.equal(model.generate(IDS.int(), 4, temperature=0), a)
    assert torch.equal(model.generate(IDS, 4, temperature=0, attention_mask=torch.ones_like(IDS)), a)
    assert torch.equal(model.generate(IDS.tolist(), 4, temperature=0), a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_generates(dtype: torch.dtype) -> None:
    assert build().to(dtype).generate(IDS, 4, seed=0).shape == (3, 9)
