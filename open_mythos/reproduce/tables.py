"""The default table of an experiment: a row for every arm and difficulty."""

from __future__ import annotations

from collections.abc import Sequence

from open_mythos.reproduce.targets import Record, by_arm, spread, value

__all__ = ["by_level"]


def by_level(records: Sequence[Record], titles: dict[str, str]) -> Record:
    """Quality at the trained depth, at the best one and at the deepest one, median and ends over seeds.

    Args:
        records: with curves; see :func:`open_mythos.reproduce.base.curves`.
        titles: of the arms.

    Returns:
        ``columns``, ``format`` and ``rows``, as :meth:`Experiment.summary` has them.
    """
    rows = []
    for arm, some in by_arm(records).items():
        for level in some[0]["measured"]["curves"]:
            cells = [spread([value(r, level, loops) for r in some]) for loops in ("trained", "best", "last")]
            best = spread([_best_at(record, level) for record in some])
            name = level_name(level, some[0]["measured"])
            rows.append(
                {"arm": arm, "title": titles[arm], "cells": [name, cells[0], cells[1], best, cells[2]]}
            )
    share = all(record["measured"]["metric"] == "accuracy" for record in records)
    kind = "percent" if share else "plain"
    return {
        "columns": ["difficulty", "at the mean trained loops", "best", "at so many loops", "at most loops"],
        "format": ["plain", kind, kind, "plain", kind],
        "rows": rows,
    }


def level_name(level: str, measured: Record) -> str:
    """A difficulty as people say it, such as "64 bits"."""
    own = f"{measured['trained']} {measured['unit']}" if measured.get("trained") else ""
    if level == "trained":
        return f"{own} (as trained)" if own else "as trained"
    return f"{level} {measured['unit']}".strip()


def _best_at(record: Record, level: str) -> float | None:
    """The fewest loops that give the best value; None when no value is finite."""
    best = value(record, level, "best")
    if best is None:
        return None
    measured = record["measured"]
    return measured["loops"][measured["curves"][level].index(best)]
