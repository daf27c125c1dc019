"""Who may import whom: the table of rooms, enforced over every import statement, lazy ones included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "open_mythos"


class Row(NamedTuple):
    """What one room may import besides itself and the standard library."""

    rooms: str = ""
    packages: str = ""


# One row per room: a folder of open_mythos, or a file beside __init__.py. Moving a wall means changing this
# table, and saying why in the commit. Training and inference never import each other; the model knows nothing
# of data, sampling or tokenizers. `__init__` holds the public names and must stay light.
TABLE = {
    "config": Row(),
    "accounting": Row("config"),
    "variants": Row("config accounting"),
    "ops": Row("fused kernels_gpu", "torch"),
    "expert_ops": Row("fused kernels_gpu ops", "torch"),
    "fused": Row("kernels", "torch"),
    "kernels": Row(packages="torch"),
    "kernels_gpu": Row(packages="torch triton"),
    "rows": Row(packages="torch triton"),
    "capture": Row(packages="torch"),
    "model": Row("config expert_ops kernels ops", "torch"),
    "main": Row("config model ops", "torch"),
    "tokenizer": Row("config", "tokenizers transformers"),
    "weights": Row("config model", "numpy safetensors torch"),
    "tasks": Row("config", "torch"),
    "training": Row(
        "accounting capture config model tasks tokenizer variants weights",
        "datasets numpy pyarrow rich safetensors tomli torch trackio wandb",
    ),
    "inference": Row("capture config model rows tokenizer weights", "numpy torch"),
    "analysis": Row("accounting config inference model tasks tokenizer weights", "matplotlib numpy torch"),
    "reproduce": Row(
        "__init__ accounting analysis config inference kernels main model ops tables tasks tokenizer training "
        "variants weights",
        "matplotlib numpy rich torch typer",
    ),
    "demo": Row("config training", "rich"),
    "tables": Row("accounting config", "rich"),
    "__init__": Row("analysis config inference model tokenizer training variants weights", "torch"),
    "cli": Row(
        "__init__ accounting analysis config demo inference kernels main model ops reproduce tables tasks "
        "tokenizer training variants weights",
        "numpy rich tomli torch typer",
    ),
}

# (file, enclosing function, module): published code calls `model.generate`, so that method opens one door to
# the sampling code, on use.
DOORS = {("model/transformer.py", "generate", "open_mythos.inference.generate")}

# Rooms that may import a module whose name is only known at run time: to be light at start-up, and in `reproduce`
# because an experiment's TOML names its class.
DYNAMIC = {"__init__", "cli", "reproduce"}


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands, and the function around it (empty at module level)."""

    module: str
    line: int
    function: str


class _Collector(ast.NodeVisitor):
    """Gathers every import of one file with absolute module names."""

    def __init__(self, package: list[str]) -> None:
        self.package = package
        self.function = ""
        self.found: list[Import] = []

    def add(self, module: str, node: ast.AST) -> None:
        self.found.append(Import(module, getattr(node, "lineno", 0), self.function))

    def absolute(self, level: int, module: str) -> str:
        parts = self.package[: len(self.package) - level + 1] if level else []
        return ".".join([*parts, *([module] if module else [])])

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self.function = self.function, node.name
        self.generic_visit(node)
        self.function = outer

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.absolute(node.level, node.module or "")
        for alias in node.names:
            self.add(f"{base}.{alias.name}", node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in {"import_module", "__import__"} and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                stripped = target.value.lstrip(".")
                self.add(self.absolute(len(target.value) - len(stripped), stripped), node)
            else:
                self.add("<dynamic>", node)
        self.generic_visit(node)


def imports(source: str, relative: str) -> list[Import]:
    """Every import in `source`, which stands at `relative` (a path inside open_mythos)."""
    collector = _Collector(["open_mythos", *Path(relative).parts[:-1]])
    collector.visit(ast.parse(source))
    return collector.found


def room_of(relative: str) -> str:
    """The room of a file, such as `model` for model/cache.py and `ops` for ops.py."""
    parts = Path(relative).parts
    return parts[0] if len(parts) > 1 else Path(relative).stem


def target_room(module: str) -> str:
    """The room of an imported name; a public name of the package itself belongs to `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in TABLE else "__init__"


def violations(source: str, relative: str) -> Iterator[str]:
    """One sentence for each import that the table does not allow."""
    room = room_of(relative)
    row = TABLE[room]
    for found in imports(source, relative):
        where = f"open_mythos/{relative}:{found.line}"
        top = found.module.split(".")[0]
        if found.module == "<dynamic>":
            if room not in DYNAMIC:
                yield f"{where} imports a module by a computed name; only {sorted(DYNAMIC)} may"
        elif top == "open_mythos":
            target = target_room(found.module)
            doors = [door for file, function, door in DOORS if (file, function) == (relative, found.function)]
            if any(f"{found.module}.".startswith(f"{door}.") for door in doors):
                continue
            if target != room and target not in row.rooms.split():
                yield f"{where} imports {found.module}; {room} may import {row.rooms or 'no room'}"
        elif top not in sys.stdlib_module_names and top not in row.packages.split():
            packages = row.packages or "the standard library only"
            yield f"{where} imports {found.module}; {room} may import {packages}"


def files() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_every_file_belongs_to_a_room():
    assert files(), "no Python file found under open_mythos"
    homeless = [file for file in files() if room_of(file) not in TABLE]
    assert not homeless, f"give these a row in TABLE of {Path(__file__).name}: {homeless}"


@pytest.mark.parametrize("room", TABLE)
def test_room_imports_only_what_the_table_allows(room: str):
    found = [
        line
        for file in files()
        if room_of(file) == room
        for line in violations((PACKAGE / file).read_text(encoding="utf-8"), file)
    ]
    assert not found, "\n".join(found)


def test_table_names_only_known_rooms():
    named = {name for row in TABLE.values() for name in row.rooms.split()}
    assert named <= set(TABLE)
    assert "inference" not in TABLE["training"].rooms.split()
    assert "training" not in TABLE["inference"].rooms.split()


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("config.py", "import torch"),
        ("ops.py", "from open_mythos import config"),
        ("model/cache.py", "from ..training.data import batches"),
        ("model/cache.py", "from .. import tokenizer"),
        ("model/cache.py", "from open_mythos import OpenMythos"),
        ("model/cache.py", "import open_mythos"),
        ("model/cache.py", "def f():\n    import open_mythos.weights"),
        ("model/cache.py", "import importlib\nimportlib.import_module('open_mythos.cli')"),
        ("model/cache.py", "import importlib\nimportlib.import_module('..cli', __package__)"),
        ("model/cache.py", "import importlib\nimportlib.import_module(name)"),
        ("model/cache.py", "from open_mythos.inference.generate import generate"),
        ("model/transformer.py", "from open_mythos.inference.generate import generate"),
        ("model/transformer.py", "def forward():\n    from open_mythos.inference.generate import generate"),
        ("model/transformer.py", "def generate():\n    from open_mythos.inference.engine import Engine"),
        ("training/trainer.py", "if TYPE_CHECKING:\n    from open_mythos.inference import engine"),
    ],
)
def test_a_forbidden_import_is_reported(relative: str, source: str):
    assert len(list(violations(source, relative))) == 1


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("model/cache.py", "import math\nimport torch.nn.functional as F\nfrom . import layers"),
        ("model/cache.py", "from .layers import RMSNorm\nfrom ..config import MythosConfig"),
        ("model/transformer.py", "def generate():\n    from open_mythos.inference.generate import generate"),
        ("model/transformer.py", "def generate():\n    from ..inference import generate"),
        ("__init__.py", "import importlib\nimportlib.import_module(name)"),
        ("cli.py", "def train():\n    from open_mythos.training import trainer"),
    ],
)
def test_an_allowed_import_is_not_reported(relative: str, source: str):
    assert list(violations(source, relative)) == []


def private_uses(source: str) -> Iterator[str]:
    """Names with a leading underscore that are taken from another file of the package."""
    tree, ours = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "open_mythos":
            ours |= {alias.asname or alias.name for alias in node.names}
            yield from (alias.name for alias in node.names if _private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if owner in ours:
                yield f"{owner}.{node.attr}"


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_file_takes_what_another_keeps_to_itself():
    found = [
        f"{file}: {name}" for file in files() for name in private_uses((PACKAGE / file).read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from open_mythos.ops import _secret", ["_secret"]),
        ("from open_mythos import kernels\nkernels._call(1)", ["kernels._call"]),
        ("from open_mythos import __version__, kernels\nkernels.call(self._own)", []),
        ("from torch._C import _secret", []),
    ],
)
def test_what_another_file_keeps_to_itself_is_found(source: str, found: list[str]):
    assert list(private_uses(source)) == found
