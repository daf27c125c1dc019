"""The pages say what is so: fields and defaults, files, tests, commands and names exist, and their Python runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer

import open_mythos
from open_mythos import MythosConfig, OpenMythos
from open_mythos.cli import app
from open_mythos.config import field_types
from open_mythos.weights import to_upstream_state_dict

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]
WITH_PYTHON = [
    f"docs/{name}.md"
    for name in ("architecture", "data", "exits", "inference", "migrating", "model", "speculation")
]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What people run writes here; nothing of it is in the repository.
WRITTEN = ("runs/", "peer/")
TOP = r"open_mythos|tests|docs|configs|benchmarks|notebooks|\.ci"
PATH = re.compile(rf"(?:{TOP})/[\w./*-]*\w|[\w.-]+\.(?:md|toml|cfg)\b|Makefile|constraints\.txt")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code(text: str) -> Iterator[str]:
    """Every code span, and every line of a fenced or indented block, comments taken off."""
    for _, block in FENCE.findall(text):
        yield from block.splitlines()
    for line in FENCE.sub("", text).splitlines():
        if line.startswith("    "):
            yield re.sub(r"\s+# .*", "", line).strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


# What is looked for. Each gives a sentence about everything that is not there.


def missing_files(text: str, folder: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target and not (folder / target).exists():
            yield f"the link to {target} leads nowhere"
    for span in code(text):
        for name in span.split():
            path, _, test = name.strip("\"',;()").partition("::")
            if not PATH.fullmatch(path) or path.startswith(WRITTEN):
                continue
            found = list(ROOT.glob(path)) or list(folder.glob(path))
            if not found:
                yield f"{path} does not exist"
            elif test and f"def {test}(" not in found[0].read_text(encoding="utf-8"):
                yield f"{path} has no test {test}"


def missing_commands(text: str, _: Path) -> Iterator[str]:
    targets = re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE)
    commands: Any = typer.main.get_command(app)
    for span in code(text):
        words = span.split()
        program = os.path.basename(words[0]) if words else ""
        if program == "make" and len(words) > 1:
            yield from (
                f"make has no {w}" for w in words[1:] if re.fullmatch("[a-z]+", w) and w not in targets
            )
        if program == "mythos" and len(words) > 1 and not words[1].startswith(("-", "{")):
            if words[1] not in commands.commands:
                yield f"mythos has no command {words[1]}"
                continue
            known = {o for p in commands.commands[words[1]].params for o in p.opts} | {
                "--help",
                "-h",
                "--debug",
            }
            yield from (
                f"mythos {words[1]} has no option {w}" for w in words if w[0] == "-" and w not in known
            )
        module = words[2] if program.startswith("python") and words[1:2] == ["-m"] else ""
        if module.startswith("open_mythos") and importlib.util.find_spec(module) is None:
            yield f"{module} is no module"


def missing_names(text: str, _: Path) -> Iterator[str]:
    for span in code(text):
        for name in re.findall(r"\bmythos_[0-9a-z]+\b", span):
            if name not in open_mythos.__all__:
                yield f"open_mythos has no {name}"
        if re.fullmatch(r"open_mythos(\.\w+)+", span) and not resolves(span):
            yield f"{span} cannot be imported"
        for names in re.findall(r"from open_mythos import ([\w, ]+)", span):
            yield from (f"open_mythos has no {n}" for n in names.split(", ") if n not in open_mythos.__all__)


def resolves(name: str) -> bool:
    thing: Any = open_mythos
    for i, part in enumerate(parts := name.split(".")[1:]):
        if not hasattr(thing, part):
            try:
                importlib.import_module(".".join(["open_mythos", *parts[: i + 1]]))
            except ModuleNotFoundError:
                return False
        thing = getattr(thing, part)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_named_on_a_page_exist(page: str) -> None:
    assert not list(missing_files(read(page), (ROOT / page).parent))


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_a_page_exist(page: str) -> None:
    assert not list(missing_commands(read(page), ROOT))


@pytest.mark.parametrize("page", PAGES)
def test_names_on_a_page_exist(page: str) -> None:
    # `open_mythos.moda` is named because it is not there.
    found = [line for line in missing_names(read(page), ROOT) if "open_mythos.moda" not in line]
    assert not found


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (missing_files, "see [x](nowhere.md)"),
        (missing_files, "see `docs/nowhere.md`"),
        (missing_files, "see `tests/unit/test_docs.py::test_nothing`"),
        (missing_files, "run `python benchmarks/nothing.py`"),
        (missing_commands, "    make nothing    # comment"),
        (missing_commands, "```\n.venv/bin/mythos trian configs/smoke.toml\n```"),
        (missing_commands, "`mythos train configs/smoke.toml --nothing`"),
        (missing_commands, "`python -m open_mythos.nothing`"),
        (missing_names, "`mythos_7b()`"),
        (missing_names, "`open_mythos.weights.nothing`"),
        (missing_names, "```python\nfrom open_mythos import OpenMythos, Nothing\n```"),
    ],
)
def test_what_is_not_there_is_reported(check: Callable[[str, Path], Iterator[str]], text: str) -> None:
    assert len(list(check(text, ROOT))) == 1


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", read("docs/index.md")))
    assert listed == {path.name for path in ROOT.glob("docs/*.md")} - {"index.md"}


def rows(text: str) -> Iterator[list[str]]:
    """Cells of every table row whose first cell is one name in backticks."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if re.fullmatch(r"\| `\w+` \|.*\|", line):
            yield [cells[0].strip("` "), *cells[1:]]


def shown(value: object) -> str:
    return f'`"{value}"`' if isinstance(value, str) else str(value)


def test_every_config_field_has_its_row_with_its_default_and_preset() -> None:
    text = read("docs/model.md").partition("## Every field of MythosConfig")[2]
    fields, types, preset = dataclasses.fields(MythosConfig), field_types(), MythosConfig.upstream().to_dict()
    table = list(rows(text))
    assert sorted(row[0] for row in table) == sorted(field.name for field in fields)
    for row in table:
        field = next(field for field in fields if field.name == row[0])
        assert row[1] == shown(field.default), row[0]
        if len(row) == 5:
            assert row[2] == shown(preset[field.name]), row[0]
        else:
            assert preset[field.name] == field.default, f"{field.name} belongs in the table with presets"
        choices = [choice for choice in get_args(types[field.name]) if isinstance(choice, str)]
        if choices:
            assert sorted(row[-2].split(", ")) == sorted(shown(choice) for choice in choices)


def test_the_rooms_are_those_of_the_import_table() -> None:
    table = runpy.run_path(str(ROOT / "tests/unit/test_imports.py"))["TABLE"]
    found = list(rows(read("docs/architecture.md").partition("## Three ways in")[0]))
    assert {row[0] for row in found if len(row) == 2} == set(table)
    allowed = {row[0]: [re.findall(r"`(\w+)`", cell) for cell in row[1:]] for row in found if len(row) == 3}
    assert allowed == {room: [row.rooms.split(), row.packages.split()] for room, row in table.items()}


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = MythosConfig.upstream(
        vocab_size=16, dim=8, n_heads=2, n_kv_heads=1, attn_type="gqa", max_seq_len=8, n_experts=2,
        n_experts_per_tok=1, expert_dim=4, n_shared_experts=1, prelude_layers=1, coda_layers=1, lora_rank=2,
    )  # fmt: skip
    torch.save(to_upstream_state_dict(OpenMythos(cfg)), "upstream.pt")
    blocks = [block for language, block in FENCE.findall(read(page)) if language == "python"]
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_readmes_ten_lines_run() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code[0], names)
    assert len(code[0].splitlines()) <= 10
    assert tuple(names["more"].shape) == (1, 40)  # type: ignore[attr-defined]
    assert tuple(names["deep"].shape) == (1, 32, 259)  # type: ignore[attr-defined]


def _judged(name: str, label: str) -> dict[str, Any]:
    result = json.loads((ROOT / f"docs/results/reproduce/{name}.json").read_text(encoding="utf-8"))
    return next(figure for figure in result["verdict"]["figures"] if figure["label"] == label)


def _percent(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f}"


def test_the_readmes_figures_are_those_of_the_result_files() -> None:
    page = read("README.md")
    digits = _judged("digit_chain", "6 to 8 digits, best loops")
    median, least, most = (_percent(digits[key], 1) for key in ("median", "min", "max"))
    assert digits["n"] == 6
    assert f"6 to 8 digits, six seeds | {median} % ({least} to {most} %)" in page
    khop = _judged("khop", "8th hop, 16 loops")
    assert khop["n"] == 6
    assert f"six seeds | median {_percent(khop['median'], 0)} %" in page
    spent, bits = (
        _judged("exits", "loops, of full depth"),
        _judged("exits", "bits, of full depth (the mean of the training)"),
    )
    assert spent["n"] == bits["n"] == 3
    assert (
        f"three seeds | {_percent(spent['median'], 0)} % of the loops, {_percent(bits['median'] - 1, 2)} % more bits"
        in page
    )
    experts = _judged("experts", "runs in which every expert takes at least 0.5 × its fair share")
    assert experts["n"] == 90
    assert f"six seeds | at worst {experts['min']:.2f};" in page
    long = _judged("parity", "512 bits, best loops")
    assert f"512 bits are read with 256 loops ({_percent(long['median'], 2)} %" in page
    decode = json.loads(read("docs/results/inference_gpu.json"))[-1]
    for batch in (1, 16):
        ms = [decode[f"decode_{kind}_{batch}"]["ms_per_token"] for kind in ("mla", "gqa")]
        assert "{:.2f} and {:.2f} ms".format(*ms) in page
    drafts = json.loads(read("docs/results/speculation.json"))["rows"]
    (gain,) = (
        row["speedup"] for row in drafts if "speedup" in row and (row["dtype"], row["batch"]) == ("bf16", 1)
    )
    assert f"{gain:.2f} times as fast" in page
