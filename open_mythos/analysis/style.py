"""The look of all pictures: colours, sizes, the labels on axes, and writing figures down.

The colours are those of Okabe and Ito, which people who see colour differently can tell apart, and viridis
where colour is a scale.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

try:
    import matplotlib as mpl
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "pictures need matplotlib, which is not installed: pip install open-mythos[report]"
    ) from error

INK, QUIET, SHADE = "#1f2933", "#5b6873", "#eef1f4"
# Okabe and Ito (2008), strongest contrast on white first; yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SCALE = "viridis"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.labelsize": 9.5,
    "axes.edgecolor": "#8b97a3",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "lines.linewidth": 1.9,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "open-mythos",
}
NARROW = (5.6, 3.5)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in our style, whatever the caller's matplotlib settings are, and leave those as they were."""

    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return styled


def new_figure(size: tuple[float, float], rows: int = 1) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its axes: one, or several that share the horizontal one.

    Made without pyplot, which would keep every figure alive and might look for a display.
    """
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, sharex=True)


def to_svg(figure: Figure) -> str:
    """The figure as one SVG element without an XML header; text is drawn as outlines, so it needs no font."""
    with mpl.rc_context(STYLE), io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as a PNG."""
    with mpl.rc_context(STYLE), io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        return buffer.getvalue()


def above(ax: Any, x: float, words: str) -> None:
    """A quiet label just above the axes, at a data x."""
    place = ax.get_xaxis_transform()
    ax.text(x, 1.012, words, transform=place, ha="center", va="bottom", fontsize=8.5, color=QUIET)


def level(ax: Any, value: float, label: str, over: bool = True) -> None:
    """A dashed line at a data y, with its name at the right end."""
    ax.axhline(value, color="#8b97a3", linestyle=(0, (4, 3)), linewidth=1.2)
    ax.annotate(
        label, (1.0, value), xycoords=("axes fraction", "data"), textcoords="offset points",
        xytext=(-2, 4 if over else -4), ha="right", va="bottom" if over else "top",
        fontsize=8.5, color=QUIET,
    )  # fmt: skip


def colour_bar(figure: Figure, image: Any, ax: Any, label: str, percent: bool = False) -> Any:
    """A scale beside the axes, labelled with what its colours mean."""
    bar = figure.colorbar(image, ax=ax, pad=0.015, aspect=25)
    bar.set_label(label)
    bar.outline.set_visible(False)
    if percent:
        bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    return bar


def loop_axis(ax: Any, loops: Sequence[int]) -> tuple[float, float]:
    """A logarithmic horizontal axis of the loops at test time.

    Args:
        ax: gets it.
        loops: all that are shown, in rising order.

    Returns:
        Its limits, a little beyond the first and the last.
    """
    low, high = loops[0] / 1.15, loops[-1] * 1.15
    ax.set_xscale("log", base=2)
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(ticker.FixedLocator(_loop_ticks(loops)))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("loops at test time")
    return low, high


def _loop_ticks(loops: Sequence[int]) -> list[int]:
    """All of a few, else powers of two and the last."""
    few = list(loops)
    if len(few) <= 8:
        return few
    powers = [2**i for i in range(few[-1].bit_length()) if few[0] <= 2**i <= few[-1]]
    return powers if few[-1] < 1.5 * powers[-1] else [*powers, few[-1]]


def linear_ticks(loops: int) -> list[int]:
    """Ticks of a linear axis of loops: the first, and at most six multiples of a power of two."""
    step = 1
    while loops / step > 6:
        step *= 2
    return sorted({1, *range(step, loops + 1, step)}) if step != 2 else list(range(2, loops + 1, 2))


def cells(width: int, loops: int) -> tuple[float, float, float, float]:
    """Extent that centres the image's cells on tokens 0 … width - 1 and loops 1 … loops."""
    return (-0.5, width - 0.5, 0.5, loops + 0.5)


def token_axis(ax: Any, labels: Sequence[str]) -> None:
    """Name every column; upright while the names are short."""
    ax.grid(False)
    wide = max((len(label) for label in labels), default=1) > 1 and len(labels) > 24
    ax.set_xticks(range(len(labels)), [drawable(label) for label in labels], fontsize=8, family="monospace")
    if wide and max(len(label) for label in labels) > 4:
        ax.tick_params(axis="x", rotation=90)
    ax.tick_params(axis="x", length=0, pad=3)


def drawable(label: str) -> str:
    """Dollar signs escaped, between which matplotlib would set mathematics."""
    return label.replace("$", r"\$")
