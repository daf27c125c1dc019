"""The tutorial runs from top to bottom, says the same numbers twice, and is stored without outputs."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

SECONDS = 120


@pytest.fixture(scope="module")
def notebook(root: Path) -> nbformat.NotebookNode:
    return nbformat.read(root / "notebooks" / "tutorial.ipynb", as_version=4)


def _code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def _in_process(cells: list[str]) -> str:
    """What the cells print when they run one after the other in this process, pictures left out."""
    space: dict[str, object] = {"__name__": "__main__"}
    printed = io.StringIO()
    state, threads = (torch.get_rng_state(), random.getstate()), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(printed):
            for i, source in enumerate(cells):
                if "\nshow(" in f"\n{source}":
                    continue
                exec(compile(source, f"cell {i}", "exec"), space)
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        torch.set_num_threads(threads)
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "default"
)  # of the kernel's own libraries; the cells run under "error" in process
def test_notebook_runs_and_prints_the_same_numbers_twice(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPEN_MYTHOS_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fresh = nbformat.from_dict(notebook)
    NotebookClient(fresh, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in fresh.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/svg+xml" in output.get("data", {})]
    assert len(pictures) == sum("\nshow(" in f"\n{source}" for source in _code(notebook)) >= 6
    assert "73,728 bytes" in printed
    assert "inside (0, 1): True" in printed
    assert "the same seed, the same draws: True" in printed
    assert _in_process(_code(notebook)) == printed


def test_notebook_is_stored_without_outputs(notebook: nbformat.NotebookNode):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_notebook_covers_the_steps_of_the_tutorials(notebook: nbformat.NotebookNode):
    text = "\n".join(cell.source for cell in notebook.cells)
    for name in (
        "pip", "parameters(", "kv_cache=cache", "spectral_radius(", "rescale_spectral_radius(", "lr=1.0",
        "Parity(", "DigitChain(", "recurrent.act.forward", "expert_loads", ".generate(",
    ):  # fmt: skip
        assert name in text, name
