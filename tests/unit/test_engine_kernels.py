"""The engine's rows in fused kernels of the CPU, compared with the model's modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import LastLoop, MythosConfig, OpenMythos, kernels
from open_mythos.inference import exits
from open_mythos.inference.engine import Engine, Request
from open_mythos.inference.kernel_runner import KernelRunner
from open_mythos.inference.quantise import Int8Codec
from open_mythos.inference.runner import PlainRunner
from tiny_models import SMALL

pytestmark = pytest.mark.skipif("are on" not in kernels.status(), reason=kernels.status())

SIZES = SMALL | {"act_threshold": 0.2}
DEPTHS = [1, 3, 5, 2, 8, 4]
RULES: dict[str, exits.Rule] = {
    "act": exits.ACT(0.2, min_loops=2),
    "state": exits.StateChange(0.2, min_loops=2),
    "kl": exits.PredictionChange(3e-2, max_loops=4),
}
MODELS: dict[str, dict[str, Any]] = {
    "mla": {"attn_type": "mla"},
    "gqa": {"attn_type": "gqa", "qk_norm": True, "halting": "off", "prelude_layers": 2},
    "no ends": {"attn_type": "mla", "prelude_layers": 0, "coda_layers": 0, "loop_embedding": False},
    "zeros": {"attn_type": "gqa", "initial_state": "zero", "update_norm": True, "lora_rank": 0},
}


def build(**changes: Any) -> OpenMythos:
    torch.manual_seed(0)
    model = OpenMythos(MythosConfig(**(SIZES | changes))).eval()
    torch.nn.init.normal_(model.recurrent.act.halt.weight, std=0.3)
    return model


def some_prompts(lengths: tuple[int, ...] = (3, 9, 1, 17, 5, 9)) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (n,), generator=draws) for n in lengths]


def answers(
    drawn: dict[int, list[Tensor]], model: OpenMythos, runner: Any, prompts: list[Tensor], **how: Any
) -> tuple[list[list[int]], list[Tensor], Engine]:
    """Tokens, logits and the engine."""
    drawn.clear()
    size = {name: how.pop(name) for name in ("max_rows", "prefill_chunk", "policy") if name in how}
    engine = Engine(model, **({"max_rows": 3, "page_size": 4, "prefill_chunk": 7} | size), runner=runner)
    results = engine.generate(prompts, temperature=0, **how)
    assert engine.stats.free_pages == engine.stats.pages
    return [result.tokens for result in results], [torch.stack(drawn[i]) for i in sorted(drawn)], engine


def compare(
    monkeypatch: pytest.MonkeyPatch,
    drawn: dict[int, list[Tensor]],
    model: OpenMythos,
    prompts: list[Tensor],
    **how: Any,
) -> None:
    wanted, logits, _ = answers(drawn, model, PlainRunner, prompts, **how)
    called: list[str] = []
    call = kernels.call
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "call", lambda name, *a: called.append(name) or call(name, *a))
        found, ours, _ = answers(drawn, model, KernelRunner, prompts, **how)
    assert "om_part" in called
    assert found == wanted
    for a, b in zip(ours, logits, strict=True):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_kernels_give_the_logits_of_the_modules(
    monkeypatch: pytest.MonkeyPatch, drawn: dict[int, list[Tensor]], name: str
) -> None:
    model = build(**MODELS[name])
    mixed = [None, exits.Fixed(2), None, None, exits.Never(), None]
    compare(monkeypatch, drawn, model, some_prompts(), max_new_tokens=7, n_loops=DEPTHS, exit=mixed)


@pytest.mark.parametrize("name", ["act", "state", "kl"])
def test_exit_rules_read_the_states_that_kernels_leave(
    monkeypatch: pytest.MonkeyPatch, drawn: dict[int, list[Tensor]], name: str
) -> None:
    how = {"max_new_tokens": 6, "exit": [RULES[name], None, RULES[name], None, RULES[name], RULES[name]]}
    compare(monkeypatch, drawn, build(attn_type="mla"), some_prompts(), n_loops=DEPTHS, **how)


def test_loops_may_share_their_pages(monkeypatch: pytest.MonkeyPatch, drawn: dict[int, list[Tensor]]) -> None:
    compare(monkeypatch, drawn, build(), some_prompts(), max_new_tokens=6, n_loops=DEPTHS, policy=LastLoop())


def test_more_rows_than_a_kernel_takes_go_in_pieces(
    monkeypatch: pytest.MonkeyPatch, drawn: dict[int, list[Tensor]]
) -> None:
    model, prompts = build(dim=16, vocab_size=11, n_experts=2), some_prompts((3,) * 70)
    many = {"max_rows": 70, "prefill_chunk": 256}
    compare(monkeypatch, drawn, model, prompts, max_new_tokens=4, n_loops=[2, 3] * 35, **many)


def test_a_hook_set_between_tokens_is_called_and_changes_no_token() -> None:
    model, prompt = build(), some_prompts()[1]
    engine = Engine(model, max_rows=2, page_size=4)
    wanted = [result.tokens for result in engine.generate([prompt, prompt], 9, [3, 5], 0)]
    handles = [engine.submit(Request(prompt, 9, n, temperature=0)) for n in (3, 5)]
    tokens, calls = iter(handles[0]), []
    found = [next(tokens) for _ in range(3)]
    hook = model.recurrent.block.register_forward_hook(lambda *_: calls.append(1))
    found += [next(tokens) for _ in range(3)]
    assert calls
    hook.remove()
    before = len(calls)
    found += list(tokens)
    assert len(calls) == before
    assert [found, handles[1].result().tokens] == wanted


def reason(model: OpenMythos, **how: Any) -> str | None:
    return Engine(model, max_rows=1, page_size=4, **how).runner.reason


def test_the_runner_tells_why_it_calls_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    assert reason(model) is None
    assert reason(model.train()) is None  # the engine puts it in eval mode
    assert reason(model, codec=Int8Codec()) == "keys and values are kept in another form"
    with kernels.disabled():
        assert reason(model) == "the kernels are disabled here"
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_library", None)
        patch.setattr(kernels, "_reason", "there is no C compiler ('cc' was not found)")
        assert reason(model) == "there is no C compiler ('cc' was not found)"
    wide = "the weights are torch.float64 on cpu, and the kernels serve contiguous float32 on the CPU"
    assert reason(build().double(), runner=KernelRunner) == wide
    assert reason(build(halting="average")) == "halting = 'average'"
    assert reason(build(attn_type="gqa", alibi=1.0)) == "alibi = 1.0"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda m: m.recurrent.block.register_forward_hook(lambda *_: None),
            "recurrent.block has hooks",
        ),
        (
            lambda m: setattr(m.recurrent.act, "forward", m.recurrent.act.forward),
            "recurrent.act has another method 'forward'",
        ),
        (lambda m: setattr(m.norm, "eps", 0.5), "norm has eps = 0.5"),
        (lambda m: setattr(m.recurrent.block.ffn, "topk", 9), "recurrent.block.ffn has topk = 9 of 4 experts"),
        (
            lambda m: setattr(m.head, "bias", torch.nn.Parameter(torch.zeros(23))),
            "head has a bias",
        ),
        (
            lambda m: setattr(m.recurrent.injection, "B", torch.nn.Parameter(torch.ones(24).double())),
            "recurrent.injection has another B than a float32 one of shape (24,) on the CPU",
        ),
        (lambda m: setattr(m.embed, "max_norm", 1.0), "embed has a max_norm"),
        (
            lambda m: setattr(m.recurrent.block, "ffn", torch.nn.Identity()),
            "'Identity' object has no attribute 'topk'",
        ),
    ],
)  # fmt: skip
def test_the_reason_names_what_is_not_as_built(change: Any, why: str) -> None:
    model = build()
    change(model)
    assert reason(model) == why


def test_the_reason_comes_and_goes_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    with Engine(model, max_rows=1, page_size=4) as engine:
        hook = model.norm.register_forward_hook(lambda *_: None)
        engine.generate([[1, 2]], 2)
        assert engine.runner.reason == "norm has hooks"
        hook.remove()
        engine.generate([[1, 2]], 2)
        assert engine.runner.reason is None
    with monkeypatch.context() as patch:
        patch.setattr(type(model.norm), "forward", lambda self, x: x)
        assert reason(model) == "RMSNorm.forward was replaced"
    everyone = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert reason(model) == "there are global hooks"
    finally:
        everyone.remove()
