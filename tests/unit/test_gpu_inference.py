"""Decode in kernels. On the CPU their plain versions stand in, in float64; on a GPU, the kernels against those."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from open_mythos import LastLoop, OpenMythos, kernels_gpu, ops
from open_mythos.inference.compiled_runner import CompiledRunner
from open_mythos.inference.engine import Engine
from open_mythos.inference.exits import StateChange
from open_mythos.inference.generate import generate
from open_mythos.inference.graph_runner import GraphRunner
from open_mythos.inference.graph_serves import changed, too_large, unserved
from open_mythos.inference.pages import Layers, PagePool
from open_mythos.inference.requests import Depth
from open_mythos.inference.runner import Batch, Chunk, PlainRunner, RowState
from open_mythos.model.recurrence import HaltingWeights
from open_mythos.rows.plain import PlainRows
from row_kernels import (
    ATTENTION,
    CHANGES,
    DEPTHS,
    ROWS,
    Interpreted,
    OnPlainRows,
    apart,
    batch_of,
    build,
    feed,
    interprets,
    make,
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def decode(runner: PlainRunner, steps: int = 2) -> list[Tensor]:
    """Logits of tokens at different depths, loop by loop, and what is left in states and pages."""
    seen = []
    for step in range(steps):
        runner.prelude(feed(runner, step))
        for t in range(max(DEPTHS)):
            places = [i for i, depth in enumerate(DEPTHS) if t < depth]
            runner.loop(batch_of(step, [t] * 3, places))
        seen.append(runner.coda(batch_of(step, list(DEPTHS), [0, 1, 2])).clone())
    rows = list(ROWS)
    seen += [runner.state.h[rows], runner.state.e[rows], runner.state.before[[2]]]
    return seen + [tensor[1:] for tensor in runner.pool.tensors.values()]


@pytest.mark.parametrize("changes", list(CHANGES))
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_the_plain_operations_are_the_model_in_float64(attn_type: str, changes: str) -> None:
    model = build(attn_type, torch.float64, **CHANGES[changes])
    assert apart(decode(make(model, PlainRows())), decode(make(model, None, plain=True))) < 1e-12


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_whole_token_is_its_parts(attn_type: str) -> None:
    model = build(attn_type, torch.float64)
    runners = [make(model, PlainRows()) for _ in range(2)]
    batches = [feed(runner, 0) for runner in runners]
    whole = runners[0].token(batches[0].pick([0]))
    runners[1].prelude(batches[1].pick([0]))
    for t in range(DEPTHS[0]):
        runners[1].loop(batch_of(0, [t], [0]))
    parts = runners[1].coda(batches[1].pick([0])).clone()
    assert whole is not None
    assert torch.equal(whole, parts)
    assert runners[0].token(batches[0]) is None  # depths differ
    runners[1].prelude(batches[1].pick([0]))
    runners[1].loop(batch_of(0, [0], [0]))
    rest = runners[1].rest(batch_of(0, [1], [0]))
    assert rest is not None
    assert torch.equal(rest, parts)


def several(runner: PlainRunner, times: tuple[int, ...]) -> list[Tensor]:
    """What is left of so many loops of each row in one call, and one more of the first in another."""
    runner.prelude(feed(runner, 0))
    runner.loops(batch_of(0, [0] * 3, [0, 1, 2]), times)
    runner.loops(batch_of(0, [times[0]], [0]), (1,))
    return [runner.state.h[list(ROWS)], *(tensor[1:] for tensor in runner.pool.tensors.values())]


@pytest.mark.parametrize("times", [(1, 1, 1), (2, 4, 1), (2, 3, 2)])
@pytest.mark.parametrize(("attn_type", "coda_layers"), [("mla", 2), ("gqa", 0)])
def test_several_loops_of_a_call_are_those_of_many(
    attn_type: str, coda_layers: int, times: tuple[int, ...]
) -> None:
    model = build(attn_type, torch.float64, halting="off", coda_layers=coda_layers)
    runner = make(model, PlainRows())
    assert runner.stride == 8
    assert apart(several(runner, times), several(make(model, None, plain=True), times)) < 1e-12


def interpreted(attn_type: str, changes: str) -> float:
    """How far kernels are from modules on the CPU, with TRITON_INTERPRET set before Triton is imported."""
    model = build(attn_type, torch.float32, **CHANGES[changes])
    runners = [make(model, rows, plain=rows is None) for rows in (Interpreted(), None)]
    once, loops = (
        [decode(runner, 1) for runner in runners],
        [several(runner, (2, 1, 1)) for runner in runners],
    )
    return max(apart(*once), apart(*loops))


@pytest.mark.slow
@pytest.mark.skipif(not interprets(), reason="needs Triton, and numpy below 2.4, for Triton's interpreter")
@pytest.mark.parametrize(("attn_type", "changes"), [("mla", "default"), ("gqa", "norms"), ("mla", "bare")])
def test_the_kernels_are_the_modules_where_triton_interprets_them(attn_type: str, changes: str) -> None:
    code = f"import {Path(__file__).stem} as t, torch; torch.set_grad_enabled(False)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.append('..'); {code}; print(t.interpreted({attn_type!r}, {changes!r}))",
        ],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < 1e-5


def test_a_row_whose_loop_somebody_else_ran_goes_on_from_its_state() -> None:
    model = build("mla", torch.float64)
    mixed, plain = make(model, PlainRows()), make(model, None, plain=True)
    for runner in (mixed, plain):
        runner.prelude(feed(runner, 0))
        runner.loop(batch_of(0, [0] * 3, [0, 1, 2]))
    PlainRunner.loop(mixed, batch_of(0, [1] * 3, [0, 1]))
    plain.loop(batch_of(0, [1] * 3, [0, 1]))
    for runner in (mixed, plain):
        runner.loop(batch_of(0, [2] * 3, [0, 1]))
    assert apart([mixed.state.h[[0, 2]]], [plain.state.h[[0, 2]]]) < 1e-12


@pytest.mark.parametrize("halting", ["select", "off"])
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("done", [0, 1, 2])
def test_the_kernels_end_a_token_that_the_modules_began(attn_type: str, halting: str, done: int) -> None:
    model, found = build(attn_type, torch.float64, halting=halting), []
    for runner in (make(model, PlainRows()), make(model, None, plain=True)):
        PlainRunner.prelude(runner, feed(runner, 0))
        for t in range(2):
            work = PlainRunner.loop if t < done else type(runner).loop
            work(runner, batch_of(0, [t] * 3, [0, 1, 2]))
        logits = runner.coda(batch_of(0, [2] * 3, [0, 1, 2])).clone()
        found.append([logits, runner.state.h[list(ROWS)], *(x[1:] for x in runner.pool.tensors.values())])
    assert apart(*found) < 1e-12


def test_a_capture_that_fails_leaves_the_rows_shown() -> None:
    runner: Any = make(build("mla", torch.float64), PlainRows())
    table = torch.arange(16, dtype=torch.int32).view(4, 4)

    def work() -> None:
        assert bool((table == -1).all()), "a capture must compute for nobody"
        raise MemoryError

    with pytest.raises(MemoryError):
        runner._capture("loop", work, table)
    assert table.flatten().tolist() == list(range(16))
    assert runner._graphs == {}


class Traced(CompiledRunner):
    """Compiled down to the operators that are there anyway."""

    backend = "eager"


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns about its own doings
@pytest.mark.parametrize(("attn_type", "halting", "length"), [("mla", "select", 8), ("gqa", "off", 6)])
def test_compiled_prompts_are_those_of_the_modules(attn_type: str, halting: str, length: int) -> None:
    """Of whole pages, and not."""
    model = build(attn_type, torch.float64, halting=halting, coda_layers=1)
    layers, device = Layers(1, 3, 1), torch.device("cpu")
    found: list[list[Tensor]] = []
    for kind in (Traced, PlainRunner):
        pool = PagePool(
            model.cfg,
            layers,
            rows=2,
            pages=40,
            page_size=4,
            max_context=8,
            dtype=torch.float64,
            device=device,
        )
        for row in range(2):
            pool.take(row, layers.needed(3), 8)
        options = (PlainRows(),) if kind is Traced else ()
        runner: Any = kind(model, pool, RowState(model, 2), *options)
        ids = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(4))
        logits, _ = runner.prefill(Chunk((0, 1), (0, 0), ids, Depth(3, None), True))
        found.append([logits, *(tensor[1:] for tensor in pool.tensors.values())])
        if kind is Traced:
            assert list(runner._compiled) == [(2, length)]
            assert runner.refused == {}
    assert apart(*found) < 1e-12


@pytest.mark.parametrize("policy", [None, LastLoop()])
@pytest.mark.parametrize("changes", list(CHANGES))
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_prompts_of_a_padded_shape_are_those_of_the_modules(
    attn_type: str, changes: str, policy: LastLoop | None
) -> None:
    """Of unequal lengths and depths, one under a rule's states, twice in the same buffers."""
    model, found = build(attn_type, torch.float64, **CHANGES[changes]), []
    for rows in (PlainRows(), None):
        runner = make(model, rows, plain=rows is None, shared=policy is not None)
        for row in ROWS:
            runner.pool.release(row)
        seen: list[Tensor] = []
        for lengths, depths in (((3, 7, 5), (5, 3, 1)), ((6, 2, 4), (3, 3, 2))):
            ids = torch.randint(
                0, 96, (3, max(lengths)), generator=torch.Generator().manual_seed(sum(lengths))
            )
            for row, length, depth in zip(ROWS, lengths, depths, strict=True):
                runner.pool.take(row, runner.pool.layers.needed(depth), length)
            for ruled in (False, True):
                depth = Depth(depths[0], None, ruled=ruled)
                logits, _ = runner.prefill(Chunk(ROWS, (0, 0, 0), ids, depth, True, lengths, depths))
                assert logits is not None
                seen.append(logits.clone())
            seen += [tensor[1:].clone() for tensor in runner.pool.tensors.values()]
            for row in ROWS:
                runner.pool.release(row)
        found.append(seen)
        if rows is not None:
            assert isinstance(runner, GraphRunner)
            # Those of make; and padded to one shape, with and without a rule's states.
            assert list(runner._prompts._shapes) == [(1, 64, False), (3, 64, False), (3, 64, True)]
    assert apart(*found) < 1e-12


def test_long_prompts_and_later_pieces_are_left_to_the_modules() -> None:
    runner = make(build("gqa", torch.float64), PlainRows())
    assert isinstance(runner, GraphRunner)
    depth, ids = Depth(3, None), torch.zeros(1, 4097, dtype=torch.long)
    serves = runner._prompts.serves
    assert serves(Chunk((0,), (0,), ids[:, :4096], depth, True))
    assert not serves(Chunk((0,), (0,), ids, depth, True))
    assert not serves(Chunk((0,), (4,), ids[:, :4], depth, True))
    assert not serves(Chunk((0,), (0,), ids[:, :4], Depth(3, StateChange(0.5)), True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_that_compute_alone_draw_from_their_own_logits(deterministic: bool) -> None:
    """The runner's buffers are used again for the next row."""
    model, found = build("mla", torch.float64, max_seq_len=24), []
    for kind in (OnPlainRows, PlainRunner):
        with Engine(model, max_rows=4, runner=kind, deterministic=deterministic) as engine:
            assert engine.runner.reason is None
            results = engine.generate([[1, 2, 3], [4, 5], [6, 7, 8], [3]], 6, [3, 2, 5, 4], temperature=0)
            found.append([result.tokens for result in results])
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "value"), [("alibi", 0.5), ("previous_heads", 1), ("halting", "average")])
def test_what_the_kernels_do_not_serve_runs_through_the_modules(name: str, value: Any) -> None:
    model = build("mla", torch.float64, **{name: value})
    runner = make(model, PlainRows())
    assert isinstance(runner, GraphRunner)
    assert runner.reason == f"{name} = {value!r}"
    assert runner.token(Batch((0,), (5,), (0,), (3,), (False,))) is None
    assert apart(decode(runner), decode(make(model, None, plain=True))) == 0


@pytest.mark.parametrize(("rows", "served"), [(16, True), (2048, True), (2049, False)])
def test_rows_whose_attention_is_beyond_32_bits_are_not_served(rows: int, served: bool) -> None:
    found = too_large(build("mla", torch.float32, kv_lora_rank=1024), rows)
    reason = "2049 rows, for 4096 of which there has to be room, are more than the 2730 that attention serves"
    assert found == (None if served else reason)


def test_a_method_that_somebody_replaced_is_seen_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make(build("mla", torch.float64), PlainRows())
    prepared: list[None] = []
    monkeypatch.setattr(runner, "_prepare", lambda: prepared.append(None))
    runner.refresh()
    assert prepared == []
    assert changed(runner.model) is None
    monkeypatch.setattr(HaltingWeights, "observe", lambda *_: None)
    assert changed(runner.model) == "HaltingWeights.observe was replaced"
    runner.refresh()
    assert prepared == [None]
    runner.refresh()
    assert prepared == [None]


def test_without_a_gpu_the_reason_is_given() -> None:
    runner = make(build("gqa", torch.float32), None)
    assert isinstance(runner, GraphRunner)
    assert runner.reason == "the model is on cpu, and the kernels run on cuda"


def watched(model: OpenMythos) -> None:
    model.recurrent.block.register_forward_hook(lambda *_: None)


def wrapped(model: OpenMythos) -> None:
    model.recurrent.block.ffn.forward = model.recurrent.block.ffn.forward  # type: ignore[method-assign]


def biased(model: OpenMythos) -> None:
    model.recurrent.block.attn.wo.bias = nn.Parameter(torch.zeros(60))


def training(model: OpenMythos) -> None:
    model.train()


def mixed(model: OpenMythos) -> None:
    model.head.weight = nn.Parameter(model.head.weight.to(torch.bfloat16))


def other(model: OpenMythos) -> None:
    model.norm = nn.RMSNorm(60)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (watched, "recurrent.block has hooks"),
        (wrapped, "recurrent.block.ffn has another method 'forward'"),
        (biased, "recurrent.block.attn.wo has a bias"),
        (training, "the model is in training mode"),
        (mixed, "head.weight is torch.bfloat16"),
        (other, "norm is of class RMSNorm"),
    ],
)
def test_a_model_that_somebody_changed_is_not_served(change: Any, reason: str) -> None:
    model = build("mla", torch.float32, tie_embeddings=False)
    assert changed(model) is None
    change(model)
    found = changed(model)
    assert found is not None
    assert found.startswith(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", list(CHANGES))
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_the_kernels_are_the_plain_operations(attn_type: str, changes: str) -> None:
    exact = decode(make(build(attn_type, torch.float64, **CHANGES[changes]), PlainRows()))
    model = build(attn_type, torch.float32, "cuda", **CHANGES[changes])
    runner = make(model, None)
    assert isinstance(runner, GraphRunner)
    assert runner.reason is None
    assert apart(decode(runner), exact) < 2e-5
    low = build(attn_type, torch.bfloat16, "cuda", n_experts_per_tok=6)  # a choice may fall either way
    exact = decode(make(build(attn_type, torch.float64, n_experts_per_tok=6), PlainRows()))
    assert apart(decode(make(low, None)), exact) < 0.05


@pytest.mark.gpu
def test_a_row_of_nan_fails_alone() -> None:
    """Its logits order no expert before another, and none is asked for that does not exist."""
    model = build("mla", torch.float32, "cuda")
    runners = [make(model, None) for _ in range(2)]
    for runner in runners:
        runner.prelude(feed(runner, 0))
    runners[0].state.h[ROWS[1]] = float("nan")
    for t in range(3):
        for runner in runners:
            runner.loop(batch_of(0, [t] * 3, [0, 1, 2]))
    broken, whole = (runner.coda(batch_of(0, [3] * 3, [0, 1, 2])) for runner in runners)
    torch.cuda.synchronize()
    assert broken[1].isnan().all()
    assert torch.equal(broken[[0, 2]], whole[[0, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_rows_beside_it_change_no_bit_of_a_row(attn_type: str) -> None:
    model = build(attn_type, torch.bfloat16, "cuda")
    together, alone = make(model, None), make(model, None)
    together.prelude(feed(together, 0))
    together.loop(batch_of(0, [0] * 3, [0, 1, 2]))
    feed(alone, 0)
    for i in range(3):
        alone.prelude(batch_of(0, [0] * 3, [i]))
        alone.loop(batch_of(0, [0] * 3, [i]))
    assert torch.equal(together.state.h, alone.state.h)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 5, 48), (7, 3000)])
def test_the_gate_of_a_prompt_is_its_reference(shape: tuple[int, ...]) -> None:
    x, weights = torch.randn(shape, device="cuda"), torch.rand(shape[:-1], device="cuda")
    assert kernels_gpu.gate_serves(x, weights)
    for w in (None, weights):
        assert apart([ops.gate(x, w)], [ops.gate_reference(x.double(), w)]) < 1e-6
        low = None if w is None else w.bfloat16()
        assert apart([ops.gate(x.bfloat16(), low)], [ops.gate_reference(x, w)]) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_engine_computes_where_its_model_is() -> None:
    model = build("mla", torch.float32, "cuda:1")
    with Engine(model, max_rows=2) as engine:
        result = engine.generate([[1, 2, 3]], 4, 3, 0)[0]
        assert isinstance(engine.runner, GraphRunner)
        assert engine.runner.reason is None
    ids = torch.tensor([[1, 2, 3]], device="cuda:1")
    assert result.tokens == generate(model, ids, 4, 3, 0)[0, 3:].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_several_loops_of_a_graph_are_those_of_many_to_the_bit(attn_type: str) -> None:
    model = build(attn_type, torch.bfloat16, "cuda")
    together, apart_ = make(model, None), make(model, None)
    for times in ((2, 4, 1), (2, 3, 2), (2, 4, 1)):
        found = several(together, times)
        apart_.prelude(feed(apart_, 0))
        PlainRunner.loops(apart_, batch_of(0, [0] * 3, [0, 1, 2]), times)
        apart_.loop(batch_of(0, [times[0]], [0]))
        wanted = [apart_.state.h[list(ROWS)], *(tensor[1:] for tensor in apart_.pool.tensors.values())]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Widths that a grouped product takes in bfloat16.
ALIGNED = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "expert_dim": 32, "max_seq_len": 256}


@pytest.mark.gpu
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_prompts_from_graphs_are_those_of_the_modules(attn_type: str) -> None:
    model = build(attn_type, torch.bfloat16, "cuda", **ALIGNED)
    exact = build(attn_type, torch.float64, **ALIGNED)
    ids, lengths, depths = torch.randint(0, 96, (3, 15)), (15, 9, 12), (5, 3, 1)
    found = []
    for runner in (make(model, None), make(model, None, plain=True), make(exact, None, plain=True)):
        for row, length, depth in zip(ROWS, lengths, depths, strict=True):
            runner.pool.release(row)
            runner.pool.take(row, runner.pool.layers.needed(depth), length)
        chunk, seen = Chunk(ROWS, (0, 0, 0), ids, Depth(5), True, lengths, depths), []
        for _ in range(2):
            logits, _ = runner.prefill(chunk)
            assert logits is not None
            seen.append(logits.clone())
        assert torch.equal(*seen)
        if isinstance(runner, GraphRunner):
            assert (3, 64, False) in runner._prompts._shapes
        found.append([seen[0], *(tensor[1:] for tensor in runner.pool.tensors.values())])
    assert apart(found[0], found[2]) < 1.5 * apart(found[1], found[2]) + 1e-3


@pytest.mark.gpu
def test_prompts_beside_the_ticks_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk holds one prompt only, so that rounding is the same whatever comes when."""
    model, found = build("mla", torch.bfloat16, "cuda", **ALIGNED), []
    prompts = [[(7 * i + j) % 96 for j in range(50 + 11 * i % 40)] for i in range(24)]
    for beside in (True, False):
        if not beside:
            monkeypatch.setattr(GraphRunner, "beside", PlainRunner.beside)
        with Engine(model, max_rows=6, prefill_chunk=92) as engine:
            runner: Any = engine.runner
            results = engine.generate(prompts, 12, [1 + i % 5 for i in range(24)], temperature=0)
            assert set(runner._prompts._shapes) == {(1, 64, False), (1, 128, False)}
            found.append([result.tokens for result in results])
    assert found[0] == found[1]


@pytest.mark.gpu
def test_what_no_graph_can_hold_runs_through_the_modules() -> None:
    """In float32 experts are multiplied one by one, as the host reads their counts."""
    model = build("mla", torch.float32, "cuda", **ALIGNED)
    with Engine(model, max_rows=2) as engine:
        runner: Any = engine.runner
        tokens = engine.generate([[1, 2, 3]], 5, 3, temperature=0)[0].tokens
        assert runner.reason is None
        assert not runner._prompts._shapes
    assert tokens == generate(model, torch.tensor([[1, 2, 3]], device="cuda"), 5, 3, 0)[0, 3:].tolist()


@pytest.mark.gpu
def test_a_changed_weight_is_captured_anew() -> None:
    model = build("mla", torch.float32, "cuda")
    runner = make(model, None)
    decode(runner)
    model.head.weight = nn.Parameter(model.head.weight * 2)
    runner.refresh()
    assert unserved(model, runner.pool) is None
    assert apart(decode(runner), decode(make(model, None, plain=True))) < 2e-5
