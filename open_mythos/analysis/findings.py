"""What a sweep over loops says, in plain words, also when it says that more loops do not help."""

from __future__ import annotations

from dataclasses import dataclass

from open_mythos.analysis.probes import Record

__all__ = ["Finding", "count_loops", "find", "unit_of"]

# Differences smaller than these are called none: half a point of accuracy, 0.005 bits.
NOTHING = {"accuracy": 0.005, "bits_per_byte": 0.005, "bits_per_token": 0.005}


@dataclass(frozen=True)
class Finding:
    """What a sweep over loops says, in words.

    Attributes:
        headline: the numbers of the hardest split.
        short: the first and the last of these, for a picture's title.
        verdict: what follows for loops beyond training; honest when nothing does.
        rises: loops beyond the trained ones do better than the trained ones.
    """

    headline: str
    short: str
    verdict: str
    rises: bool


def find(evaluation: Record, subject: str) -> Finding:
    """Read the finding off an ``eval.json``.

    The hardest split is the one that does worst at the deepest trained loop count.

    Args:
        evaluation: ``metric``, ``trained_max``, ``splits``.
        subject: what was learnt, as the sentence begins.
    """
    metric = evaluation["metric"]
    share = metric == "accuracy"
    most = int(evaluation["trained_max"])
    sign = 1.0 if share else -1.0
    curves = {
        name: dict(zip(split["loops"], split["values"], strict=True))
        for name, split in evaluation["splits"].items()
    }
    hardest = min(curves, key=lambda name: sign * curves[name][_deepest(curves[name], most)])
    curve = curves[hardest]
    trained, few = _deepest(curve, most), _few(curve)
    deeper = [n for n in curve if n > most]
    best = max(deeper, key=lambda n: (sign * round(curve[n], 3), -n)) if deeper else None
    shown = list(dict.fromkeys(n for n in (few, trained, best) if n is not None))
    numbers = ", ".join(f"{_value(curve[n], metric)} at {count_loops(n)}" for n in sorted(shown))
    headline = f"{subject}, {hardest}: {numbers}; trained with at most {most}."
    ends = [n for n in (few, best or trained) if n in curve]
    # A title has room for the unit once.
    told = (_value(curve[n], metric) if share else f"{curve[n]:.3f}" for n in sorted({*ends}))
    pairs = zip(told, (count_loops(n) for n in sorted({*ends})), strict=True)
    short = (
        ("" if share else f"{unit_of(metric)}, ")
        + f"{hardest}: "
        + ", ".join(f"{v} at {n}" for v, n in pairs)
    )
    if best is None:
        return Finding(headline, short, "No loop count beyond the trained ones was tried.", False)
    verdict = _verdict(curve, metric, few, trained, best, max(curve))
    rises = sign * (curve[best] - curve[trained]) >= NOTHING[metric]
    return Finding(headline, short, verdict, rises)


def _verdict(curve: dict[int, float], metric: str, few: int, trained: int, best: int, last: int) -> str:
    nothing = NOTHING[metric]
    sign = 1.0 if metric == "accuracy" else -1.0
    gain, inside = sign * (curve[best] - curve[trained]), sign * (curve[trained] - curve[few])
    end = sign * (curve[last] - curve[trained])
    verb = "gains" if inside > 0 else "loses"
    change = f"it {verb} {_gap(abs(inside), metric)}" if abs(inside) >= nothing else "it hardly changes"
    within = f"From {count_loops(few)} to {trained} {change}"
    if gain >= nothing:
        tail = ""
        if sign * (curve[best] - curve[last]) >= nothing:
            tail = f" At {last} it is back to {_value(curve[last], metric)}."
        return f"{within}; beyond the trained depth more loops add another {_gap(gain, metric)}.{tail}"
    if end <= -nothing:
        lost = f"at {count_loops(last)} it loses {_gap(-end, metric)}"
        return f"{within}; beyond the trained depth it does not rise: {lost}."
    return f"{within}; beyond the trained depth it neither rises nor falls."


def _deepest(curve: dict[int, float], most: int) -> int:
    """Largest loop count within training, or the smallest there is."""
    return max((n for n in curve if n <= most), default=min(curve))


def _few(curve: dict[int, float]) -> int:
    return 4 if 4 in curve else min(curve)


def count_loops(n: int) -> str:
    """``1 loop``, ``2 loops``, …"""
    return "1 loop" if n == 1 else f"{n} loops"


def unit_of(metric: str) -> str:
    """What values of a metric that is no share are counted in: ``bits per byte``, …"""
    return metric.replace("_", " ")


def _value(value: float, metric: str) -> str:
    return f"{100 * value:.1f} % right" if metric == "accuracy" else f"{value:.3f} {unit_of(metric)}"


def _gap(gap: float, metric: str) -> str:
    return f"{100 * gap:.1f} points" if metric == "accuracy" else f"{gap:.3f} {unit_of(metric)}"
