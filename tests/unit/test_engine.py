"""The engine answers every request as if it were alone, whatever its depth, its exit rule, and who shares its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos import MythosConfig, OpenMythos
from open_mythos.inference import exits
from open_mythos.inference.engine import Engine
from open_mythos.inference.generate import generate
from tiny_models import SMALL

LOOPS = 5
SIZES = SMALL | {"max_loop_iters": LOOPS, "act_threshold": 0.2}
LENGTHS = (3, 9, 1, 17, 5, 9)
DEPTHS = [1, 3, 5, 2, 8, 4]
ATTENTION = ("mla", "gqa")
RULES: dict[str, exits.Rule] = {
    "fixed": exits.Fixed(3),
    "never": exits.Never(),
    "act": exits.ACT(0.2, min_loops=2),
    "state": exits.StateChange(0.2, min_loops=2),
    "kl": exits.PredictionChange(3e-2, max_loops=4),
    "kl by head, every second loop": exits.PredictionChange(1.5e-2, reads="head", every=2),
    "same": exits.SamePrediction(1),
    "top": exits.Confidence(0.3, every=2),
}


def build(attn_type: str = "mla", **changes: Any) -> OpenMythos:
    torch.manual_seed(0)
    model = OpenMythos(MythosConfig(**(SIZES | {"attn_type": attn_type} | changes))).double().eval()
    torch.nn.init.normal_(model.recurrent.act.halt.weight, std=0.3)  # so that tokens differ in when they halt
    return model


def some_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=draws) for n in lengths]


def small(model: OpenMythos, **changes: Any) -> Engine:
    """Fewer rows than requests, chunks shorter than prompts, pages shorter than chunks."""
    return Engine(model, **({"max_rows": 3, "page_size": 4, "prefill_chunk": 7} | changes))


def no_page_lost(engine: Engine) -> bool:
    return engine.stats.free_pages == engine.stats.pages and engine.stats.running == engine.stats.waiting == 0


def none_was_retried(engine: Engine) -> bool:
    """A batch that raises is computed row by row, which nobody would notice but by the time."""
    return engine.stats.done.retried == 0


@pytest.mark.parametrize(
    ("attn_type", "chunk", "changes"),
    [
        ("mla", 7, {}),
        ("gqa", 7, {"halting": "average"}),
        ("gqa", 12, {"halting": "off"}),
        ("mla", 40, {"alibi": 0.5, "previous_heads": 1}),
        ("gqa", 100, {"initial_state": "zero"}),
    ],
)
def test_requests_of_all_depths_share_a_batch_and_see_nothing_of_it(
    attn_type: str, chunk: int, changes: dict[str, Any], drawn: dict[int, list[Tensor]]
) -> None:
    model, prompts = build(attn_type, **changes), some_prompts()
    engine = small(model, prefill_chunk=chunk)
    results = engine.generate(prompts, 9, DEPTHS, temperature=0)
    assert no_page_lost(engine)
    assert none_was_retried(engine)
    assert engine.stats.done.row_loops > 1.5 * engine.stats.done.ticks
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert (result.reason, len(result.tokens)) == ("length", 9)
        ids = torch.cat((prompt, torch.tensor(result.tokens))).unsqueeze(0)
        with torch.no_grad():
            whole = model(ids, DEPTHS[i])[0, len(prompt) - 1 : -1]
        assert (torch.stack(drawn[i]) - whole).abs().max() <= 1e-12
        assert result.tokens == generate(model, prompt[None], 9, DEPTHS[i], 0)[0, len(prompt) :].tolist()
        assert result.prompt_loops == [DEPTHS[i]] * len(prompt)
        assert result.loops == [DEPTHS[i]] * 8, "the last token is never fed"


def test_prompts_of_one_chunk_may_be_padded_past_the_longest_context() -> None:
    model = build()
    engine = small(model, prefill_chunk=16, max_context=20)
    first, second = some_prompts((18, 8))
    results = engine.generate([first, second], 2, 3, temperature=0)
    assert engine.stats.done.chunks == 2, "the end of the first prompt and the second one share a chunk"
    assert none_was_retried(engine)
    for prompt, result in zip((first, second), results, strict=True):
        assert result.tokens == generate(model, prompt[None], 2, 3, 0)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_exits_are_those_of_the_request_alone(
    attn_type: str, name: str, drawn: dict[int, list[Tensor]]
) -> None:
    model, prompts, rule = build(attn_type), some_prompts(), RULES[name]
    engine = small(model)
    most = [LOOPS, 3, 4, LOOPS, LOOPS, 6]
    rules = [rule, None, rule, rule, exits.StateChange(0.4), rule]
    results = engine.generate(prompts, 7, most, temperature=0, exit=rules)
    assert no_page_lost(engine)
    assert none_was_retried(engine)
    for i in (0, 2, 3, 5):
        result = results[i]
        ids = torch.cat((prompts[i], torch.tensor(result.tokens))).unsqueeze(0)
        answer = exits.forward(model, ids[:, :-1], rule, most[i])
        start = len(prompts[i]) - 1
        assert (torch.stack(drawn[i]) - answer.logits[0, start:]).abs().max() <= 1e-12
        assert result.prompt_loops + result.loops == answer.loops[0].tolist()
    if type(rule) not in (exits.Fixed, exits.Never):
        spent = [n for i in (0, 2, 3, 5) for n in results[i].loops]
        assert len(set(spent)) > 1, "the rule never made a difference"
