"""Experiments whose arms are crossed with axes: every arm at every learning rate, at every number of loops, …

    [experiment.options.grid.lr]
    "3e-4" = { "optim.lr" = 3e-4 }
    "1e-3" = { "optim.lr" = 1e-3 }

makes of each [arms.ARM] the arms "ARM-3e-4" and "ARM-1e-3". Several axes give every combination, in their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from open_mythos.reproduce.base import Arm, Experiment, changes
from open_mythos.reproduce.runs import Run
from open_mythos.reproduce.targets import Record
from open_mythos.training.checks import error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ROW", "Grid", "cells"]

_BETWEEN = " · "
ROW = "row"


@dataclass(frozen=True)
class Grid(Experiment):
    """Crosses its arms with the axes in ``options["grid"]``.

    What a run measures names its place, ``{"row": the arm as the TOML has it, axis: value, …}``, so that tables and
    figures can be made from records alone.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"grid": {}}

    def __post_init__(self) -> None:
        axes = self.options.get("grid", {})
        arms = {arm.name: arm for row in self.arms.values() for arm in _crossed(row, axes)}
        # What the grid says is in each arm; among the options it would be part of every run's identity.
        plain = {name: value for name, value in self.options.items() if name != "grid"}
        object.__setattr__(self, "arms", arms)
        object.__setattr__(self, "options", plain)

    def perform(self, run: Run, split: str) -> Record:
        """As of every experiment, with the run's place in the grid."""
        return {"place": run.options["place"], **super().perform(run, split)}

    def title_of(self, record: Record) -> str:
        """The title that the TOML gives to the record's row."""
        return self.arms[record["arm"]].title.split(_BETWEEN)[0]

    def lines(self, records: Sequence[Record], pick: Callable[[Record], float | None], **how: Any) -> Figure:
        """:func:`~open_mythos.reproduce.grid_figures.lines` under the experiment's own titles."""
        from open_mythos.reproduce.grid_figures import lines

        titles = {record["measured"]["place"][ROW]: self.title_of(record) for record in records}
        return lines(records, pick, titles=titles, title=self.title, **how)


def cells(records: Sequence[Record], *axes: str) -> dict[tuple[str, ...], list[Record]]:
    """Records by these parts of their place, "row" among them, in the order in which they come."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        place = record["measured"]["place"]
        found.setdefault(tuple(place[axis] for axis in axes), []).append(record)
    return found


def _crossed(arm: Arm, axes: Any) -> Iterator[Arm]:
    """The arm at every combination; itself when there are no axes."""
    if not axes:
        yield arm
        return
    for values in itertools.product(*(_values(name, table) for name, table in axes.items())):
        at = {axis: value for axis, (value, _) in zip(axes, values, strict=True)}
        place = {ROW: arm.name, **at}
        yield replace(
            arm,
            name="-".join(place.values()),
            title=_BETWEEN.join([arm.title, *(f"{axis} {value}" for axis, value in at.items())]),
            options={**arm.options, "place": place},
            changes=(*(change for _, some in values for change in some), *arm.changes),
        )


def _values(axis: str, table: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """Name and overrides of each value on an axis."""
    where = f"experiment.options.grid.{axis}"
    if not isinstance(table, Mapping) or not table or not all(isinstance(v, Mapping) for v in table.values()):
        raise error(where, table, 'a table of overrides, such as "3e-4" = { "optim.lr" = 3e-4 }')
    return [(value, changes(f"{where}.{value}", some)) for value, some in table.items()]
