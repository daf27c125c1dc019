"""The page of results, and the README's picture: made from the result files alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_mythos.reproduce import results
from open_mythos.reproduce.targets import Record, shown

__all__ = ["figure", "headline", "page", "page_path", "readme_picture", "write_pages"]

_STATES = {
    "met": "met",
    "partly met": "partly met",
    "not met": "not met",
    "unfinished": "unfinished: runs that the claim needs are missing",
}
# More arms than these are told by their number: grids have dozens.
_NAMED = 12
_HEAD = """# Results

What this project claims, and what came out. `mythos reproduce --pages` writes this page from the result files alone;
nothing here is written by hand. To repeat an experiment, or add one, see [reproduce.md](reproduce.md); what was tried
on the way is in [experiments.md](experiments.md).

Numbers are medians over seeds, with the lowest and the highest in brackets. A claim is met with all its seeds, on the
test split, which is read once the training is over. "Best" is the best of the loop counts that were measured, chosen
for each seed on that same split and not on another one, so it is too good by as much as neighbouring counts differ by
chance; every count is in the result file, and in the figure. What was not reached stays here.
"""


def page_path(out: Path) -> Path:
    """The page of the results in a folder: docs/results.md for docs/results/reproduce, else inside the folder."""
    return out.parent.with_suffix(".md") if out.parts[-2:] == ("results", "reproduce") else out / "results.md"


def write_pages(out: Path, *, figures: bool = True) -> list[Path]:
    """Write the page and, unless told otherwise, draw the figures again.

    Args:
        out: folder of the result files.
        figures: draw too; takes matplotlib.

    Returns:
        What was written.

    Raises:
        ConfigError: a result file is damaged.
    """
    found = results.read_all(out)
    written = []
    for result in found if figures else ():
        written.append(out / f"{result['file']}.png")
        written[-1].write_bytes(figure(result))
    if figures and (picture := readme_picture(found)):
        written.append(out / "readme.png")
        written[-1].write_bytes(picture)
    path = page_path(out)
    path.write_text(page(found, Path(os.path.relpath(out, path.parent))), encoding="utf-8")
    return [*written, path]


def figure(result: Record) -> bytes:
    """The figure of a result, as a PNG."""
    from open_mythos.analysis.style import to_png

    return to_png(results.restored(result).draw(result["runs"]), dpi=120)


def readme_picture(found: Sequence[Record]) -> bytes | None:
    """The README's picture, as a PNG: on parity our own arm alone, a line for each number of bits.

    Args:
        found: results, from :func:`open_mythos.reproduce.results.read_all`. None without such runs among them.
    """
    from open_mythos.analysis.style import to_png
    from open_mythos.reproduce.figures import one_arm

    parity = [result for result in found if result["file"] == "parity"]
    ours = [r for result in parity for r in result["runs"] if r["arm"] == result["arms"][0]["name"]]
    return to_png(one_arm(ours, "Parity: more loops carry the answer further"), dpi=120) if ours else None


def headline(result: Record) -> str:
    """What was measured, in a few words: the first target's figure."""
    figures = result["verdict"]["figures"]
    return figures[0]["shown"] if figures else "see the table"


def page(found: Sequence[Record], folder: Path) -> str:
    """The page as Markdown.

    Args:
        found: results, from :func:`open_mythos.reproduce.results.read_all`.
        folder: of the pictures, as seen from the page.
    """
    found = sorted(found, key=lambda result: (result["order"], result["file"]))
    parts = [_HEAD]
    if not found:
        return _HEAD + "\nNo experiment has been run yet.\n"
    parts.append("| experiment | wanted | verdict | measured |\n|---|---|---|---|")
    parts += [
        f"| [{r['title']}](#{_anchor(r['title'])}) | {r['target']} | {r['verdict']['state']} | {headline(r)} |"
        for r in found
    ]
    parts += [_section(result, folder) for result in found]
    return "\n".join(parts) + "\n"


def _anchor(title: str) -> str:
    """The fragment that GitHub makes of a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _section(result: Record, folder: Path) -> str:
    verdict = result["verdict"]
    lines = [f"\n## {result['title']}\n", f"Claim: {result['claim']}\n"]
    lines.append(f"**Verdict: {_STATES[verdict['state']]}.** {_reservations(result)}".rstrip() + "\n")
    if verdict["figures"]:
        lines += [
            "| target | wanted | measured | |",
            "|---|---|---|---|",
            *map(_target, verdict["figures"]),
            "",
        ]
    else:
        lines.append(f"{verdict['sentence']}\n")
    lines += _table(result["summary"])
    lines.append(f"\n![{result['title']}]({(folder / result['file']).as_posix()}.png)\n")
    if result["notes"]:
        lines.append(f"{result['notes']}\n")
    lines += [f"- failed: {f['arm']}, seed {f['seed']}: {f['error']}" for f in result["failed"]]
    where = f"{', '.join(result['devices'])}; torch {', '.join(result['torch'])}{_pythons(result['runs'])}"
    lines.append(f"Repeat: `{result['command']}`. Made on {result['date']}: {where}. {_arms(result)}")
    return "\n".join(lines)


def _pythons(runs: list[Record]) -> str:
    """Versions of Python and how many runs had each: some experiments learn the text that comes with it."""
    counts = Counter(record.get("python", "not noted") for record in runs)
    if not counts or set(counts) == {"not noted"}:
        return ""
    names = [f"{version} ({count} run{'s' * (count > 1)})" for version, count in sorted(counts.items())]
    return f"; Python {', '.join(names)}"


def _reservations(result: Record) -> str:
    """All that keeps a result from being the claim's."""
    words = []
    if result["quick"]:
        words.append("This is a toy run, which says nothing about the claim.")
    if result["split"] != "test":
        words.append(f"Measured on the {result['split']} split.")
    if result["changes"]:
        words.append(f"Changed: `{' '.join(result['changes'])}`.")
    if len(result["runs"]) < result["runs_wanted"]:
        words.append(f"{len(result['runs'])} of {result['runs_wanted']} runs have finished.")
    return " ".join(words)


def _target(found: Record) -> str:
    state = "met" if found["met"] else "not met"
    moonshot = ", a moonshot that does not count" if found.get("moonshot") else ""
    return f"| {found['label']} | {found['target']} | {found['shown']} | {state}{moonshot} |"


def _table(summary: Record) -> list[str]:
    columns, form = summary["columns"], summary["format"]
    forms = [form] * len(columns) if isinstance(form, str) else form
    lines = ["| arm | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    shown_before = None
    for row in summary["rows"]:
        cells = [_cell(cell, kind) for cell, kind in zip(row["cells"], forms, strict=True)]
        title = "" if row["title"] == shown_before else row["title"]
        shown_before = row["title"]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _cell(cell: Any, kind: str) -> str:
    """A number, a spread or a text as it stands in a table."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    percent = kind == "percent"
    if not isinstance(cell, dict):
        return shown(cell, percent)
    middle = shown(cell["median"], percent)
    if cell["n"] < 2 or cell["min"] is None or cell["min"] == cell["max"] == cell["median"]:
        return middle
    return f"{middle} ({shown(cell['min'], percent)} to {shown(cell['max'], percent)})"


def _arms(result: Record) -> str:
    """How many seeds each arm has; many arms by their number."""
    arms = result["arms"]
    counts = Counter(len(arm["seeds"]) for arm in arms)
    if len(counts) == 1:
        return f"Seeds: {len(arms[0]['seeds'])} for each arm."
    if len(arms) > _NAMED:
        return "Seeds: " + ", ".join(f"{seeds} for {many} arms" for seeds, many in counts.items()) + "."
    return "Seeds: " + ", ".join(f"{arm['title']} {len(arm['seeds'])}" for arm in arms) + "."
