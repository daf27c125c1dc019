"""Start-up cost: asking for help must not load torch, and the package must add little to torch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RUNS = 5
HELP_LIMIT_S = 0.5
IMPORT_LIMIT_S = 0.15
HEAVY = {"torch", "numpy", "matplotlib", "transformers", "tokenizers", "datasets", "pyarrow", "safetensors"}


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _fastest(measure: Callable[[], float], limit: float) -> list[float]:
    """Seconds of up to RUNS runs, until one is within the limit: noise only ever adds time."""
    seconds: list[float] = []
    while len(seconds) < RUNS and (not seconds or seconds[-1] > limit):
        seconds.append(measure())
    return seconds


def _modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded once `code` has run in a fresh interpreter."""
    tail = "import sys as _s; print('\\nMODULES', *{name.split('.')[0] for name in _s.modules})"
    return set(_python(f"{code}\n{tail}").rpartition("MODULES ")[2].split())


def test_help_is_fast():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([Path(sys.executable).parent / "mythos", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    seen = _fastest(seconds, HELP_LIMIT_S)
    assert min(seen) <= HELP_LIMIT_S, seen


def test_help_loads_nothing_heavy():
    code = """
import sys
sys.argv = ["mythos", "--help"]
from open_mythos.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    loaded = _modules_after(code)
    assert "open_mythos" in loaded
    assert not loaded & HEAVY


def test_import_adds_little_to_torch():
    code = """
import time, torch
start = time.perf_counter()
from open_mythos import MythosConfig, OpenMythos
print(time.perf_counter() - start)
"""
    seen = _fastest(lambda: float(_python(code)), IMPORT_LIMIT_S)
    assert min(seen) <= IMPORT_LIMIT_S, seen


def test_import_loads_only_torch():
    loaded = _modules_after("from open_mythos import MythosConfig, OpenMythos")
    assert "torch" in loaded
    assert not loaded & (HEAVY - {"torch", "numpy"} | {"typer", "rich"})
