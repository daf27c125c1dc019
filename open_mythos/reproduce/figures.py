"""The default figure: quality against loops, a panel for each difficulty, a line for each arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.lines import Line2D

from open_mythos.analysis.findings import unit_of
from open_mythos.analysis.style import (
    COLOURS,
    QUIET,
    SHADE,
    Figure,
    FigureCanvasAgg,
    above,
    loop_axis,
    styled,
    ticker,
)
from open_mythos.reproduce.tables import level_name
from open_mythos.reproduce.targets import Record, by_arm

__all__ = ["panels", "quality"]

_MARKS = "osD^vP"


def panels(count: int, size: tuple[float, float] = (4.3, 3.6)) -> tuple[Figure, list[Any]]:
    """A figure with so many axes beside each other, two rows of them from four on; each of this size in inches."""
    columns = count if count <= 3 else math.ceil(count / 2)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.6, size[0] * columns), size[1] * rows + 0.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


@styled
def quality(records: Sequence[Record], titles: Mapping[str, str], title: str) -> Figure:
    """Median over seeds as a line, the range from the worst to the best seed as a band.

    Args:
        records: with curves; see :func:`open_mythos.reproduce.base.curves`.
        titles: of the arms.
        title: of the figure.
    """
    arms = by_arm(records)
    first = records[0]["measured"]
    levels = list(first["curves"])
    figure, axes = panels(len(levels))
    for ax, level in zip(axes, levels, strict=True):
        for index, some in enumerate(arms.values()):
            if level in some[0]["measured"]["curves"]:
                _line(ax, some, level, index)
        _dress(ax, records, level_name(level, first))
    axes[0].set_ylabel(_unit(first["metric"]))
    if len(arms) > 1:
        marks = [
            Line2D([], [], color=_colour(i), marker=_MARKS[i % 6], label=titles[arm])
            for i, arm in enumerate(arms)
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(len(arms), 4))
    counts = sorted({len(some) for some in arms.values()})
    seeds = " or ".join(map(str, counts))
    spread = f", median and range of {seeds} seeds" if counts[-1] > 1 else ""
    figure.suptitle(f"{title}{spread}", x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _colour(index: int) -> str:
    """Six colours that can be told apart; further arms are grey, and differ by their marks."""
    return COLOURS[index] if index < len(COLOURS) else QUIET


def _line(ax: Any, records: Sequence[Record], level: str, index: int) -> None:
    loops = records[0]["measured"]["loops"]
    found = [r["measured"]["curves"][level] for r in records if r["measured"]["loops"] == loops]
    columns = [[v for v in column if v is not None] for column in zip(*found, strict=True)]
    shown = [(n, column) for n, column in zip(loops, columns, strict=True) if column]
    if not shown:
        return
    counts = [n for n, _ in shown]
    colour = _colour(index)
    if len(counts) == 1:  # it never loops: its one value holds for all loop counts
        ax.axhline(median(shown[0][1]), color=colour, linestyle=(0, (4, 3)))
        return
    ax.plot(counts, [median(c) for _, c in shown], marker=_MARKS[index % 6], color=colour)
    low, high = [min(c) for _, c in shown], [max(c) for _, c in shown]
    ax.fill_between(counts, low, high, color=colour, alpha=0.16, linewidth=0)


def _dress(ax: Any, records: Sequence[Record], name: str) -> None:
    """Axes, the trained loops of the first arm as a shade, and a name."""
    every = sorted({n for record in records for n in record["measured"]["loops"]})
    low, high = loop_axis(ax, every)
    most = (records[0].get("loops") or {}).get("max")
    if most is not None and most < every[-1]:
        ax.axvspan(low, most, color=SHADE, zorder=0)
        above(ax, math.sqrt(low * most), "trained loops")
        above(ax, math.sqrt(most * high), "more")
    if records[0]["measured"]["metric"] == "accuracy":
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        ax.set_ylim(top=1.02)
    ax.set_title(name, pad=20)


def _unit(metric: str) -> str:
    return "answers right" if metric == "accuracy" else f"{unit_of(metric)} (lower is better)"


@styled
def one_arm(records: Sequence[Record], title: str) -> Figure:
    """One arm in one panel: a line for each difficulty, median and range over seeds."""
    first = records[0]["measured"]
    figure, (ax,) = panels(1, (5.6, 3.6))
    levels = list(first["curves"])
    for index, level in enumerate(levels):
        _line(ax, records, level, index)
    _dress(ax, records, "")
    ax.set_ylabel(_unit(first["metric"]))
    marks = [
        Line2D([], [], color=_colour(i), marker=_MARKS[i % 6], label=level_name(level, first))
        for i, level in enumerate(levels)
    ]
    ax.legend(handles=marks, loc="best")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure
