"""What the report draws: records made from a finished run, kept as JSON in its ``records/`` folder.

A run directory holds ``run.json``, ``metrics.jsonl``, ``model/`` and, once evaluated, ``eval.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.accounting import flops_per_token, parameters
from open_mythos.analysis.probes import Record, kv_footprint, latent_path, trace
from open_mythos.inference.generate import generate
from open_mythos.model import OpenMythos, spectral_radius
from open_mythos.tasks import IGNORE_INDEX, TASKS, Batch, Task, get_task, seeded_generator
from open_mythos.tokenizer import MythosTokenizer, tokenizer_of
from open_mythos.weights import from_pretrained

__all__ = ["ReportError", "Run", "make_records", "read_run", "token_label"]

SAMPLE_LOOPS = (1, 4, 16)
PROMPTS = ("The function returns ", "class Queue:\n    ", "If the file is not found, ")
# Our own sentences, in the manner of a manual; the first is shown token by token.
SENTENCES = (
    "The method returns a new list, and the old one is not changed.",
    "A class may define more than one name for the same attribute.",
    "If no argument is given, the current directory is used.",
    "Each line of the file is read once, from first to last.",
)
SEED = 0
SEQUENCES = 48


class ReportError(ValueError):
    """A folder that is not a finished run. The message names the file and says what makes it."""


@dataclass(frozen=True)
class Run:
    """A run directory, read.

    Attributes:
        path: the folder.
        info: ``run.json``.
        metrics: ``metrics.jsonl``, one object per logged step.
        evaluation: ``eval.json``; None when the run was not evaluated.
        records: what :func:`make_records` made, by name; empty before.
    """

    path: Path
    info: Record
    metrics: list[Record]
    evaluation: Record | None
    records: dict[str, Record]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def config(self) -> Record:
        """The resolved run config, by section."""
        config: Record = self.info["config"]
        return config

    @property
    def task(self) -> Task | None:
        """The reasoning task trained on; None for text."""
        options = dict(self.config["data"])
        source = options.pop("source")
        if source not in TASKS:
            return None
        return get_task(source, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def read_run(path: Path) -> Run:
    """Read a run directory and the records it has.

    Raises:
        ReportError: the folder or one of its files is missing or is not what it should be.
    """
    path = Path(path)
    if not path.is_dir():
        raise ReportError(f"run directory {str(path)!r} is not there: make one with `mythos train CONFIG`")
    if not (path / "run.json").is_file():
        raise ReportError(
            f"{str(path)!r} is not a run directory: it has no run.json, which `mythos train` writes"
        )
    info = _read(path / "run.json")
    if not isinstance(info, dict) or "source" not in info.get("config", {}).get("data", {}):
        raise ReportError(
            f"{path / 'run.json'} has no config with [data] source: it is not from `mythos train`"
        )
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    folder = path / "records"
    records = {file.stem: _read(file) for file in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    return Run(
        path=path,
        info=info,
        metrics=[_parse(line, f"{metrics}, line {i}") for i, line in enumerate(lines, 1) if line.strip()],
        evaluation=_read(path / "eval.json") if (path / "eval.json").is_file() else None,
        records=records,
    )


def make_records(run: Run) -> Run:
    """Probe the run's model and write ``records/*.json``; the same model gives the same records.

    Raises:
        ReportError: the run has no model.
    """
    if not (run.path / "model").is_dir():
        raise ReportError(
            f"{str(run.path)!r} has no model/: the run did not finish; run `mythos train` again"
        )
    model = from_pretrained(run.path / "model").eval()
    with _one_thread():
        records = _probe(run, model)
    folder = run.path / "records"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.json"):
        stale.unlink()
    for name, record in records.items():
        text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return read_run(run.path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same sums on every machine; and models this small wait for a second thread more than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _probe(run: Run, model: OpenMythos) -> dict[str, Record]:
    """All records of a run, by name."""
    depth = max(16, min(int(trained_max(run) or model.cfg.max_loop_iters), 32))
    task = run.task
    records = _text_records(run, model, depth) if task is None else _task_records(run, task, model, depth)
    records["model"] = _model_record(model)
    # A config made for GQA leaves MLA's sizes at their defaults, which suit far larger models.
    if model.cfg.attn_type == "mla":
        records["footprint"] = kv_footprint(model.cfg, tokens=int(records["trace"]["width"]), loops=depth)
    return records


def trained_max(run: Run) -> int | None:
    """Most loops that a training step ran, as the evaluation recorded it."""
    return None if run.evaluation is None else run.evaluation.get("trained_max")


def _text_records(run: Run, model: OpenMythos, depth: int) -> dict[str, Record]:
    tokenizer = tokenizer_of(run.config["data"])
    if tokenizer is None:
        raise ReportError(
            f"{str(run.path)!r} was trained on ids without a tokenizer: there is no text to show"
        )
    rows = [_encode(model, tokenizer, text)[: model.cfg.max_seq_len] for text in SENTENCES]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    bytewise = tokenizer.fingerprint == "bytes"
    labels = [token_label(int(i)) if bytewise else repr(tokenizer.decode([int(i)]))[1:-1] for i in ids[0]]
    return {**_look_inside(model, ids, mask, depth, labels), "samples": _samples(model, tokenizer)}


def _encode(model: OpenMythos, tokenizer: MythosTokenizer, text: str) -> list[int]:
    bos = model.cfg.bos_token_id
    return [*([] if bos is None else [bos]), *tokenizer.encode(text)]


def _task_records(run: Run, task: Task, model: OpenMythos, depth: int) -> dict[str, Record]:
    levels = [int(n) for n in run.config.get("eval", {}).get("levels", [])]
    own = getattr(task, task.difficulty)
    hardest = max([*levels, own[1] if isinstance(own, tuple) else own])
    batch = task.sample(
        SEQUENCES, generator=seeded_generator("report", SEED), split="test", **{task.difficulty: hardest}
    )
    source = str(run.config["data"]["source"])
    labels = [token_label(int(i), source) for i in batch.ids[0]]
    records = _look_inside(model, batch.ids, (batch.ids != 0).long(), depth, labels)
    loops = [] if run.evaluation is None else next(iter(run.evaluation["splits"].values()))["loops"]
    records["answers"] = {
        **_answers(model, batch, source, [int(n) for n in loops] or [1, 4, 16]),
        "split": f"{task.difficulty} {hardest}",
    }
    return records


def _look_inside(
    model: OpenMythos, ids: Tensor, mask: Tensor, depth: int, labels: list[str]
) -> dict[str, Record]:
    """Trace and latent path of a batch; the first row is shown token by token."""
    found = trace(model, ids, depth, attention_mask=None if bool(mask.all()) else mask, keep_states=True)
    record = found.to_record(max_tokens=64, labels=labels)
    real = mask[0].nonzero().flatten().tolist()
    # Every text starts with the same mark, whose state lies far off and would squeeze the others.
    real = real[1:] if labels[0] == "BOS" and len(real) > 1 else real
    path = latent_path(found, sorted({real[round(i * (len(real) - 1) / 5)] for i in range(6)}))
    path["labels"] = [f"{labels[i]} ({i})" for i in path["tokens"]]
    return {"trace": {**record, "mode": model.cfg.halting, "width": ids.shape[1]}, "latent": path}


def _samples(model: OpenMythos, tokenizer: MythosTokenizer) -> Record:
    """Continuations of the same prompts at several loop counts; the draws start from the same seed."""
    prompts = [_encode(model, tokenizer, prompt) for prompt in PROMPTS]
    longest = max(len(prompt) for prompt in prompts)
    new = min(120, model.cfg.max_output_tokens, model.cfg.max_seq_len - longest + 1)
    texts: dict[str, list[str]] = {}
    for loops in SAMPLE_LOOPS:
        ids = generate(model, prompts, new, loops, temperature=0.7, top_k=40, seed=SEED)
        texts[str(loops)] = [tokenizer.decode(row[longest:]) for row in ids.tolist()]
    return {
        "loops": list(SAMPLE_LOOPS), "prompts": list(PROMPTS), "texts": texts, "seed": SEED,
        "temperature": 0.7, "top_k": 40, "new_tokens": new,
    }  # fmt: skip


@torch.no_grad()
def _answers(model: OpenMythos, batch: Batch, source: str, loops: Sequence[int]) -> Record:
    """Share of right answers by position and loop count, and one sequence written out."""
    scored = batch.targets != IGNORE_INDEX
    columns = scored.any(0).nonzero().flatten()
    right, shown = [], []
    for n in loops:
        guess = model(batch.ids, n_loops=n).argmax(-1)
        hit = ((guess == batch.targets) & scored).sum(0)[columns] / scored.sum(0)[columns]
        right.append([round(float(x), 4) for x in hit])
        row = [i for i in columns.tolist() if scored[0, i]]
        shown.append({
            "loops": n,
            "answer": [token_label(int(guess[0, i]), source) for i in row],
            "right": [bool(guess[0, i] == batch.targets[0, i]) for i in row],
        })  # fmt: skip
    row = [i for i in columns.tolist() if scored[0, i]]
    return {
        "loops": list(loops),
        "right": right,
        "positions": [int(i) for i in columns],
        "chance": round(1 / len(batch.targets[scored].unique()), 4),
        "sequences": batch.ids.shape[0],
        "example": {
            "input": [token_label(int(i), source) for i in batch.ids[0] if int(i) != 0],
            "wanted": [token_label(int(batch.targets[0, i]), source) for i in row],
            "answers": shown,
        },
    }


def _model_record(model: OpenMythos) -> Record:
    count = parameters(model.cfg)
    return {
        "config": model.cfg.to_dict(),
        "parameters": {"parts": dict(count.parts), "total": count.total, "active": count.active},
        "rho": spectral_radius(model),
        "guess_nats": math.log(model.cfg.vocab_size),
        "flops_per_token": {str(n): flops_per_token(model.cfg, n) for n in SAMPLE_LOOPS},
    }


def token_label(token: int, source: str = "text") -> str:
    """A short readable name of a token: a byte as it prints, a task's symbol, else its number.

    Example:
        >>> [token_label(i) for i in b"a-"]
        ['a', '-']
    """
    if source in TASKS:
        return _task_label(token, source)
    if token >= 256:
        return {256: "BOS", 257: "EOS", 258: "PAD"}.get(token, str(token))
    if token == 32:
        return "·"
    if 32 < token < 127:
        return chr(token)
    return {9: r"\t", 10: r"\n", 13: r"\r"}.get(token, f"\\x{token:02x}")


def _task_label(token: int, source: str) -> str:
    from open_mythos.tasks import addition, digit_chain, khop

    names, base = {
        "parity": ({0: "PAD", 3: "BOS"}, 1),
        "digit_chain": ({0: "PAD", 1: "START", 2: "="}, digit_chain.DIGIT_BASE),
        "addition": ({0: "PAD", addition.PLUS: "+", addition.EQ: "="}, addition.DIGIT_BASE),
        "khop": ({0: "PAD", khop.EDGE: "→", khop.QUERY: "?", khop.HOP: "hop"}, khop.NODE_BASE),
    }[source]
    if token in names:
        return names[token]
    return str(token - base) if token >= base else str(token)


def _read(path: Path) -> Any:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8 text: {error.reason}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(f"{where} is not valid JSON: {error}") from error
