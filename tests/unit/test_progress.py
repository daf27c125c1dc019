"""What a person sees of a run: all measures, within 80 columns, and plain lines where there is no terminal."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from open_mythos.training.progress import Bar, Lines, Silent, _count, default_progress, model_phrases

ROW: dict[str, Any] = {
    "step": 1_200_000,
    "loss": 2.34567,
    "n_loops": 12.25,
    "lr": 3e-4,
    "grad_norm": 0.8312,
    "rho": 0.91234,
    "tokens_per_s": 241_300.0,
    "mfu": 0.4512,
    "memory": 9_800_000_000,
    "memory_peak": 70_100_000_000,
    "expert_balance": 0.973,
    "halting_depth": 11.2,
    "skipped": 12,
    "alarms": [],
}
TOLD = (
    "loss 2.3457",
    "grad 0.831",
    "ρ(A) 0.9123",
    "12.25 loops",
    "depth 11.2",
    "experts 0.97",
    "241k tokens/s",
    "MFU 45.1 %",
    "9.8 GB, peak 70.1",
    "lr 3.0e-04",
    "12 skipped",
)


def shown(row: dict[str, Any], width: int = 80) -> list[str]:
    """The last frame on a terminal of that width."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False
    )
    bar = Bar(console)
    bar.live.auto_refresh = False
    bar.start(5_000_000, 1_000_000)
    bar.update(1_200_000, row)
    bar.close()
    with console.capture() as capture:
        console.print(bar.live.renderable)
    return capture.get().splitlines()


def test_the_live_display_tells_everything_within_80_columns():
    lines = shown(ROW)
    text = "\n".join(lines)
    assert "1200000/5000000" in text
    assert "ETA" in text
    for phrase in TOLD:
        assert phrase in text, phrase
    assert "…" not in text, "nothing is cut"
    assert max(map(len, lines)) <= 80
    assert len(lines) == 3


def test_alarms_are_cut_to_one_line():
    lines = shown({**ROW, "alarms": [f"state norm at loop {i}" for i in (1, 2, 4, 8, 16)]})
    assert len(lines) == 4
    assert lines[3].startswith("out of range: state norm at loop 1, ")
    assert lines[3].rstrip().endswith("…")
    assert max(map(len, lines)) <= 80


def test_a_record_without_the_rare_measures_is_shown():
    assert model_phrases({"step": 1, "loss": None}) == ["loss not finite"]
    bare = {"step": 1, "loss": 0.5, "mfu": None, "memory": None, "memory_peak": 2e9, "expert_balance": None}
    text = "\n".join(shown(bare))
    assert "MFU" not in text
    assert "experts" not in text
    assert "2.0 GB, peak 2.0" in text


def test_lines_are_about_twenty(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("open_mythos.training.progress.time.monotonic", lambda: clock[0])
    lines = Lines()
    lines.start(1000, 500)
    for step in range(501, 1001):
        clock[0] += 2.0
        lines.update(step, ROW if step % 10 == 0 else None)
    lines.close()
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert captured.out == ""
    assert len(said) == 10, "half a run"
    assert said[0].startswith("step 550/1000  loss 2.3457  grad 0.831")
    assert all(phrase in said[0] for phrase in TOLD)
    assert said[0].endswith("ETA 0:15:00")
    assert said[-1].startswith("step 1000/1000")
    assert "ETA" not in said[-1]
    assert "\x1b" not in captured.err


def test_lines_tell_an_alarm_at_once_and_again_after_a_quiet_time(capsys: pytest.CaptureFixture[str]):
    lines = Lines()
    lines.start(200, 0)  # a line every ten steps
    heard = {
        2: ["loss"],
        3: ["loss"],
        4: ["loss", "ρ(A)"],
        6: ["loss"],
        26: ["loss"],
        27: ["ρ(A)"],
        45: ["loss"],
    }
    for step in range(1, 50):
        lines.update(step, {**ROW, "alarms": heard.get(step, [])})
    said = [line for line in capsys.readouterr().err.splitlines() if "out of range" in line]
    assert said == [
        "step 2: out of range: loss",
        "step 4: out of range: ρ(A)",
        "step 26: out of range: loss",
        "step 27: out of range: ρ(A)",
    ]


def test_silence(capsys: pytest.CaptureFixture[str]):
    silent = default_progress(quiet=True)
    assert isinstance(silent, Silent)
    silent.start(10, 0)
    silent.update(1, ROW)
    silent.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("terminal", "kind"), [(True, Bar), (False, Lines)])
def test_default_depends_on_the_terminal(monkeypatch: pytest.MonkeyPatch, terminal: bool, kind: type):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert isinstance(default_progress(), kind)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.4, "0"), (93, "93"), (999, "999"), (1234, "1.23k"), (26_400, "26.4k"), (241_300, "241k")),
        *((2.5e6, "2.5M"), (4e9, "4G")),
    ],
)
def test_counts_in_three_digits(value: float, text: str):
    assert _count(value) == text
