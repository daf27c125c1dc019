"""Reading the end of a metrics file that another process may be writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["last_record"]

_TAIL_BYTES = 4096  # more than one record


def last_record(path: Path) -> dict[str, Any]:
    """The newest whole record; empty if there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            return record
    return {}
