"""The report: honest findings, one page that needs nothing else, records that give the same page again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos
from open_mythos.analysis import plots
from open_mythos.analysis.findings import find
from open_mythos.analysis.records import ReportError, make_records, read_run, token_label
from open_mythos.analysis.report import build_report, page
from open_mythos.weights import save_pretrained

LOOPS = [1, 4, 16, 32]
SIZES = {
    "dim": 16, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 160, "max_loop_iters": 4, "prelude_layers": 0,
    "coda_layers": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 0,
    "max_output_tokens": 12,
}  # fmt: skip


def _sweep(metric: str, *curves: list[float], trained_max: int = 16) -> dict:
    names = ["test", "test@48 bits", "test@64 bits"]
    splits = {name: {"loops": LOOPS, "values": curve} for name, curve in zip(names, curves, strict=False)}
    return {"metric": metric, "trained_mean": 8.46, "trained_max": trained_max, "splits": splits}


def _run(folder: Path, data: dict, evaluation: dict | None, **model: object) -> Path:
    """A run directory as `mythos train` leaves it, its model untrained."""
    torch.manual_seed(0)
    folder.mkdir()
    save_pretrained(OpenMythos(MythosConfig(**{**SIZES, **model})), folder / "model")
    config = {
        "data": data, "loops": {"kind": "progressive", "free": 8, "grad": 8},
        "train": {"steps": 50, "batch_size": 4, "seed": 3}, "eval": {"loops": LOOPS, "levels": []},
    }  # fmt: skip
    info = {
        "config": config,
        "versions": {"torch": "2.x <&>"},
        "seconds": 90.0,
        "loops": {"mean": 8.46, "max": 16},
    }
    (folder / "run.json").write_text(json.dumps(info))
    rows = [{"step": i, "loss": 3 - i / 60, "rho": 0.4} for i in range(0, 50, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluation is not None:
        (folder / "eval.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One task run and one text run, with records, and the page beside them."""
    root = tmp_path_factory.mktemp("runs")
    parity = _run(
        root / "parity <b>", {"source": "parity", "length": 12, "bos": True},
        _sweep("accuracy", [0.6, 0.8, 0.95, 0.97], [0.5, 0.61, 0.93, 0.97]),
        vocab_size=4, attn_type="gqa",
    )  # fmt: skip
    text = _run(
        root / "text", {"source": str(root / "secret" / "notes.md"), "seq_len": 64},
        _sweep("bits_per_byte", [3.0, 2.5, 2.4, 2.45]),
        vocab_size=259, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    build_report([parity, text], root / "out" / "report.html")
    return [parity, text]


def _html(runs: list[Path]) -> str:
    return (runs[0].parent / "out" / "report.html").read_text("utf-8")


class _Page(HTMLParser):
    """Collects ids, links, picture sources, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.alternatives: list[str | None] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        if tag == "a":
            self.links.append(values["href"] or "")
        if tag == "img":
            self.sources.append(values["src"] or "")
            self.alternatives.append(values.get("alt"))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(html: str) -> _Page:
    parsed = _Page()
    parsed.feed(html)
    assert parsed.open == []
    return parsed


def test_page_needs_nothing_outside_itself(runs: list[Path]):
    html = _html(runs)
    parsed = _parsed(html)
    assert parsed.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in parsed.sources)
    assert all(parsed.alternatives)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert not re.search(r"url\(|@import|https?://", html)


def test_every_link_of_the_page_has_its_target(runs: list[Path]):
    parsed = _parsed(_html(runs))
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)
    for part in ("quality", "answers", "loss", "halting", "experts", "motion", "latent", "rho", "samples"):
        assert any(name.endswith(f"-{part}") for name in parsed.ids), part


def test_text_from_outside_is_escaped_and_no_place_of_this_machine_is_told(runs: list[Path]):
    html = _html(runs)
    assert "parity <b>" not in html
    assert "parity &lt;b&gt;" in html
    assert "2.x &lt;&amp;&gt;" in html
    assert "notes.md" in html
    assert str(runs[0].parent) not in html


def test_records_alone_give_the_same_page_and_the_same_model_the_same_records(runs: list[Path]):
    html = _html(runs)
    assert page([read_run(run) for run in runs]) == html
    files = {file: file.read_bytes() for file in (runs[1] / "records").iterdir()}
    make_records(read_run(runs[1]))
    assert {file: file.read_bytes() for file in (runs[1] / "records").iterdir()} == files


def test_samples_are_at_one_four_and_sixteen_loops(runs: list[Path]):
    record = read_run(runs[1]).records["samples"]
    assert record["loops"] == [1, 4, 16]
    assert all(len(texts) == len(record["prompts"]) for texts in record["texts"].values())
    for heading in ("1 loop<", "4 loops<", "16 loops<"):
        assert f"<h4>{heading}" in _html(runs)


def test_answers_mark_exactly_what_is_wrong(runs: list[Path]):
    answers = read_run(runs[0]).records["answers"]
    assert answers["chance"] == 0.5
    assert answers["loops"] == LOOPS
    wanted = answers["example"]["wanted"]
    parity, odd = [], 0
    for bit in answers["example"]["input"][1:]:
        odd ^= int(bit)
        parity.append(str(odd))
    assert wanted == parity
    for answer in answers["example"]["answers"]:
        assert answer["right"] == [a == b for a, b in zip(answer["answer"], wanted, strict=True)]
    wrong = sum(answer["right"].count(False) for answer in answers["example"]["answers"])
    assert _html(runs).count("<mark>") == wrong > 0


def test_a_run_without_evaluation_says_so(tmp_path: Path):
    run = _run(tmp_path / "r", {"source": "parity", "length": 4}, None, vocab_size=4, halting="off")
    out = build_report([run], tmp_path / "r.html")
    html = out.read_text("utf-8")
    assert "not evaluated yet" in html
    ids = _parsed(html).ids
    assert "run-r-quality" not in ids
    assert "run-r-halting" not in ids  # halting is off
    assert "run-r-footprint" in ids


@pytest.mark.parametrize(
    ("evaluation", "headline", "verdict", "rises"),
    [
        (
            _sweep("accuracy", [0.9, 0.99, 0.99, 0.99], [0.5, 0.61, 0.93, 0.97]),
            "Parity, test@48 bits: 61.0 % right at 4 loops, 93.0 % right at 16 loops, 97.0 % right at 32 "
            "loops; trained with at most 16.",
            "add another 4.0 points.",
            True,
        ),
        (_sweep("accuracy", [0.5, 0.8, 0.9, 0.7]), "70.0 %", "does not rise: at 32 loops it loses 20", False),
        (_sweep("accuracy", [0.5, 0.8, 0.9, 0.902]), "", "neither rises nor falls", False),
        (_sweep("accuracy", [0.5, 0.8, 0.9, 0.902], trained_max=64), "", "No loop count beyond", False),
        (_sweep("bits_per_byte", [3.0, 2.5, 2.4, 2.3]), "2.400 bits per byte at", "add another 0.100", True),
        (_sweep("bits_per_byte", [3.0, 2.5, 2.4, 2.6]), "", "at 32 loops it loses 0.200 bits per byte", False),
        (_sweep("bits_per_token", [3.0, 2.5, 2.4, 2.6]), "2.400 bits per token at", "0.200 bits per token", False),
        (_sweep("accuracy", [0.5, 0.8, 0.7, 0.7]), "", "From 4 loops to 16 it loses 10.0 points", False),
    ],
)  # fmt: skip
def test_finding_is_honest(evaluation: dict, headline: str, verdict: str, rises: bool):
    found = find(evaluation, "Parity")
    assert headline in found.headline
    assert verdict in found.verdict
    assert found.rises is rises


def test_a_rise_that_is_lost_again_is_told():
    evaluation = _sweep("accuracy", [0.5, 0.8, 0.95, 0.6], trained_max=4)
    assert find(evaluation, "x").verdict.endswith(
        "add another 15.0 points. At 32 it is back to 60.0 % right."
    )


@pytest.mark.parametrize(
    ("token", "source", "label"),
    [
        (65, "text", "A"), (32, "text", "·"), (10, "text", r"\n"), (7, "text", r"\x07"),
        (200, "text", r"\xc8"), (256, "text", "BOS"), (300, "text", "300"),
        (2, "parity", "1"), (3, "parity", "BOS"),
        (12, "digit_chain", "2"), (2, "addition", "="), (2, "khop", "?"),
    ],
)  # fmt: skip
def test_token_labels_are_readable(token: int, source: str, label: str):
    assert token_label(token, source) == label


def _broken(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


GOOD = json.dumps({"config": {"data": {"source": "parity"}}})


def test_a_folder_that_is_no_run_is_refused_before_any_work(tmp_path: Path):
    out = tmp_path / "out.html"
    cases = {
        "give at least one run": [],
        "is not there": [tmp_path / "none"],
        "has no run.json": [_broken(tmp_path / "a")],
        "not valid JSON": [_broken(tmp_path / "b", run_json="{")],
        "no config with": [_broken(tmp_path / "c", run_json="{}")],
        "line 2 is not valid JSON": [_broken(tmp_path / "d", run_json=GOOD, metrics_jsonl="{}\n{\n")],
        "has no model/": [_broken(tmp_path / "e", run_json=GOOD)],
        "2 folders named 'e'": [tmp_path / "e", tmp_path / "e"],
    }
    for message, folders in cases.items():
        with pytest.raises(ReportError, match=message):
            build_report(folders, out)
    assert not out.exists()


def test_without_matplotlib_the_error_names_the_extra():
    code = "import sys; sys.modules['matplotlib'] = None; import open_mythos.analysis.report"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("is not installed: pip install open-mythos[report]")


def test_a_figure_has_the_same_bytes_each_time_and_leaves_the_settings_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    rows = [{"step": i, "loss": 2.0 - i / 10, "rho": 0.5} for i in range(5)]
    assert plots.to_svg(plots.loss(rows)) == plots.to_svg(plots.loss(rows))
    assert plots.to_png(plots.spectral(rows)) == plots.to_png(plots.spectral(rows))
    assert dict(mpl.rcParams) == before


def test_a_step_that_was_not_finite_is_left_out_of_the_figures():
    rows = [{"step": i, "loss": 2.0 - i / 10, "rho": 0.5} for i in range(5)]
    broken = [*rows, {"step": 5, "loss": None, "rho": None}]
    assert plots.to_svg(plots.loss(broken)) == plots.to_svg(plots.loss(rows))
    assert plots.to_svg(plots.spectral(broken)) == plots.to_svg(plots.spectral(rows))


def test_many_experts_are_drawn_as_a_heat_map_and_few_as_bars():
    few = plots.experts({"expert_loads": [[1, 2, 3, 4]] * 3})
    many = plots.experts({"expert_loads": [[1] * 16] * 3})
    assert not few.axes[0].images
    assert many.axes[0].images


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="metrics is empty"):
        plots.loss([])
    with pytest.raises(ValueError, match="halting = 'off'"):
        plots.halting({"halting": None})
