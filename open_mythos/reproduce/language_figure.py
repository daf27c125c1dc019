"""The figure of the language experiment: bits per byte over loops, whole and near its best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.lines import Line2D

from open_mythos.analysis.style import COLOURS, QUIET, Figure, loop_axis, styled
from open_mythos.reproduce.figures import panels
from open_mythos.reproduce.targets import Record, by_arm, value

__all__ = ["draw"]

_MARKS = "osD^vP"


@styled
def draw(records: Sequence[Record], titles: Mapping[str, str], title: str) -> Figure:
    """Every arm over loops, and again with the axis cut to what lies near the best; dense models are level lines.

    Args:
        records: of any arms; see :meth:`open_mythos.reproduce.language.Language.measure`.
        titles: of the arms.
        title: of the figure.
    """
    arms = by_arm(records)
    looped = [arm for arm, some in arms.items() if len(some[0]["measured"]["loops"]) > 1]
    styles = {
        arm: _style(looped.index(arm) if arm in looped else None, index) for index, arm in enumerate(arms)
    }
    every = sorted({loops for record in records for loops in record["measured"]["loops"]})
    figure, axes = panels(2, (4.6, 3.6))
    for ax in axes:
        for arm, some in arms.items():
            _line(ax, [record["measured"] for record in some], styles[arm])
        loop_axis(ax, every)
    axes[0].set_ylabel("bits per byte (lower is better)")
    low, high = _near(records)
    axes[1].set_ylim(low, high)
    axes[0].set_title("all")
    axes[1].set_title("near the best")
    marks = [Line2D([], [], label=titles.get(arm, arm), **styles[arm]) for arm in arms]
    figure.legend(handles=marks, loc="outside lower center", ncols=2)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _style(looped: int | None, index: int) -> dict[str, Any]:
    """Colour and mark of a looped arm; dashes of a dense one."""
    if looped is not None:
        colour = COLOURS[looped] if looped < len(COLOURS) else QUIET
        return {"color": colour, "marker": _MARKS[looped % len(_MARKS)]}
    dashes = ((0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)))[index % 4]
    return {"color": COLOURS[-1 - index % len(COLOURS)], "linestyle": dashes}


def _line(ax: Any, found: Sequence[Mapping[str, Any]], style: Mapping[str, Any]) -> None:
    """The median over seeds, and the range between them as a band."""
    loops = found[0]["loops"]
    columns = list(zip(*(_bits(m) for m in found if m["loops"] == loops), strict=True))
    if len(loops) == 1:
        ax.axhline(median(columns[0]), **style)
        return
    ax.plot(loops, [median(column) for column in columns], **style)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    ax.fill_between(loops, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _bits(measured: Mapping[str, Any]) -> list[float]:
    return [math.nan if bits is None else bits for bits in measured["curves"]["trained"]]


def _near(records: Sequence[Record]) -> tuple[float, float]:
    """From a little below the best of all to a little above the worst of the arms' bests, and what ours has at a few
    loops less than its best.
    """
    bests = [best for record in records if (best := value(record)) is not None] or [0.0]
    first = [record["measured"] for record in records if record["arm"] == records[0]["arm"]]
    falls = [bits for m in first for bits in m["curves"]["trained"][2:4] if bits is not None]
    low, high = min(bests), max(median(bests), *falls) if falls else max(bests)
    margin = 0.08 * (high - low) or 0.01
    return low - margin, high + margin
