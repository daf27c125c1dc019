"""What holds for the repository as a whole."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from open_mythos import demo

# Folders that exist on one machine only. Written so that this file does not match itself.
MACHINE_PATH = r"(^|[^[:alnum:]_./-])/((work|root|opt|home|Users)/[[:alnum:]_.]|tmp/[[:alnum:]_])"


def _machine_paths(folder: Path) -> list[str]:
    """Lines of files that git tracks, or would track, which hold a path of some machine."""
    command = ["git", "-C", str(folder), "grep", "--untracked", "-nIE", "-e", MACHINE_PATH]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout.splitlines()


def test_no_file_holds_a_machine_path(root: Path):
    found = _machine_paths(root)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["work", "root", "opt", "home", "Users", "tmp"])
def test_a_machine_path_is_found(tmp_path: Path, folder: str):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "good.md").write_text(f"see docs/{folder}/x, a/{folder}/b and ./tmp/c\n", encoding="utf-8")
    assert _machine_paths(tmp_path) == []
    (tmp_path / "bad.md").write_text(f"open '/{folder}/main/x'\n", encoding="utf-8")
    assert [line.split(":")[0] for line in _machine_paths(tmp_path)] == ["bad.md"]


def _pyproject(root: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def _declared(root: Path) -> set[str]:
    """Names of the dependencies in pyproject.toml, core and extras."""
    project = _pyproject(root)["project"]
    lines = project["dependencies"] + [
        x for extra in project["optional-dependencies"].values() for x in extra
    ]
    return {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in lines}


def test_every_dependency_has_its_reason_and_its_pin(root: Path):
    declared = _declared(root)
    reasons = re.findall(
        r"^\| `([\w-]+)` \|", (root / "docs/dependencies.md").read_text("utf-8"), re.MULTILINE
    )
    assert set(reasons) == declared | {"hatchling"}
    pins = re.findall(r"^([\w-]+)==", (root / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert declared <= set(pins)


def test_the_demo_finds_its_configs_in_a_checkout_and_in_a_wheel(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert demo.configs_folder() == root / "configs"
    (source, target), *others = _pyproject(root)["tool"]["hatch"]["build"]["targets"]["wheel"][
        "force-include"
    ].items()
    assert not others
    # A wheel, unpacked: the package, and what is forced into it.
    shutil.copytree(root / source, tmp_path / target)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "open_mythos" / "demo.py"))
    assert demo.configs_folder() == tmp_path / "open_mythos" / "configs"
