"""The figure of MLA against GQA: bits per byte against the bytes that a cached token takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from matplotlib.lines import Line2D

from open_mythos.analysis.style import COLOURS, QUIET, Figure, new_figure, styled, ticker
from open_mythos.reproduce.targets import Record

__all__ = ["trade"]

_MARKS = "osD^vP"
_WORDS = {"every-loop": "a cache for every loop", "last-loop": "the last loop's alone"}


@styled
def trade(rows: Mapping[str, Sequence[Record]], titles: Mapping[str, str], title: str) -> Figure:
    """Median over seeds, with the range as a bar: filled for every loop's cache, open for the last loop's.

    Args:
        rows: scored records of every attention.
        titles: of the rows.
        title: of the figure.
    """
    figure, ax = new_figure((7.2, 4.4))
    for index, records in enumerate(rows.values()):
        colour = COLOURS[index] if index < len(COLOURS) else QUIET
        for policy in _WORDS:
            found = [record["measured"]["bits"][policy] for record in records]
            values = [value for value in found if value is not None]
            if not values:
                continue
            x, middle = records[0]["measured"]["bytes"][policy], median(values)
            spread = [[middle - min(values)], [max(values) - middle]]
            face = colour if policy == "every-loop" else "white"
            ax.errorbar(
                [x],
                [middle],
                yerr=spread,
                fmt=_MARKS[index % 6],
                color=colour,
                mfc=face,
                ms=7,
                capsize=3,
                lw=1.2,
            )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("cache, bytes a token (bfloat16)")
    ax.set_ylabel("bits per byte (lower is better)")
    handles = [
        Line2D(
            [],
            [],
            ls="",
            marker=_MARKS[i % 6],
            color=COLOURS[i] if i < len(COLOURS) else QUIET,
            label=titles[row],
        )
        for i, row in enumerate(rows)
    ]
    handles += [
        Line2D([], [], ls="", marker="o", color=QUIET, mfc=face, label=words)
        for face, words in ((QUIET, _WORDS["every-loop"]), ("white", _WORDS["last-loop"]))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure
