"""The figure of an experiment on a grid: a panel for each value of one axis, along the other, a line for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.lines import Line2D

from open_mythos.analysis.style import COLOURS, QUIET, Figure, level, styled, ticker
from open_mythos.reproduce.figures import panels
from open_mythos.reproduce.grid import ROW, cells
from open_mythos.reproduce.targets import Record

__all__ = ["lines"]

_MARKS = "osD^vP"
Pick = Callable[[Record], float | None]


@styled
def lines(
    records: Sequence[Record],
    pick: Pick,
    *,
    panel: str,
    along: str,
    titles: Mapping[str, str],
    title: str,
    xlabel: str,
    ylabel: str,
    unit: str = "",
    levels: Sequence[tuple[str, float]] = (),
    log: bool = False,
) -> Figure:
    """Median over seeds as a line, the range as a band. A run whose number is None is a cross at the upper edge.

    Args:
        records: with a place in the grid.
        pick: the number of a record that is drawn.
        panel: the axis with a panel for each value.
        along: the axis from left to right.
        titles: of the rows.
        title: of the figure.
        xlabel: of every panel.
        ylabel: of the left panel.
        unit: behind a panel's value in its title.
        levels: name and value of dashed lines.
        log: the vertical axis is logarithmic.
    """
    by_panel = cells(records, panel)
    figure, axes = panels(len(by_panel))
    rows = list(cells(records, ROW))
    for ax, ((value,), some) in zip(axes, by_panel.items(), strict=True):
        ticks = [name for (name,) in cells(records, along)]
        for (row,), own in cells(some, ROW).items():
            _line(ax, own, pick, along, ticks, rows.index((row,)))
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set_xlim(-0.3, len(ticks) - 0.7)
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        ax.set_xlabel(xlabel)
        ax.set_title(f"{value}{unit}", pad=12)
        for name, height in levels:
            level(ax, height, name)
    axes[0].set_ylabel(ylabel)
    marks = [
        Line2D([], [], color=_colour(i), marker=_MARKS[i % 6], label=titles.get(row, row))
        for i, (row,) in enumerate(rows)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 4))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _colour(index: int) -> str:
    return COLOURS[index] if index < len(COLOURS) else QUIET


def _line(
    ax: Any, records: Sequence[Record], pick: Pick, along: str, ticks: Sequence[str], index: int
) -> None:
    found = {ticks.index(name): [pick(r) for r in some] for (name,), some in cells(records, along).items()}
    known = {x: [v for v in values if v is not None] for x, values in found.items()}
    known = {x: values for x, values in sorted(known.items()) if values}
    colour, mark = _colour(index), _MARKS[index % 6]
    if known:
        places = list(known)
        ax.plot(places, [median(values) for values in known.values()], marker=mark, color=colour)
        low, high = [min(values) for values in known.values()], [max(values) for values in known.values()]
        ax.fill_between(places, low, high, color=colour, alpha=0.16, linewidth=0)
    if lost := [x for x, values in found.items() if None in values]:
        ax.plot(
            lost, [0.97] * len(lost), "x", color=colour, transform=ax.get_xaxis_transform(), clip_on=False
        )
