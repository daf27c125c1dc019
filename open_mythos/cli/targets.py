"""What commands are pointed at: run directories, saved models, configs, variants, lists of counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_mythos.config import ConfigError, MythosConfig

__all__ = ["loop_counts", "model_folder", "resolve", "run_record"]


def loop_counts(name: str, text: str) -> list[int]:
    """Whole numbers with commas between, sorted, each once."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ConfigError(
            f"{name} = {text!r} is not allowed: it must be whole numbers of at least 1, with commas"
        )
    return counts


def run_record(run: Path) -> dict[str, Any]:
    """run.json of a run directory."""
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{str(run)!r} is not a run directory: it must hold a run.json") from error
    except ValueError as error:
        raise ConfigError(f"{run / 'run.json'} is damaged: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"{run / 'run.json'} is damaged: it holds no config")
    return record


def model_folder(path: Path) -> Path:
    """The saved model of a run directory, or the saved model itself."""
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return folder
    if (path / "run.json").is_file():
        way = f"wait for the end of its training, or take a checkpoint: mythos export {path}"
        raise ConfigError(f"{str(path)!r} has no saved model yet: {way}")
    raise ConfigError(
        f"{str(path)!r} is not a run directory or a saved model: it must hold run.json or config.json"
    )


def resolve(target: str) -> tuple[MythosConfig, Path | None]:
    """The config behind a variant's name, a TOML file, a run or a model; and the saved model, if any."""
    from open_mythos.variants import VARIANTS

    if target in VARIANTS:
        return VARIANTS[target](), None
    path = Path(target)
    if path.is_dir():
        folder = model_folder(path)
        return MythosConfig.from_json((folder / "config.json").read_text(encoding="utf-8")), folder
    if path.suffix == ".toml":
        from open_mythos.training.config import load_config

        return load_config(path).model, None
    import difflib

    close = difflib.get_close_matches(target, VARIANTS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the variants are {', '.join(VARIANTS)}"
    raise ConfigError(f"{target!r} is not a variant, a .toml config, a run or a saved model; {hint}")
