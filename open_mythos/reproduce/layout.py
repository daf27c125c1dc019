"""JSON that is read and compared by people: what fits on a line stands on one, and long lists fill their lines."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["layout"]

_WIDTH = 110


def layout(value: Any) -> str:
    """The JSON text of a value, as few lines as stay readable.

    An object or a list goes on one line if it fits there. Otherwise an object has a line, or several, for each
    key, and so has a list for each item, unless every item is short enough for a line: those fill lines together.

    Raises:
        ValueError: it holds NaN or infinity.
        TypeError: it holds what JSON has no form for.
    """
    # Read back, since JSON has one kind of list and of key.
    return _laid_out(json.loads(json.dumps(value, allow_nan=False)), 0, 0)


def _laid_out(value: Any, indent: int, used: int) -> str:
    """The text of a value whose lines are indented by so much, where so much of the first line is taken."""
    flat = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, (dict, list)) or used + len(flat) < _WIDTH:
        return flat
    if isinstance(value, dict):
        return _closed("{}", [_entry(key, held, indent + 1) for key, held in value.items()], indent)
    items = [_laid_out(item, indent + 1, indent + 2) for item in value]
    return _closed("[]", items if any("\n" in item for item in items) else _filled(items, indent + 1), indent)


def _entry(key: str, value: Any, indent: int) -> str:
    head = json.dumps(key, ensure_ascii=False) + ": "
    return head + _laid_out(value, indent, indent + len(head) + 1)


def _filled(items: list[str], indent: int) -> list[str]:
    """Neighbours joined while they fit on a line."""
    lines = items[:1]
    for item in items[1:]:
        joined = f"{lines[-1]}, {item}"
        if indent + len(joined) < _WIDTH:
            lines[-1] = joined
        else:
            lines.append(item)
    return lines


def _closed(brackets: str, items: list[str], indent: int) -> str:
    """Items on lines of their own between brackets."""
    start, end = "\n" + " " * (indent + 1), "\n" + " " * indent
    return brackets[0] + start + f",{start}".join(items) + end + brackets[1]
