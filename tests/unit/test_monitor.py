"""What a training step shows: each measure against its definition, and that looking changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos import MythosConfig, OpenMythos
from open_mythos.analysis.probes import trace
from open_mythos.model import spectral_radius
from open_mythos.training.config import RunConfig
from open_mythos.training.logconfig import LogConfig
from open_mythos.training.loops import LoopPlan
from open_mythos.training.meter import train_flops
from open_mythos.training.monitor import PARTS, Monitor, _balance, _measures, _Recorder, gradient_norms
from open_mythos.training.objective import Objective
from open_mythos.training.parallel import World, parallelize

SIZES: dict[str, Any] = {
    "vocab_size": 31, "dim": 24, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 32,
    "max_loop_iters": 4, "prelude_layers": 1, "coda_layers": 1, "n_experts": 6, "n_experts_per_tok": 2,
    "n_shared_experts": 1, "expert_dim": 16, "lora_rank": 4, "router_bias_rate": 0.1,
}  # fmt: skip


def build(seed: int = 0, **fields: Any) -> OpenMythos:
    torch.manual_seed(seed)
    model = OpenMythos(MythosConfig(**{**SIZES, **fields})).train()
    with torch.no_grad():  # a fresh LoRA, halting head and scale are zeros and ones, which hide mistakes
        for parameter in model.recurrent.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def run_config(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {**SIZES, "vocab_size": 31, **(model or {})},
            "data": {"source": "parity", "length": 8},
            "loops": {"kind": "fixed", "loops": 3},
            "train": {"log_every": 1},
            **sections,
        }
    )


def batch(seed: int = 0, rows: int = 4, length: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 31, (rows, length), generator=generator)
    return {"ids": ids, "targets": torch.randint(0, 31, (rows, length), generator=generator)}


def one_step(
    monitor: Monitor, objective: Any, step: int, plan: LoopPlan, read: bool = True, data: Any = None
) -> dict[str, Any] | None:
    """A step of training without the optimiser; its gradients stay."""
    data = batch(step) if data is None else data
    monitor.begin(step, read)
    with monitor.watching():
        loss = objective(data, plan)
    loss.backward()
    monitor.passed(loss, plan, data["ids"].numel(), data["ids"].shape[1])
    return monitor.end(1e-3, gradient_norms(monitor.model, monitor.world))


@pytest.mark.parametrize("halting", ["select", "average", "upstream", "off"])
def test_a_look_sees_what_the_probe_sees(halting: str):
    model = build(halting=halting, initial_state="prelude", halt_bias_init=-1.0, act_threshold=0.6)
    ids = batch()["ids"]
    probe = trace(model, ids, 5, keep_states=True)
    with _Recorder(model) as seen, torch.no_grad():
        model.eval()
        model(ids, n_loops=5)
    found = _measures([0.0] * 6, seen.result().tolist(), 2)
    torch.testing.assert_close(torch.tensor(found["state_norm"]), probe.norms.mean((1, 2)))
    assert probe.states is not None
    cosine = torch.nn.functional.cosine_similarity(
        probe.states.unsqueeze(2), probe.states.unsqueeze(3), dim=-1
    )
    apart = ~torch.eye(8, dtype=torch.bool)
    expected = cosine[:, :, apart].mean((1, 2))
    torch.testing.assert_close(torch.tensor(found["token_correlation"]), expected, rtol=1e-4, atol=1e-5)
    if halting == "off":
        assert "halting_depth" not in found
    else:
        depth = (probe.weights * torch.arange(1, 6).view(5, 1, 1)).sum(0).mean()
        assert found["halting_depth"] == pytest.approx(float(depth), rel=1e-5)
        assert 1 < found["halting_depth"] < 5


def test_token_correlation_is_one_for_equal_states_and_zero_for_orthogonal_ones():
    model = build()
    recorder = _Recorder(model)
    recorder._look(torch.ones(2, 8, 24), 0)
    recorder._look(torch.eye(24)[:8].expand(2, 8, 24) * 3, 1)
    recorder._look(torch.ones(2, 1, 24), 2)
    found = _measures([0.0] * 6, recorder.result().tolist(), 2)
    assert found["token_correlation"] == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert found["state_norm"] == pytest.approx([math.sqrt(24), 3.0, math.sqrt(24)])


def test_a_sequence_counts_at_its_own_loops():
    model = build(halting="off", initial_state="prelude", router_bias_rate=0.0)
    data, plan = batch(rows=2), LoopPlan(1, 3, starts=(2, 0))
    with _Recorder(model) as seen:
        Objective(model)(data, plan)
    found = _measures([0.0] * 6, seen.result().tolist(), 2)["state_norm"]
    alone = []
    for row, loops in ((0, 2), (1, 4)):
        with _Recorder(model) as one:
            rows = {name: value[row : row + 1] for name, value in data.items()}
            Objective(model)(rows, LoopPlan(0, loops))
        alone.append(_measures([0.0] * 6, one.result().tolist(), 2)["state_norm"])
    expected = [(alone[0][0] + alone[1][0]) / 2, (alone[0][1] + alone[1][1]) / 2, *alone[1][2:]]
    assert found == pytest.approx(expected, rel=1e-4)
    with _Recorder(model) as late:
        Objective(model)(data, LoopPlan(0, 3, starts=(1, 2)))
    assert _measures([0.0] * 6, late.result().tolist(), 2)["state_norm"][2] is None  # nobody ran a third


def test_looking_changes_nothing():
    """Loss, gradients, random numbers and the model's attributes are those of a run without looks."""
    results = []
    for every in (0, 1):
        model = build(initial_state="random", dropout=0.1)
        monitor = Monitor(run_config(log={"monitor_every": every}), model)
        torch.manual_seed(5)
        row = one_step(monitor, Objective(model), 1, LoopPlan(2, 3))
        assert row is not None
        assert ("state_norm" in row) == bool(every)
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert "step" not in model.__dict__
        results.append((row["loss"], grads, torch.get_rng_state()))
    (loss, grads, rng), (loss_seen, grads_seen, rng_seen) = results
    assert loss == loss_seen
    assert torch.equal(rng, rng_seen)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_seen, strict=True))


def test_recompute_in_backward_is_not_looked_at_again():
    model = build()
    objective = Objective(model)
    parallelize(objective, World(), recompute="loop")
    row = one_step(Monitor(run_config(), model), objective, 1, LoopPlan(1, 3))
    assert row is not None
    assert len(row["state_norm"]) == 4


@pytest.mark.filterwarnings("ignore")  # the tracer warns about its own doings
def test_compiled_steps_do_not_compile_again_when_looked_at():
    model = build()
    compiled = torch.compile(model.recurrent.forward, backend="eager", fullgraph=True, dynamic=False)
    setattr(model.recurrent, "forward", compiled)  # noqa: B010
    monitor = Monitor(run_config(train={"log_every": 2}, log={"monitor_every": 2}), model)
    objective = Objective(model)
    one_step(monitor, objective, 1, LoopPlan(1, 2), read=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2, 6):
            row = one_step(monitor, objective, step, LoopPlan(step % 3, 2), read=step % 2 == 0)
            assert (row is not None and "state_norm" in row) == (step % 2 == 0)
    torch._dynamo.reset()


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_ordinary_steps_do_not_wait_for_the_device():
    model = build()
    monitor = Monitor(run_config(train={"log_every": 10}), model)
    plan, data, objective = LoopPlan(1, 2), batch(), Objective(model)
    for step in (8, 9):
        monitor.begin(step, read=False)
        with monitor.watching():
            loss = objective(data, plan)
        loss.backward()
        with NoSync():
            monitor.passed(loss, plan, 32, 8)
            norms = gradient_norms(model)
            assert monitor.end(1e-3, norms, skipped=torch.tensor(False)) is None
    monitor.begin(10, read=True)
    with monitor.watching():
        loss = objective(data, plan)
    loss.backward()
    with NoSync():  # nor does a look
        monitor.passed(loss, plan, 32, 8)
        norms = gradient_norms(model)
        assert monitor._recorder is not None
        monitor._recorder.result()
    with pytest.raises(AssertionError, match="waits"), NoSync():
        float(loss)
    row = monitor.end(1e-3, norms)
    assert row is not None
    assert len(row["state_norm"]) == 3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_ordinary_steps_and_looks_do_not_wait_for_a_gpu():
    model = build().to("cuda")
    monitor = Monitor(run_config(train={"log_every": 2}, log={"monitor_every": 2}), model)
    objective, plan = Objective(model), LoopPlan(1, 2)
    data = {name: value.to("cuda") for name, value in batch().items()}
    row = None
    for step in range(1, 5):
        monitor.begin(step, read=step == 4)
        with torch.autocast("cuda", torch.bfloat16):  # in float32 the host multiplies expert by expert
            loss = objective(data, plan)  # the first may set libraries up
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            with monitor.watching(), torch.autocast("cuda", torch.bfloat16):
                model.step(loss.new_ones(4, 8, 24), loss.new_ones(4, 8, 24), 0)
            loss.backward()
            monitor.passed(loss, plan, 32, 8)
            norms = gradient_norms(model)
            if monitor._recorder is not None:
                monitor._recorder.result()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        row = monitor.end(1e-3, norms, skipped=torch.zeros((), dtype=torch.bool, device="cuda"))
    assert row is not None
    assert row["mfu"] is not None and row["mfu"] > 0  # noqa: PT018
    assert 0 < row["memory"] <= row["memory_peak"]
    assert len(row["state_norm"]) == 1
    assert monitor.facts()["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_norms_are_those_of_the_parts_and_of_all(tied: bool):
    model = build(tie_embeddings=tied)
    Objective(model)(batch(), LoopPlan(0, 2)).backward()
    norms = gradient_norms(model)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    torch.testing.assert_close(norms.norm(), total)
    parts = dict(zip(PARTS, norms.tolist(), strict=True))
    injection = torch.nn.utils.get_total_norm(
        [p.grad for p in model.recurrent.injection.parameters() if p.grad is not None]
    )
    assert parts["injection"] == pytest.approx(float(injection))
    held = [*model.coda_layers.parameters(), model.norm.weight, *([] if tied else [model.head.weight])]
    coda = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
    assert parts["coda"] == pytest.approx(float(coda))
    assert all(norm > 0 for norm in parts.values())
    model.zero_grad()
    assert gradient_norms(model).tolist() == [0.0] * 4


def test_a_record_has_every_measure_and_is_json():
    model = build()
    config = run_config(log={"peak_tflops": 0.5})
    monitor = Monitor(config, model)
    assert monitor.facts() == {"device": "cpu", "peak_tflops": 0.5, "peak_from": "config"}
    row = one_step(monitor, Objective(model), 1, LoopPlan(1, 2))
    assert row is not None
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["step"] == 1 and row["n_loops"] == 3 and row["n_grad"] == 2 and row["lr"] == 1e-3  # noqa: PT018
    assert row["rho"] == spectral_radius(model)
    assert set(row["grad_norms"]) == set(PARTS)
    assert row["grad_norm"] == pytest.approx(float(gradient_norms(model).norm()))
    per_token = train_flops(model.cfg, LoopPlan(1, 2), 8)
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * per_token / 0.5e12)
    assert len(row["expert_share"]) == 6
    assert sum(row["expert_share"]) == pytest.approx(1, abs=1e-5)
    load = model.recurrent.block.ffn.expert_load.double()  # type: ignore[union-attr, operator]
    assert row["expert_share"] == pytest.approx((load / load.sum()).tolist(), abs=1e-6)
    assert row["memory_peak"] > 1e6
    assert row["skipped"] == 0 and row["alarms"] == []  # noqa: PT018
    assert len(row["state_norm"]) == len(row["token_correlation"]) == 3
    assert 1 <= row["halting_depth"] <= 3


def test_mfu_is_none_on_the_cpu_unless_asked_for():
    row = one_step(Monitor(run_config(), build()), Objective(build()), 1, LoopPlan(0, 1))
    assert row is not None
    assert row["mfu"] is None


@pytest.mark.parametrize(
    ("load", "topk", "balance", "dead"),
    [
        ([5, 5, 5, 5], 1, 1.0, 0),
        ([0, 20, 0, 0], 1, 0.0, 3),
        ([10, 10, 0, 0], 2, 0.0, 2),
        ([48, 2, 0, 50], 2, 0.0876, 1),
        ([5, 5], 2, None, 0),
    ],
)
def test_expert_balance(load: list[float], topk: int, balance: float | None, dead: int):
    found = _balance(load, topk)
    assert found["expert_balance"] == (None if balance is None else pytest.approx(balance, rel=1e-3))
    assert found["dead_experts"] == dead
    assert found["expert_max"] == max(load) / sum(load)
    assert found["expert_min"] == min(load) / sum(load)


def test_accumulated_forwards_count_together():
    model = build()
    monitor, objective = Monitor(run_config(), model), Objective(model)
    monitor.begin(1, read=True)
    losses, loads = [], torch.zeros(6)
    for i, plan in enumerate((LoopPlan(0, 2), LoopPlan(1, 4))):
        with monitor.watching():
            loss = objective(batch(i), plan)
        loss.backward()
        monitor.passed(loss, plan, 32, 8)
        losses.append(float(loss))
        loads += model.recurrent.block.ffn.expert_load  # type: ignore[arg-type, union-attr]
    row = monitor.end(1e-3, gradient_norms(model), skipped=True)
    assert row is not None
    assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert row["n_loops"] == 3.5 and row["n_grad"] == 3  # noqa: PT018
    assert len(row["state_norm"]) == 2, "the first forward is looked at"
    assert row["expert_share"] == pytest.approx((loads / loads.sum()).tolist(), abs=1e-6)
    assert row["skipped"] == 1


def test_a_frozen_bias_does_not_let_counts_pile_up():
    model = build(router_bias_rate=0.0)
    monitor, objective = Monitor(run_config(), model), Objective(model)
    for step in (1, 2):
        row = one_step(monitor, objective, step, LoopPlan(0, 2))
        assert row is not None
        assert sum(row["expert_share"]) == pytest.approx(1, abs=1e-5)
        assert int(model.recurrent.block.ffn.expert_load.sum()) == 0  # type: ignore[union-attr, operator]


def test_looks_fall_on_the_same_steps_after_a_resume():
    """A look depends on the step alone, and falls on records."""
    monitor = Monitor(run_config(train={"log_every": 4}, log={"monitor_every": 10}), build())
    looks = []
    for step in range(1, 41):
        monitor.begin(step, read=step == 1 or step % 4 == 0)
        if monitor._read and monitor._due():
            looks.append(step)
    assert looks == [1, 12, 20, 32, 40]
    resumed = Monitor(monitor.config, build())
    for step in range(18, 41):
        resumed.begin(step, read=step % 4 == 0)
        assert (resumed._read and resumed._due()) == (step in looks)


def test_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr("open_mythos.training.monitor.time.perf_counter", lambda: clock[0])
    model = build()
    monitor, objective = Monitor(run_config(), model), Objective(model)
    monitor.begin(1, read=True)
    loss = objective(batch(), LoopPlan(0, 1))
    loss.backward()
    clock[0] = 104.0
    with monitor.paused():
        clock[0] = 154.0
    monitor.passed(loss, LoopPlan(0, 1), 32, 8)
    row = monitor.end(1e-3, gradient_norms(model))
    assert row is not None
    assert row["tokens_per_s"] == 8.0


def test_numbers_that_are_not_finite_are_null_and_named():
    model = build()
    with torch.no_grad():
        model.coda_layers[0].ffn_norm.weight[0] = math.nan  # type: ignore[union-attr, index, operator]
    row = one_step(Monitor(run_config(), model), Objective(model), 1, LoopPlan(0, 2))
    assert row is not None
    assert row["loss"] is None
    assert set(row["nonfinite"]) >= {"loss", "grad_norm"}
    assert row["alarms"][0] == "loss"
    assert all(math.isfinite(x) for x in row["state_norm"])
    json.dumps(row, allow_nan=False)


def drive(
    change: Callable[[OpenMythos, torch.optim.Optimizer, int], None], steps: int, **log: Any
) -> tuple[Monitor, int]:
    """A real run, spoiled on the way; ends at the first update that is not finite, or at a verdict."""
    model = build(init="scaled", initial_state="prelude")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor, objective = Monitor(run_config(train={"log_every": 1}, log=log), model), Objective(model)
    data = batch(rows=4)
    for step in range(1, steps + 1):
        change(model, optimizer, step)
        optimizer.zero_grad()
        row = one_step(monitor, objective, step, LoopPlan(0, 8), data=data)
        assert row is not None
        if row["loss"] is None or row["grad_norm"] is None or monitor.verdict():
            return monitor, step
        optimizer.step()
    return monitor, steps


def test_a_run_whose_injection_is_tampered_with_names_the_state_first():
    def tamper(model: OpenMythos, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 40:
            with torch.no_grad():
                model.recurrent.injection.log_A.fill_(-20.0)  # A next to 1: nothing is forgotten
                model.recurrent.injection.B.fill_(40.0)

    monitor, _ = drive(tamper, 60, monitor_every=1, window=30, patience=5)
    text = monitor.verdict() or monitor.account()
    assert "state norm at loop 1 left its range at step 40" in text
    assert "ρ(A) at step 40 (1" in text
    assert text.index("state norm at loop 8") < text.index("ρ(A)")
    if "loss at step" in text:
        assert text.index("ρ(A)") < text.index("loss at step")


def test_a_run_with_a_huge_learning_rate_is_stopped_and_accounted_for():
    def explode(model: OpenMythos, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step >= 40:
            for group in optimizer.param_groups:
                group["lr"] = 1.0

    monitor, step = drive(explode, 80, monitor_every=1, window=30, patience=5)
    assert 41 <= step <= 60
    text = monitor.verdict() or monitor.account()
    assert "left its range at step 41" in text
    assert "loss" in text


def test_a_healthy_run_has_no_verdict():
    monitor, step = drive(lambda *_: None, 60, monitor_every=1, window=30, patience=5)
    assert step == 60
    assert monitor.verdict() is None


def test_the_page_defines_every_key_of_a_record_and_every_limit():
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.split("## The record")[1].split("## MFU")[0]
    keys = {
        key
        for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", row)
    }
    model = build()
    row = one_step(Monitor(run_config(), model), Objective(model), 1, LoopPlan(0, 1))
    assert row is not None
    assert {"step", *keys} == {*row, "nonfinite", "seconds"}
    limits = {f.name: f.default for f in dataclasses.fields(LogConfig) if isinstance(f.default, float)}
    told = dict(re.findall(r"`(\w+) = ([\d.]+)`", page))
    assert {name: float(value) for name, value in told.items()} == limits
