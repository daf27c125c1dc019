"""Pictures, drawn from records only: no model is read here, so a picture can always be drawn again.

Every function returns a matplotlib Figure; :func:`to_svg` and :func:`to_png` write it down, with the same
bytes each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from open_mythos.analysis.findings import unit_of
from open_mythos.analysis.style import (
    COLOURS,
    INK,
    NARROW,
    SCALE,
    SHADE,
    Figure,
    above,
    cells,
    colour_bar,
    drawable,
    level,
    linear_ticks,
    loop_axis,
    mpl,
    new_figure,
    styled,
    ticker,
    to_png,
    to_svg,
    token_axis,
)

__all__ = [
    "answers",
    "experts",
    "footprint",
    "halting",
    "latent",
    "loss",
    "motion",
    "quality",
    "spectral",
    "to_png",
    "to_svg",
]

Record = dict[str, Any]


@styled
def loss(metrics: Sequence[Record], *, chance: float | None = None) -> Figure:
    """Training loss over steps: every logged step faint, their running mean strong.

    Args:
        metrics: objects with ``step`` and ``loss`` (nats per token), None where it was not finite.
        chance: loss of uniform guessing, drawn as a line.
    """
    metrics = [m for m in metrics if m["loss"] is not None]
    _need("metrics", metrics)
    steps, values = [m["step"] for m in metrics], [float(m["loss"]) for m in metrics]
    figure, ax = new_figure(NARROW)
    window = max(1, len(values) // 25)
    ax.plot(steps, values, color=COLOURS[0], alpha=0.3, linewidth=1)
    ax.plot(steps, _running_mean(values, window), color=COLOURS[0])
    if chance is not None:
        level(ax, chance, "guessing")
    first, last = values[0], sum(values[-window:]) / window
    ax.set_title(f"Training loss: {first:.2f} → {last:.2f} nats per token")
    ax.set_xlabel("training step")
    ax.set_ylabel("cross entropy (nats per token)")
    ax.set_ylim(bottom=0)
    return figure


@styled
def quality(evaluation: Record, *, title: str | None = None) -> Figure:
    """Quality against loops, one line per split; the loop counts seen in training are shaded.

    Args:
        evaluation: ``metric``, ``trained_mean``, ``trained_max`` and ``splits`` {name: {loops, values}}.
        title: what the curves show, in words.
    """
    splits = evaluation["splits"]
    _need("splits", splits)
    share = evaluation["metric"] == "accuracy"
    figure, ax = new_figure((5.6, 3.9))
    every = sorted({n for split in splits.values() for n in split["loops"]})
    low, high = loop_axis(ax, every)
    most = evaluation.get("trained_max")
    if most is not None:
        ax.axvspan(low, most, color=SHADE, zorder=0)
        for start, end, words in (
            (low, min(most, high), "loops seen in training"),
            (most, high, "never trained"),
        ):
            if start < end and start < every[-1]:
                above(ax, math.sqrt(start * end), words)
    mean = evaluation.get("trained_mean")
    if mean is not None and low <= mean <= high:
        ax.axvline(
            mean, color="#8b97a3", linestyle=(0, (4, 3)), linewidth=1.2, label=f"mean in training: {mean:.3g}"
        )
    for i, (name, split) in enumerate(splits.items()):
        ax.plot(
            split["loops"],
            split["values"],
            marker="osD^vP"[i % 6],
            color=COLOURS[i % len(COLOURS)],
            label=name,
        )
    if share:
        ax.set_ylabel("answers right")
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{100 * x:g} %"))
        ax.set_ylim(top=1.02)
    else:
        ax.set_ylabel(f"{unit_of(evaluation['metric'])} (lower is better)")
    ax.set_title(title or "Quality against loops", pad=20)
    ax.legend(loc="best")
    return figure


@styled
def answers(record: Record) -> Figure:
    """Share of right answers at each position and loop count: how far along the sequence it gets.

    Args:
        record: ``loops`` [n], ``right`` [n][positions] in 0 … 1, ``chance``, ``split``, ``positions``.
    """
    loops, right = record["loops"], record["right"]
    _need("loops", loops)
    figure, ax = new_figure((5.6, 3.9))
    image = ax.imshow(right, aspect="auto", cmap=SCALE, vmin=record["chance"], vmax=1, origin="lower")
    ax.set_yticks(range(len(loops)), [str(n) for n in loops])
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    count = len(record["positions"])
    shown = sorted({0, *range(7, count, 8), count - 1}) if count > 12 else list(range(count))
    if len(shown) > 2 and shown[-1] - shown[-2] < 3:
        del shown[-2]
    ax.set_xticks(shown, [str(record["positions"][i]) for i in shown])
    ax.grid(False)
    ax.set_xlabel("position in the sequence")
    ax.set_ylabel("loops at test time")
    ax.set_title(f"Right answers by position ({record['split']})")
    colour_bar(figure, image, ax, "answers right", percent=True)
    return figure


@styled
def halting(record: Record) -> Figure:
    """Probability of having halted, tokens against loops; a dot marks the loop that each token selects.

    Args:
        record: of :meth:`Trace.to_record`; ``halting`` must not be None.
    """
    if record["halting"] is None:
        raise ValueError("the record has no halting probabilities: the model's config has halting = 'off'")
    stopped = _cumulative(record["halting"])
    labels, loops = record["labels"], record["n_loops"]
    chosen = record.get("mode", "select") == "select"
    figure, ax = new_figure((11.6, max(3.1, 0.17 * loops + 1.5)))
    image = ax.imshow(
        stopped, aspect="auto", cmap=SCALE, vmin=0, vmax=1, extent=cells(len(labels), loops), origin="lower"
    )
    ax.scatter(
        range(len(labels)), record["selected"], s=30, facecolor="white", edgecolor=INK, linewidth=1, zorder=3,
        label="loop whose state the coda reads" if chosen else "loop with the largest weight",
    )  # fmt: skip
    token_axis(ax, labels)
    ax.yaxis.set_major_locator(ticker.FixedLocator(linear_ticks(loops)))
    ax.set_ylim(0.5, loops + 0.5)
    ax.set_ylabel("loop")
    ax.set_xlabel("token")
    mean = record["selected_mean"]
    verb = "the coda reads loop" if chosen else "the heaviest loop is"
    ax.set_title(f"Halting: {verb} {mean:.1f} of {loops} on average", pad=24)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), borderaxespad=0, handletextpad=0.3)
    colour_bar(figure, image, ax, "probability of having halted", percent=True)
    return figure


@styled
def experts(record: Record) -> Figure:
    """Share of the token slots that each expert took, loop by loop, around the fair share.

    Args:
        record: of :meth:`Trace.to_record`.
    """
    loads = record["expert_loads"]
    shares = [[n / max(sum(row), 1) for n in row] for row in loads]
    loops, count = len(shares), len(shares[0])
    fair = 1 / count
    total = [sum(row[e] for row in loads) for e in range(count)]
    least, most = (f"{100 * f(total) / max(sum(total), 1):.0f} %" for f in (min, max))
    figure, ax = new_figure(NARROW)
    if count <= 6:
        _stacked(ax, shares, fair)
    else:
        top = max(2 * fair, *(max(row) for row in shares))
        columns = list(zip(*shares, strict=True))
        image = ax.imshow(
            columns, aspect="auto", cmap=SCALE, vmin=0, vmax=top, extent=(0.5, loops + 0.5, count - 0.5, -0.5)
        )
        ax.grid(False)
        ax.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        ax.set_ylabel("expert")
        bar = colour_bar(figure, image, ax, "share of slots", percent=True)
        bar.ax.axhline(fair, color="white", linewidth=2)
        bar.ax.text(-0.35, fair, "fair", ha="right", va="center", fontsize=8.5)
    ax.xaxis.set_major_locator(ticker.FixedLocator(linear_ticks(loops)))
    ax.set_xlabel("loop")
    ax.set_title(f"Expert use: each took {least} to {most} of the slots")
    return figure


def _stacked(ax: Any, shares: list[list[float]], fair: float) -> None:
    """One bar per loop, stacked by expert, with lines where equal shares would end."""
    loops, count = len(shares), len(shares[0])
    x = list(range(1, loops + 1))
    below = [0.0] * loops
    for e in range(count):
        heights = [row[e] for row in shares]
        ax.bar(x, heights, bottom=below, width=0.86, color=COLOURS[e], alpha=0.9, label=f"expert {e}")
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for e in range(1, count):
        ax.axhline(
            e * fair, color=INK, linewidth=1, linestyle=(0, (3, 3)), label="equal shares" if e == 1 else None
        )
    ax.set_ylim(0, 1)
    ax.set_xlim(0.4, loops + 0.6)
    ax.grid(False)
    ax.set_ylabel("share of the slots")
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    handles, names = ax.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: names[i], reverse=True)
    ax.legend(
        [handles[i] for i in order], [names[i] for i in order], loc="center left", bbox_to_anchor=(1.01, 0.5)
    )


@styled
def motion(record: Record) -> Figure:
    """Length of the state, and how far each loop moves it: medians over tokens, with the 10 to 90 % band.

    Args:
        record: of :meth:`Trace.to_record`.
    """
    figure, (upper, lower) = new_figure(NARROW, rows=2)
    x = list(range(1, record["n_loops"] + 1))
    for ax, key, colour in ((upper, "norms", COLOURS[0]), (lower, "change", COLOURS[1])):
        band = record[key]
        ax.fill_between(x, band["p10"], band["p90"], color=colour, alpha=0.18, linewidth=0)
        ax.plot(x, band["median"], color=colour, marker="o" if len(x) <= 40 else None)
    upper.set_ylabel("length ‖h‖")
    upper.set_ylim(bottom=0)
    lower.set_ylabel("change ‖Δh‖ / ‖h‖")
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    lower.yaxis.set_major_locator(
        ticker.LogLocator(10, subs=(1, 2, 5) if _least([band["p10"]]) > 0.01 else (1,))
    )
    lower.yaxis.set_minor_locator(ticker.NullLocator())
    lower.set_xlabel("loop")
    lower.xaxis.set_major_locator(ticker.FixedLocator(linear_ticks(len(x))))
    final = record["change"]["median"][-1]
    upper.set_title(f"The state: the last loop still moves it by {100 * final:.2g} %")
    return figure


@styled
def latent(record: Record) -> Figure:
    """The way of some tokens' states through the plane of most movement; colour is the loop.

    Args:
        record: of :func:`latent_path`, with ``labels`` for its tokens.
    """
    figure, ax = new_figure((5.6, 4.2))
    loops = record["n_loops"]
    colours = mpl.colormaps[SCALE].resampled(256)
    norm = mpl.colors.Normalize(1, max(loops, 2))
    labels = record.get("labels") or [str(t) for t in record["tokens"]]
    for points in record["points"]:
        for t in range(1, loops):
            ax.annotate(
                "", points[t], points[t - 1],
                arrowprops={
                    "arrowstyle": "-|>", "color": colours(norm(t + 1)), "linewidth": 1.3, "mutation_scale": 7,
                    "shrinkA": 0, "shrinkB": 0,
                },
            )  # fmt: skip
        xs, ys = zip(*points, strict=True)
        ax.scatter(xs, ys, c=range(1, loops + 1), cmap=SCALE, norm=norm, s=9, zorder=3)
        ax.scatter(xs[-1:], ys[-1:], s=46, facecolor="none", edgecolor=INK, linewidth=1.1, zorder=4)
    ax.margins(0.13)
    first, second = (f"{100 * x:.0f} % of the variance" for x in record["explained"])
    ax.set_xlabel(f"first principal axis ({first})")
    ax.set_ylabel(f"second axis ({second})")
    ax.set_title(f"Where {len(labels)} tokens go in {loops} loops")
    colour_bar(figure, mpl.cm.ScalarMappable(norm, colours), ax, "loop").locator = ticker.MaxNLocator(
        integer=True
    )
    _name_points(figure, ax, [points[-1] for points in record["points"]], labels)
    return figure


def _name_points(figure: Figure, ax: Any, points: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    """Put each name beside its point, on the first side where it covers no other name or point."""
    figure.draw_without_rendering()
    spots = [ax.transData.transform(point) for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for (x, y), point, name in zip(spots, points, names, strict=True):
        width, height = 6.2 * len(name) + 4, 12.0
        for dx, dy in (
            (9, 8),
            (9, -14),
            (-9 - width, 8),
            (-9 - width, -14),
            (9, 21),
            (9, -27),
            (-9 - width, 21),
        ):
            box = (x + dx, y + dy - 2, x + dx + width, y + dy + height)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        taken.append(box)
        ax.annotate(
            drawable(name), point, textcoords="offset points", xytext=(dx * 0.72, dy * 0.72),
            fontsize=8.5, zorder=5,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )  # fmt: skip


@styled
def spectral(metrics: Sequence[Record]) -> Figure:
    """ρ(A), the slowest decay of the injected recurrence, over training; stable below one.

    Args:
        metrics: objects with ``step`` and ``rho``, None where it was not finite.
    """
    metrics = [m for m in metrics if m["rho"] is not None]
    _need("metrics", metrics)
    values = [float(m["rho"]) for m in metrics]
    figure, ax = new_figure(NARROW)
    ax.plot([m["step"] for m in metrics], values, color=COLOURS[2])
    level(ax, 1.0, "stable below 1", over=False)
    low = min(values)
    ax.set_ylim(max(0.0, low - 0.3 * (1 - low) - 0.02), 1 + 0.06 * (1.02 - low))
    ax.set_xlabel("training step")
    ax.set_ylabel("ρ(A) = largest entry of A")
    verdict = "stays below 1" if max(values) < 1 else "reaches 1"
    ax.set_title(f"ρ(A) {verdict}: largest {max(values):.3f}")
    return figure


@styled
def footprint(record: Record) -> Figure:
    """Bytes of the key/value cache: MLA and GQA, keeping every loop or the last one only.

    Args:
        record: of :func:`kv_footprint`.
    """
    figure, ax = new_figure((5.6, 2.9))
    names = {"EveryLoop": "every loop kept", "LastLoop": "last loop only"}
    bars = record["bars"]
    per_token = [bar["bytes"] / record["tokens"] / 1024 for bar in bars]
    colours = [COLOURS[0] if bar["attention"] == "mla" else COLOURS[1] for bar in bars]
    y = list(range(len(bars)))[::-1]
    ax.barh(y, per_token, color=colours, alpha=0.9, height=0.66)
    for place, value in zip(y, per_token, strict=True):
        ax.text(value, place, f" {value:.3g} KiB", va="center", ha="left", fontsize=9)
    ax.set_yticks(y, [f"{bar['attention'].upper()}, {names[bar['policy']]}" for bar in bars])
    ax.set_xlim(0, 1.16 * max(per_token))
    ax.grid(False, axis="y")
    ax.set_xlabel(f"KiB per token (float32, {record['loops']} loops, {record['layers']} cached layers)")
    size = {(bar["attention"], bar["policy"]): bar["bytes"] for bar in bars}
    ratio = size["gqa", "EveryLoop"] / size["mla", "EveryLoop"]
    less = (
        f"MLA keeps {ratio:.2g}× less than GQA" if ratio >= 1 else f"MLA keeps {1 / ratio:.2g}× more than GQA"
    )
    ax.set_title(f"Cache: {less}")
    return figure


def _need(name: str, values: Sequence[Any] | Record) -> None:
    if not values:
        raise ValueError(f"{name} is empty: there is nothing to draw")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values at each place."""
    sums, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        sums.append(total / min(i + 1, window))
    return sums


def _cumulative(halting: list[list[float]]) -> list[list[float]]:
    """1 − Π (1 − p) over loops."""
    alive = [1.0] * len(halting[0])
    rows = []
    for row in halting:
        alive = [a * (1 - p) for a, p in zip(alive, row, strict=True)]
        rows.append([1 - a for a in alive])
    return rows


def _least(rows: Sequence[Sequence[float]]) -> float:
    return min(min(row) for row in rows)
