"""The account of a divergence: which measure left its range first, on series made for it."""

from __future__ import annotations

import math
import random

import pytest

from open_mythos.config import ConfigError
from open_mythos.training.diagnosis import Diagnosis
from open_mythos.training.logconfig import LogConfig


def healthy(step: int, noise: random.Random) -> dict[str, float]:
    """A falling loss and what goes with it; states are looked at every tenth step."""
    values = {
        "loss": 2.0 + 4.0 * math.exp(-step / 100) + noise.gauss(0, 0.1),
        "gradient norm": 0.8 * math.exp(noise.gauss(0, 0.3)),
        "expert balance": 0.9 + noise.gauss(0, 0.02),
    }
    if step % 10 == 0:
        values |= {
            "state norm at loop 8": 30.0 + noise.gauss(0, 1),
            "token correlation at loop 8": 0.2 + noise.gauss(0, 0.05),
            "ρ(A)": 0.4,
            "halting depth": 6.0,
        }
    return values


def fed(limits: LogConfig, steps: int, change: dict[str, tuple[int, float]]) -> Diagnosis:
    """A diagnosis after ``steps``, with each named measure replaced from its step on."""
    watch, noise = Diagnosis(limits), random.Random(0)
    for step in range(1, steps + 1):
        values = healthy(step, noise)
        for name, (start, value) in change.items():
            if name in values and step >= start:
                values[name] = value
        watch.observe(step, values)
    return watch


def test_a_healthy_run_gives_no_alarm():
    watch, noise = Diagnosis(LogConfig()), random.Random(1)
    alarms = [name for step in range(1, 2001) for name in watch.observe(step, healthy(step, noise))]
    assert alarms == []
    assert watch.account() == ""
    assert watch.verdict() is None


def test_the_account_is_in_the_order_of_leaving():
    change = {
        "loss": (423, math.nan),
        "gradient norm": (415, 87.0),
        "state norm at loop 8": (410, 12000.0),
    }
    text = fed(LogConfig(), 430, change).account()
    first, second, third = text.index("state norm"), text.index("gradient norm"), text.index("loss")
    assert first < second < third
    assert text.startswith("state norm at loop 8 left its range at step 410 (1.2e+04, median 30"), text
    assert "then gradient norm at step 415 (87, median 0.8" in text
    assert "loss at step 423 (nan" in text


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("loss", 4.0),
        ("gradient norm", 20.0),
        ("expert balance", 0.01),
        ("state norm at loop 8", 150.0),
        ("state norm at loop 8", 1.0),
        ("token correlation at loop 8", 0.995),
        ("ρ(A)", 0.99999),
        ("halting depth", 1.0),
        ("gradient norm", math.inf),
        ("halting depth", math.nan),
    ],
)
def test_each_measure_has_its_limit(name: str, bad: float):
    text = fed(LogConfig(), 400, {name: (350, bad)}).account()
    assert text.startswith(f"{name} left its range at step 350 (")
    assert "then" not in text


def test_a_spike_neither_stops_the_run_nor_widens_the_range():
    watch, noise = Diagnosis(LogConfig(patience=20)), random.Random(2)
    spikes = {*range(300, 315), *range(340, 355)}
    for step in range(1, 401):
        values = healthy(step, noise)
        if step in spikes:
            values["loss"] = 9.0
        alarms = watch.observe(step, values)
        assert ("loss" in alarms) == (step in spikes)
        assert watch.verdict() is None
    assert "loss left its range at step 300" in watch.account()
    for step in range(401, 520):
        watch.observe(step, healthy(step, noise))
    assert watch.account() == ""  # long over


def test_a_lasting_rise_of_the_loss_stops_the_run_after_patience():
    watch, noise = Diagnosis(LogConfig(patience=30)), random.Random(3)
    stopped = None
    for step in range(1, 400):
        values = healthy(step, noise)
        if step >= 300:
            values["loss"] = 10.8
        if step >= 290:
            values["gradient norm"] = 30.0
        watch.observe(step, values)
        if watch.verdict() and stopped is None:
            stopped = step
    assert stopped == 329
    verdict = watch.verdict()
    assert verdict is not None
    assert verdict.index("gradient norm left its range at step 290") < verdict.index("loss at step 300")


def test_a_run_that_is_wild_from_the_start_is_stopped_too():
    noise = random.Random(4)
    wild = [30 + 20 * noise.random() for _ in range(200)]
    watch, blind = Diagnosis(LogConfig(patience=50), guess=math.log(4)), Diagnosis(LogConfig(patience=50))
    for step, value in enumerate(wild, 1):
        watch.observe(step, {"loss": value})
        blind.observe(step, {"loss": value})
        assert (watch.verdict() is not None) == (step >= 50)
    assert watch.verdict() == "the loss has been out of its range for 200 steps in a row: " + watch.account()
    assert watch.account() == "out of range from the start: loss"
    assert blind.verdict() is None, "by itself it has no other range than this"
    calm = Diagnosis(LogConfig(patience=50), guess=math.log(4))
    for step in range(1, 200):
        assert calm.observe(step, {"loss": 2.0}) == []


def test_patience_zero_never_stops():
    watch = fed(LogConfig(patience=0), 900, {"loss": (300, 10.8)})
    assert watch.verdict() is None


def test_a_witness_that_settles_elsewhere_gets_a_new_range():
    limits = LogConfig(window=50, patience=50)
    watch = fed(limits, 480, {"state norm at loop 8": (300, 300.0)})
    assert watch.observe(490, {"state norm at loop 8": 301.0}) == []
    assert watch.observe(500, {"state norm at loop 8": 3000.0}) == ["state norm at loop 8"]


def test_what_was_never_in_range_is_told_apart():
    change = {"token correlation at loop 8": (1, 0.999), "gradient norm": (350, 50.0)}
    text = fed(LogConfig(), 360, change).account()
    assert text.startswith("gradient norm left its range at step 350")
    assert text.endswith("; out of range from the start: token correlation at loop 8")


def test_a_long_account_names_the_first_eight():
    watch = Diagnosis(LogConfig())
    for step in range(1, 13):
        watch.observe(
            step, {f"token correlation at loop {i}": 1.0 if step > i else 0.0 for i in range(1, 12)}
        )
    text = watch.account()
    assert text.endswith(" and 3 more")
    assert "at loop 8 at step 9" in text
    assert "loop 9" not in text


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("peak_tflops", "fast", "'auto', 'measured' or a number above 0"),
        ("peak_tflops", 0, "a number above 0"),
        ("monitor_every", -1, "a whole number of at least 0"),
        ("window", 19, "a whole number of at least 20"),
        ("patience", 1.5, "a whole number of at least 0"),
        ("loss_rise", 0, "a number above 0"),
        ("grad_factor", 1.0, "a number above 1"),
        ("correlation", 1.5, "a number of at least 0 and at most 1"),
        ("online", 1, "True or False"),
        ("project", "", "a name"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(field: str, value: object, allowed: str):
    with pytest.raises(ConfigError) as caught:
        LogConfig(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"log.{field} = {value!r} is not allowed: it must be {allowed}"
