"""How fast text is prepared and read, one process and one core for each.

Documents are cut from the text that comes with Python, about 4,000 characters each, as in web corpora. Preparing is
timed from the files to the shards on disk, with hashes and splits; reading is timed from mapped shards to int64
tensors, in random order. The best of three counts. ``--out`` writes JSON.

    python benchmarks/data_speed.py [--out docs/results/data_speed.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # of the tokenizers library

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from open_mythos.training.batches import PackedDataset
from open_mythos.training.data import open_source
from open_mythos.training.dataconfig import DataConfig
from open_mythos.training.prepare import prepare
from open_mythos.training.shards import Blocks

CHARACTERS, ROUNDS = 4000, 3


def documents() -> list[str]:
    """Pieces of the standard library's text."""
    records = open_source(DataConfig("python")).records
    texts = [r.text if isinstance(r.text, str) else r.text.decode("utf-8") for r in records]
    return [text[i : i + CHARACTERS] for text in texts for i in range(0, len(text), CHARACTERS)]


def write_sources(folder: Path, rows: list[str]) -> dict[str, dict[str, Any]]:
    """The same documents in each form; name → [data] section."""
    pq.write_table(pa.table({"text": rows}), folder / "rows.parquet")
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(rows[::20], trainer)
    tokenizer.save(str(folder / "bpe.json"))
    return {
        "parquet, bytes": {"source": str(folder / "rows.parquet")},
        "jsonl, bytes": {"source": str(folder / "rows.jsonl")},
        "parquet, BPE of 8,192": {
            "source": str(folder / "rows.parquet"),
            "tokenizer": str(folder / "bpe.json"),
        },
    }


def best(work: Callable[[int], None]) -> float:
    """Seconds of the fastest round."""
    seconds = []
    for number in range(ROUNDS):
        began = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def reading(folder: Path, batch: int, seq_len: int, prefetch: int) -> float:
    """Tokens per second of a stream."""
    prepared = prepare(DataConfig(str(folder / "rows.parquet"), {"cache": str(folder / "0")}))
    blocks = Blocks(prepared.folder, prepared.index, "train", seq_len)
    stream = PackedDataset(blocks, batch, prefetch=prefetch)
    batches = max(4, 2**21 // (batch * seq_len))
    seconds = best(lambda _: [next(stream) for _ in range(batches)] and None)
    stream.close()
    return batches * batch * seq_len / seconds


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = documents()
    size = sum(len(row.encode()) for row in rows) / 1e6
    result: dict[str, Any] = {
        "command": "python benchmarks/data_speed.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "text_mb": round(size, 1),
        "documents": len(rows),
        "prepare_mb_per_s": {},
        "read_tokens_per_s": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, section in write_sources(folder, rows).items():
            source = section.pop("source")
            seconds = best(
                lambda n, s=source, o=section: prepare(DataConfig(s, {**o, "cache": str(folder / str(n))}))
            )  # type: ignore[misc]
            result["prepare_mb_per_s"][label] = round(size / seconds, 1)
        for batch, seq_len in ((8, 256), (8, 1024), (512, 1024), (8, 4096)):
            for prefetch in (0, 2):
                label = f"{batch} x {seq_len}" + (", made ahead" if prefetch else "")
                result["read_tokens_per_s"][label] = round(reading(folder, batch, seq_len, prefetch), -3)
    json.dump(result, sys.stdout, indent=2)
    print()
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
