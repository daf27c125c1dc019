"""Start-up cost: asking for help must not load torch, and the package must add little to torch."""

from __future__ import annotations

import subprocess
import sys

HELP_LIMIT = 150_000  # calls; importing torch makes 500,000
IMPORT_SHARE = 0.05  # of the calls that importing torch makes
HEAVY = {"torch", "numpy", "matplotlib", "transformers", "tokenizers", "datasets", "pyarrow", "safetensors"}
HELP = """
import sys
sys.argv = ["mythos", "--help"]
from open_mythos.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
COUNT = """
def count(frame, event, arg):
    global n
    n += event == "call"
"""


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _calls(*codes: str) -> list[int]:
    """Python functions called by each piece of code, in one fresh interpreter: work, whatever machine does it."""
    counted = [
        f"n = 0\nsys.setprofile(count)\n{code}\nsys.setprofile(None)\nseen.append(n)" for code in codes
    ]
    out = _python("\n".join(["import sys", COUNT, "seen = []", *counted, "print('CALLS', *seen)"]))
    return [int(calls) for calls in out.rpartition("CALLS ")[2].split()]


def _modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded once `code` has run in a fresh interpreter."""
    tail = "import sys as _s; print('\\nMODULES', *{name.split('.')[0] for name in _s.modules})"
    return set(_python(f"{code}\n{tail}").rpartition("MODULES ")[2].split())


def test_help_takes_little_work():
    (calls,) = _calls(HELP)
    assert 1000 < calls <= HELP_LIMIT


def test_help_loads_nothing_heavy():
    loaded = _modules_after(HELP)
    assert "open_mythos" in loaded
    assert not loaded & HEAVY


def test_import_adds_little_to_torch():
    torch_calls, calls = _calls("import torch", "from open_mythos import MythosConfig, OpenMythos")
    assert 1000 < calls <= IMPORT_SHARE * torch_calls


def test_import_loads_only_torch():
    loaded = _modules_after("from open_mythos import MythosConfig, OpenMythos")
    assert "torch" in loaded
    assert not loaded & (HEAVY - {"torch", "numpy"} | {"typer", "rich"})
