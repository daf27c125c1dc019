"""One self-contained HTML page about finished runs: no script, nothing fetched, pictures inside the file."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from open_mythos.analysis import plots
from open_mythos.analysis.findings import count_loops, find, unit_of
from open_mythos.analysis.probes import Record
from open_mythos.analysis.records import ReportError, Run, make_records, read_run
from open_mythos.analysis.style import Figure
from open_mythos.analysis.template import CSS, PAGE

__all__ = ["ReportError", "build_report", "page"]


def build_report(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """Probe each run, store what was found in its ``records/``, and draw everything on one page.

    Args:
        run_dirs: folders written by ``mythos train`` (or ``mythos demo``), in the order of the page.
        out: the HTML file to write; its folder is made when it is not there.

    Returns:
        ``out``.

    Raises:
        ReportError: a folder is not a finished run, or none is given.
        ImportError: matplotlib is not installed.
    """
    if not run_dirs:
        raise ReportError("run_dirs is empty: give at least one run directory")
    runs = [read_run(Path(path)) for path in run_dirs]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ReportError(
                f"run_dirs has {names.count(name)} folders named {name!r}: give each its own name"
            )
    runs = [make_records(run) for run in runs]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(runs), encoding="utf-8")
    return out


def page(runs: Sequence[Run]) -> str:
    """The HTML page, from records alone."""
    sections = [_section(run) for run in runs]
    return Template(PAGE).substitute(
        title=escape("OpenMythos report: " + ", ".join(run.name for run in runs)),
        css=CSS,
        lead="".join(_lead(run) for run in runs),
        contents="".join(_contents(run) for run in runs),
        sections="".join(sections),
        footer=_footer(runs),
    )


def _subject(run: Run) -> str:
    source = str(run.config["data"]["source"])
    if run.task is not None:
        return source.replace("_", " ").capitalize()
    return "Text of Python itself" if source == "python" else f"Text ({Path(source).name})"


def _lead(run: Run) -> str:
    if run.evaluation is None:
        return (
            f'<div class="finding"><p class="big">{escape(_subject(run))}: not evaluated yet.</p>'
            f"<p>Run <code>mythos eval</code> on it, then draw this page again.</p></div>"
        )
    finding = find(_named(run), _subject(run))
    css = "finding good" if finding.rises else "finding"
    return (
        f'<div class="{css}"><p class="big">{escape(finding.headline)}</p>'
        f'<p>{escape(finding.verdict)} <a href="#{_anchor(run)}-quality">See the curve</a></p></div>'
    )


def _contents(run: Run) -> str:
    items = "".join(
        f'<li><a href="#{_anchor(run)}-{key}">{escape(name)}</a></li>' for key, name in _parts(run)
    )
    return f'<li><a href="#{_anchor(run)}">{escape(_subject(run))}</a><ol>{items}</ol></li>'


def _anchor(run: Run) -> str:
    return "run-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in run.name)


@dataclass(frozen=True)
class _Picture:
    """One figure of a run: how to draw it, and what it shows, from which file."""

    key: str
    name: str
    draw: Callable[[Run], Figure]
    shows: str
    file: str
    wide: bool = False


def _quality(run: Run) -> Figure:
    return plots.quality(_named(run), title=find(_named(run), _subject(run)).short)


_PICTURES = (
    _Picture(
        "quality", "Quality against loops", _quality,
        "The same trained model, asked to run fewer or more loops. Grey: loop counts that training used. "
        "To the right of it nothing was trained, and the model lives on what it has learnt to do in a loop.",
        "eval.json",
    ),
    _Picture(
        "answers", "Right answers by position", lambda r: plots.answers(r.records["answers"]),
        "How far along the sequence the answers are right, over sequences never trained on. If each "
        "loop carries the computation further, the bright region grows with the loops.",
        "records/answers.json",
    ),
    _Picture(
        "loss", "Training loss",
        lambda r: plots.loss(r.metrics, chance=r.records["model"]["guess_nats"]),
        "Thin: logged steps; strong: their running mean. Dashed: guessing evenly among all tokens. Steps "
        "differ in how many loops they ran, which is part of the spread.",
        "metrics.jsonl",
    ),
    _Picture(
        "rho", "ρ(A) over training", lambda r: plots.spectral(r.metrics),
        "A decides how much of the old state survives a loop. All its entries lie between 0 and 1; ρ(A) is "
        "the largest.",
        "metrics.jsonl",
    ),
    _Picture(
        "halting", "Halting per token", lambda r: plots.halting(r.records["trace"]),
        "One sequence, token by token. Colour: probability that the halting head has asked to stop by then. "
        "Dot: the loop whose state is decoded. A dot on the last row may also mean that the loops ran out.",
        "records/trace.json", wide=True,
    ),
    _Picture(
        "experts", "Expert use per loop", lambda r: plots.experts(r.records["trace"]),
        "Each token takes a few experts in each loop. Slots counted over a small batch, loop by loop; with "
        "perfect balance every expert would get its equal share.",
        "records/trace.json",
    ),
    _Picture(
        "motion", "Norms and change of the state", lambda r: plots.motion(r.records["trace"]),
        "Line: median over tokens; band: from the 10th to the 90th percentile. A state that settles has a "
        "level upper curve and a falling lower one.",
        "records/trace.json",
    ),
    _Picture(
        "latent", "Latent trajectory", lambda r: plots.latent(r.records["latent"]),
        "The state of a few tokens after each loop, projected on the two directions in which these states "
        "differ most. Ring: the last loop. In brackets: position of the token.",
        "records/latent.json",
    ),
    _Picture(
        "footprint", "Cache footprint", lambda r: plots.footprint(r.records["footprint"]),
        "Bytes of real caches, filled by a call of a model with this run's attention sizes, once with each "
        "attention type. Last loop only is smaller, and an approximation when a text is continued.",
        "records/footprint.json",
    ),
)  # fmt: skip


def _named(run: Run) -> Record:
    """The evaluation with its splits named for readers: ``test@48 bits`` is ``48 bits``."""
    evaluation = run.evaluation
    if evaluation is None:
        raise ReportError(f"{run.path} has no eval.json: run `mythos eval` on it")
    names = {name: name.partition("@")[2] or _plain_split(run, name) for name in evaluation["splits"]}
    return {**evaluation, "splits": {names[name]: split for name, split in evaluation["splits"].items()}}


def _plain_split(run: Run, name: str) -> str:
    """The name of the split that is like the training data, in the unit of the other splits."""
    task = run.task
    if task is None or name != "test" or run.evaluation is None:
        return "held-out text" if name == "test" else name
    units = [other.partition("@")[2].partition(" ")[2] for other in run.evaluation["splits"] if "@" in other]
    level = getattr(task, task.difficulty)
    words = f"{level[0]} to {level[1]}" if isinstance(level, tuple) else str(level)
    return f"{words} {units[0] if units and units[0] else task.difficulty} (as in training)"


def _has(run: Run, picture: _Picture) -> bool:
    if picture.file == "eval.json":
        return run.evaluation is not None
    if picture.file == "metrics.jsonl":
        return bool(run.metrics)
    record = run.records.get(Path(picture.file).stem)
    if record is None or (picture.key == "halting" and record["halting"] is None):
        return False
    # One or two scored positions make no picture.
    return picture.key != "answers" or len(record["positions"]) >= 4


def _parts(run: Run) -> Iterator[tuple[str, str]]:
    """(anchor, name) of each part of a run's section."""
    for picture in _PICTURES:
        if _has(run, picture):
            yield picture.key, picture.name
    if "samples" in run.records or "answers" in run.records:
        yield "samples", "Samples"
    yield "settings", "Settings"


def _section(run: Run) -> str:
    anchor = _anchor(run)
    figures = "".join(_figure(run, picture) for picture in _PICTURES if _has(run, picture))
    samples = _text_samples(run) if "samples" in run.records else ""
    if "answers" in run.records:
        samples = _answer_samples(run)
    return (
        f'<section id="{anchor}"><h2>{escape(_subject(run))}</h2>{_facts(run)}'
        f'<div class="figures">{figures}</div>{samples}{_settings(run)}</section>'
    )


def _facts(run: Run) -> str:
    """A short table about the run."""
    model, info = run.records["model"], run.info
    count = model["parameters"]
    facts = {
        "parameters": f"{count['total']:,} ({count['active']:,} active for one token)",
        "attention": model["config"]["attn_type"].upper(),
        "loops in training": _loops_in_training(run),
        "steps": f"{run.config['train']['steps']:,}, batch {run.config['train']['batch_size']}",
        "seed": str(info.get("seed", run.config["train"]["seed"])),
    }
    if "seconds" in info:
        facts["training time"] = f"{info['seconds'] / 60:.1f} min"
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _loops_in_training(run: Run) -> str:
    loops = run.config["loops"]
    rest = ", ".join(f"{k} {v}" for k, v in loops.items() if k != "kind" and v is not None)
    if run.evaluation is not None:
        rest += f"; mean {run.evaluation['trained_mean']:.3g}, at most {run.evaluation['trained_max']:g}"
    return f"{loops['kind']} ({rest})"


def _figure(run: Run, picture: _Picture) -> str:
    figure = picture.draw(run)
    title = figure.axes[0].get_title(loc="left")
    data = base64.b64encode(plots.to_svg(figure).encode("utf-8")).decode("ascii")
    table = _quality_table(_named(run)) if picture.key == "quality" else ""
    return (
        f'<figure id="{_anchor(run)}-{picture.key}"{" class=wide" if picture.wide else ""}>'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(f"{picture.name}. {title}")}">'
        f"<figcaption>{escape(picture.shows)}{table}"
        f'<span class="made">Drawn from {escape(run.name)}/{picture.file} by <code>mythos report</code>.'
        "</span>"
        "</figcaption></figure>"
    )


def _quality_table(evaluation: Record) -> str:
    """The numbers of the curve, for those who want them."""
    share = evaluation["metric"] == "accuracy"
    loops = sorted({n for split in evaluation["splits"].values() for n in split["loops"]})
    head = "".join(f'<th scope="col">{n}</th>' for n in loops)
    rows = ""
    for name, split in evaluation["splits"].items():
        values = dict(zip(split["loops"], split["values"], strict=True))
        cells = "".join(
            f"<td>{(f'{100 * values[n]:.1f}' if share else f'{values[n]:.3f}') if n in values else ''}</td>"
            for n in loops
        )
        rows += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    unit = "% right" if share else unit_of(evaluation["metric"])
    return (
        f"<details><summary>The numbers ({unit})</summary><div class=scroll><table>"
        f'<tr><th scope="col">loops</th>{head}</tr>{rows}</table></div></details>'
    )


def _text_samples(run: Run) -> str:
    record = run.records["samples"]
    blocks = ""
    for i, prompt in enumerate(record["prompts"]):
        cells = "".join(
            f"<div><h4>{count_loops(n)}</h4><pre><b>{_printable(prompt)}</b>"
            f"{_printable(record['texts'][str(n)][i])}</pre></div>"
            for n in record["loops"]
        )
        blocks += f'<div class="samples">{cells}</div>'
    return (
        f'<h3 id="{_anchor(run)}-samples">Samples</h3><p>The prompt is bold. All columns draw with seed '
        f"{record['seed']}, temperature {record['temperature']:g}, top-k {record['top_k']}; only the "
        "number of loops differs. A model this small writes the look of its text rather than its sense.</p>"
        f"{blocks}"
        f'<p class="made">From {escape(run.name)}/records/samples.json.</p>'
    )


def _answer_samples(run: Run) -> str:
    record = run.records["answers"]
    example = record["example"]
    rows = f'<tr><th scope="row">input</th><td>{_symbols(example["input"])}</td><td></td></tr>'
    rows += f'<tr><th scope="row">right answer</th><td>{_symbols(example["wanted"])}</td><td></td></tr>'
    for answer in example["answers"]:
        marks = "".join(
            escape(symbol) if good else f"<mark>{escape(symbol)}</mark>"
            for symbol, good in zip(answer["answer"], answer["right"], strict=True)
        )
        wrong = answer["right"].count(False)
        name = count_loops(answer["loops"])
        rows += f'<tr><th scope="row">{name}</th><td>{marks}</td><td>{wrong} wrong</td></tr>'
    return (
        f'<h3 id="{_anchor(run)}-samples">One example</h3><p>A sequence never trained on '
        f"({escape(record['split'])}), and what the model answers; wrong symbols are marked.</p>"
        f'<div class="scroll"><table class="answers">{rows}</table></div>'
        f'<p class="made">From {escape(run.name)}/records/answers.json.</p>'
    )


def _symbols(labels: Sequence[str]) -> str:
    """Symbols side by side when each is one character, else with spaces."""
    words = [label for label in labels if label != "BOS"]
    return escape(("" if all(len(word) == 1 for word in words) else " ").join(words))


def _printable(text: str) -> str:
    """Escaped for HTML; control characters other than line ends and tabs are written out."""
    return escape("".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text))


def _settings(run: Run) -> str:
    parts = run.records["model"]["parameters"]["parts"]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{count:,}</td></tr>'
        for name, count in parts.items()
        if count
    )
    total = run.records["model"]["parameters"]["total"]
    config = json.dumps(_without_place(run), indent=2, ensure_ascii=False)
    return (
        f'<h3 id="{_anchor(run)}-settings">Settings</h3><details><summary>Parameters by part</summary>'
        f'<table>{rows}<tr><th scope="row">all</th><td>{total:,}</td></tr></table></details>'
        f"<details><summary>The whole configuration</summary><pre>{escape(config)}</pre></details>"
    )


def _without_place(run: Run) -> Record:
    """The config with a path to text shortened to its name: the page may be passed on."""
    data = run.config["data"]
    return {**run.config, "data": {**data, "source": Path(data["source"]).name}}


def _footer(runs: Sequence[Run]) -> str:
    versions: dict[str, Any] = {}
    for run in runs:
        versions.update(run.info.get("versions", {}))
    words = ", ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in versions.items())
    names = " ".join(escape(run.name) for run in runs)
    return (
        f"<p>Made with {words or 'OpenMythos'}. Draw it again, from the folder that holds the runs: "
        f"<code>mythos report {names} --out report.html</code>. Every picture reads only the JSON files "
        "named beneath it.</p>"
    )
