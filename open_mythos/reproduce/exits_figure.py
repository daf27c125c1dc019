"""Pictures of exits, from records alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from open_mythos.analysis.style import (
    COLOURS,
    SCALE,
    Figure,
    FigureCanvasAgg,
    level,
    mpl,
    new_figure,
    styled,
    ticker,
)

__all__ = ["exits", "halting"]

Record = dict[str, Any]
_MARKS = "osD^vPX<>"
_WIDTH, _LINES = 96, 14


@styled
def exits(records: Sequence[Record], title: str) -> Figure:
    """Bits lost against loops in the search, loops of the best rule by difficulty, and a text coloured by loops.

    Args:
        records: of one or more seeds; the first arm's are drawn, the text of its first seed.
        title: of the figure.
    """
    records = [record for record in records if record["arm"] == records[0]["arm"]]
    first = records[0]["measured"]
    figure = Figure(figsize=(9.6, 7.2))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.05, 1))
    _trade(figure.add_subplot(grid[0, 0]), first)
    _difficulty(figure.add_subplot(grid[0, 1]), records)
    _text(figure, figure.add_subplot(grid[1, :]), first)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _trade(ax: Any, measured: Record) -> None:
    full, bits = measured["full"], measured["limit"]
    for i, rule in enumerate(measured["rules"]):
        points = sorted(rule["search"], key=lambda p: p["loops"])
        base = _full_in_search(measured)
        ax.plot(
            [p["loops"] for p in points],
            [100 * (p["bits"] / base - 1) for p in points],
            color=COLOURS[i] if i < len(COLOURS) else "#b8c2cc",
            zorder=3 if i < len(COLOURS) else 2,
            marker=_MARKS[i % len(_MARKS)],
            markersize=3.5,
            linewidth=1.3,
            linestyle="-" if rule["heeds"] else (0, (4, 3)),
            label=rule["title"],
        )
    level(ax, 100 * (bits / _full_in_search(measured) - 1), "allowed in the search")
    ax.set_ylim(-0.25, 4)
    ax.set_xlim(0.8, full + 0.2)
    ax.set_xlabel(f"mean loops per token (full depth {full})")
    ax.set_ylabel("bits lost against full depth (%)")
    ax.set_title("Validation: the price of fewer loops")
    ax.legend(fontsize=7.5, loc="upper right")


def _full_in_search(measured: Record) -> float:
    return float(measured["full_in_search"])


def _difficulty(ax: Any, records: Sequence[Record]) -> None:
    lines = []
    for record in records:
        measured = record["measured"]
        rule = next(r for r in measured["rules"] if r["name"] == measured["best"]["name"])
        lines.append(rule["loops_by_difficulty"])
    places = range(1, len(lines[0]) + 1)
    for line in lines:
        ax.plot(places, line, color=COLOURS[0], alpha=0.35, linewidth=1)
    ax.plot(places, [median(values) for values in zip(*lines, strict=True)], color=COLOURS[0], marker="o")
    best = {record["measured"]["best"]["title"] for record in records}
    name = best.pop().capitalize() if len(best) == 1 else "Best rule of each seed"
    ax.set_title(f"{name}: loops by difficulty")
    ax.set_xlabel("tenth of the tokens, from the easiest to the hardest at full depth")
    ax.set_ylabel("mean loops spent")
    ax.xaxis.set_major_locator(ticker.FixedLocator(list(places)))


def _text(figure: Figure, ax: Any, measured: Record) -> None:
    """Tokens in lines, each on the colour of the loops spent on predicting what follows it."""
    ax.grid(False)
    ax.set_axis_off()
    full = measured["full"]
    norm, colours = mpl.colors.Normalize(1, full), mpl.colormaps[SCALE]
    column, line = 0, 0
    for token in _flow(measured["text"]):
        if token is None:
            column, line = 0, line + (column > 0)
            continue
        text = token["text"].replace("\n", "⏎").replace("\t", " ")
        if column + len(text) > _WIDTH:
            column, line = 0, line + 1
        if line >= _LINES:
            break
        colour = colours(norm(token["loops"]))
        ax.add_patch(mpl.patches.Rectangle((column, -line - 0.9), len(text), 0.96, color=colour, linewidth=0))
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.55
        ax.text(
            column, -line - 0.42, text, va="center", fontsize=8.4, family="monospace",
            color="white" if dark else "black", parse_math=False, in_layout=False,
        )  # fmt: skip
        column += len(text)
    ax.set_xlim(0, _WIDTH)
    ax.set_ylim(-_LINES, 0.2)
    ax.set_title("Held-out text: loops spent on predicting what follows each token")
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=ax, pad=0.01, aspect=25)
    bar.set_label("loops")
    bar.outline.set_visible(False)


def _flow(windows: Sequence[Sequence[Record]]) -> Iterator[Record | None]:
    """The tokens of all windows, and None after each."""
    for window in windows:
        yield from window
        yield None


@styled
def halting(records: Sequence[Record], title: str) -> Figure:
    """Mean exit of every seed between one loop and the most, coloured by the accuracy that halting costs."""
    figure, ax = new_figure((5.6, 3.5))
    most = records[0]["measured"]["most"]
    arms = list(dict.fromkeys(record["arm"] for record in records))
    for i, arm in enumerate(arms):
        some = [record for record in records if record["arm"] == arm]
        ax.scatter(
            [record["seed"] for record in some],
            [record["measured"]["mean_exit"] for record in some],
            color=COLOURS[i % len(COLOURS)],
            label=arm,
        )
    level(ax, most, f"all {most} loops", over=False)
    level(ax, 1, "first loop")
    ax.set_ylim(0.5, most + 0.5)
    ax.set_xlabel("seed")
    ax.set_ylabel("mean loops at which halting selects")
    ax.set_title(title)
    if len(arms) > 1:
        ax.legend()
    return figure
