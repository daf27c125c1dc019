"""Bad records: counted by reason, located, and never trained on."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from open_mythos.config import ConfigError
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.training.batches import PackedDataset
from open_mythos.training.shards import Blocks

from .test_prepare import all_documents, jsonl, make

EOS = ByteTokenizer.eos_id


def test_a_thousand_bad_records_are_counted_located_and_never_trained_on(tmp_path: Path):
    """Every good byte is below 0x80 and lower case; every bad record holds an upper-case letter or is no text."""
    draw = random.Random(0)
    bad_lines = {
        "not UTF-8": [b'{"text": "BAD \xff\xfe"}', b'{"text": "BAD \\ud800"}'],
        "empty": [b'{"text": ""}', b"", b'{"text": " \\n "}'],
        "too long": [b'{"text": "' + b"BAD" * 200 + b'"}'],
        "not JSON": [b'{"text": "BAD', b"BAD", b'{"text": ' + b"9" * 5000 + b"}"],
        "missing field": [b'{"body": "BAD"}', b'["BAD"]', b"3"],
        "null": [b'{"text": null}'],
        "not text": [b'{"text": ["BAD"]}', b'{"text": 7}'],
    }
    lines = [(b'{"text": "good text %d"}' % i, "") for i in range(1500)]
    lines += [(draw.choice(kinds), reason) for reason, kinds in bad_lines.items() for _ in range(100)]
    draw.shuffle(lines)
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(line for line, _ in lines) + b"\n")
    expected = {f"lines.jsonl:{i}": reason for i, (_, reason) in enumerate(lines, start=1) if reason}

    rows: list[bytes | None] = [b"good row %d" % i for i in range(300)]
    faults = {"not UTF-8": b"BAD\xff", "empty": b"", "too long": b"BAD" * 200, "null": None}
    for i, (reason, row) in enumerate(itertools.islice(itertools.cycle(faults.items()), 295)):
        rows.insert(draw.randrange(len(rows)), row)
        del i, reason
    reasons = {row: reason for reason, row in faults.items()}
    expected |= {f"rows.parquet:{i}": reasons[row] for i, row in enumerate(rows) if row in reasons}
    raw = pa.array(rows, pa.binary())
    # As some writers leave it: a string column whose bytes nobody has checked.
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet", row_group_size=64)

    (tmp_path / "latin.txt").write_bytes(b"BAD caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "huge.txt").write_bytes(b"BAD" * 1000)
    pq.write_table(pa.table({"body": ["BAD"]}), tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-100])
    expected |= {"latin.txt": "not UTF-8", "empty.txt": "empty", "huge.txt": "too long"}
    expected |= {"other.parquet": "missing field", "cut.parquet": "truncated"}
    assert len(expected) == 1000

    prepared = make(tmp_path, max_document_chars=500)
    assert prepared.index["bad"] == dict(sorted(Counter(expected.values()).items()))
    assert {found["where"]: found["reason"] for found in prepared.located()} == expected
    report = prepared.report()
    assert report["documents"] == 1800
    assert report["bad"] == prepared.index["bad"]
    assert len(report["bad_first"]) == 10
    assert str(tmp_path) not in json.dumps(report)

    kept = Counter(bytes(document) for document in all_documents(prepared))
    assert kept == Counter(
        [b"good text %d" % i for i in range(1500)] + [b"good row %d" % i for i in range(300)]
    )
    blocks = Blocks(prepared.folder, prepared.index, "train", 32)
    trained = torch.cat([batch["ids"].flatten() for batch in PackedDataset(blocks, 16, epochs=1)])
    allowed = {*b"abcdefghijklmnopqrstuvwxyz 0123456789", EOS}
    assert set(trained.tolist()) <= allowed


def test_ids_out_of_the_vocabulary_drop_their_document(tmp_path: Path):
    good = [[1, 2, 3], [4], [5, 6]] * 20
    mixed = [*good, [1, 100, 2], [65535]]
    random.Random(0).shuffle(mixed)
    np.array([i for document in mixed for i in [*document, 99]], dtype="<u2").tofile(tmp_path / "x.bin")
    np.save(tmp_path / "y.npy", np.array([7, -1, 99, 8, 8, 99], dtype=np.int64))
    prepared = make(tmp_path, token_dtype="uint16", vocab_size=100, eos_id=99)
    assert prepared.index["bad"] == {"out of vocabulary": 3}
    starts = list(itertools.accumulate((len(document) + 1 for document in mixed), initial=0))
    where = {f"x.bin:{start}" for start, d in zip(starts, mixed, strict=False) if max(d) >= 100} | {"y.npy:0"}
    assert {found["where"] for found in prepared.located()} == where
    assert "id -1 at 1, V is 100" in [found["detail"] for found in prepared.located()]
    assert Counter(map(tuple, all_documents(prepared))) == Counter(map(tuple, [*good, [8, 8]]))


def test_token_files_that_were_cut_lose_what_was_cut(tmp_path: Path):
    run = [i for n in range(30) for i in (n, n, 99)]
    data = np.array(run, dtype="<u4").tobytes()
    (tmp_path / "a.bin").write_bytes(data[:-6])
    np.save(tmp_path / "b.npy", np.array(run))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-6])
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00\x20\x00{'descr': (" + b" " * 60)
    prepared = make(tmp_path, token_dtype="uint32", vocab_size=100, eos_id=99)
    assert prepared.index["bad"] == {"damaged": 1, "truncated": 2}
    assert [found["where"] for found in prepared.located()] == ["a.bin:87", "b.npy", "c.npy"]
    assert sorted(all_documents(prepared)) == [[n, n] for n in range(29)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_gives_its_whole_lines(tmp_path: Path, suffix: str):
    rng = random.Random(0)
    rows = ["".join(rng.choices("abcdefgh", k=4000)) for _ in range(600)]
    data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    packed = gzip.compress(data) if suffix == ".gz" else pa.compress(data, codec="zstd", asbytes=True)
    (tmp_path / f"x.jsonl{suffix}").write_bytes(packed[: len(packed) * 3 // 4])
    prepared = make(tmp_path)
    assert prepared.index["bad"] == {"truncated": 1}
    kept = prepared.index["documents"]
    assert 100 < kept < 600
    assert prepared.located()[0]["where"] == f"x.jsonl{suffix}:{kept + 1}"
    assert Counter(bytes(d).decode() for d in all_documents(prepared)) == Counter(rows[:kept])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_small_compressed_file_that_was_cut_gives_its_whole_lines(tmp_path: Path, suffix: str):
    """Smaller than what is read at a time, so that the first read meets the cut."""
    rng = random.Random(0)
    rows = ["".join(rng.choices("abcdefgh", k=400)) for _ in range(1500)]
    data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    packed = gzip.compress(data) if suffix == ".gz" else pa.compress(data, codec="zstd", asbytes=True)
    (tmp_path / f"x.jsonl{suffix}").write_bytes(packed[: len(packed) * 3 // 4])
    prepared = make(tmp_path)
    kept = prepared.index["documents"]
    assert 750 < kept < 1500
    assert prepared.located()[0]["where"] == f"x.jsonl{suffix}:{kept + 1}"


def test_nothing_of_a_damaged_compressed_file_is_trained_on(tmp_path: Path):
    """A flipped bit in stored text, which only the checksum at the end of the file tells."""
    jsonl(tmp_path / "good.jsonl", ["good"] * 30)
    data = "".join(json.dumps({"text": f"text {i:03d}"}) + "\n" for i in range(300)).encode()
    packed = bytearray(gzip.compress(data, compresslevel=0))
    packed[packed.index(b"text 007")] ^= 1
    (tmp_path / "flipped.jsonl.gz").write_bytes(packed)
    packed = bytearray(gzip.compress(data))
    packed[200:260] = bytes(60)
    (tmp_path / "zeros.jsonl.gz").write_bytes(packed)
    prepared = make(tmp_path)
    assert prepared.index["bad"] == {"damaged": 2}
    assert [found["where"] for found in prepared.located()] == ["flipped.jsonl.gz", "zeros.jsonl.gz"]
    assert {bytes(d) for d in all_documents(prepared)} == {b"good"}


def test_a_damaged_row_group_costs_itself_only(tmp_path: Path):
    path = tmp_path / "x.parquet"
    rows = [f"row {i} " + "x" * 50 for i in range(60)]
    table = pa.table({"text": rows})
    pq.write_table(
        table, path, row_group_size=20, compression="none", use_dictionary=False, write_page_checksum=True
    )
    data = bytearray(path.read_bytes())
    data[data.index(b"row 25")] ^= 1
    path.write_bytes(data)
    prepared = make(tmp_path)
    assert prepared.index["bad"] == {"damaged": 20}
    assert prepared.located()[0]["where"] == "x.parquet:20"
    assert prepared.index["documents"] == 40


def test_a_bad_record_stops_a_run_that_wants_none(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n{"text"\n')
    message = r"^data: x.jsonl:2: not JSON \(Expecting ':' delimiter\); data.on_bad = 'skip' leaves"
    with pytest.raises(ConfigError, match=message):
        make(path, on_bad="error")
    make(path)  # in the cache now
    with pytest.raises(ConfigError, match=message):
        make(path, on_bad="error")
    assert make(jsonl(tmp_path / "good.jsonl", ["good"]), on_bad="error").index["documents"] == 1


def test_a_source_without_a_good_document_is_refused_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.jsonl").write_text("{}\n\n")
    (tmp_path / "x" / "x.png").write_text("")
    message = r"holds no document; left out there: {'empty': 1, 'missing field': 1, 'other suffix': 1}"
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "x", cache=str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_what_is_no_file_is_passed_by(tmp_path: Path):
    (tmp_path / "good.txt").write_text("good " * 30, encoding="utf-8")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    prepared = make(tmp_path)
    assert prepared.index["skipped"] == {"not a file": 2}
    assert prepared.index["documents"] == 1
