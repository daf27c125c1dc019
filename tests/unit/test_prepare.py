"""Preparing: bad records, splits, tokenizers, the cache, damage; and the ready config for FineWeb-Edu."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from open_mythos.config import ConfigError
from open_mythos.tokenizer import ByteTokenizer, MythosTokenizer
from open_mythos.training.batches import PackedDataset
from open_mythos.training.config import load_config
from open_mythos.training.dataconfig import DataConfig
from open_mythos.training.parallel import World
from open_mythos.training.prepare import Prepared, prepare, split_of_name
from open_mythos.training.shards import Blocks
from open_mythos.training.sources import evaluation_batches, train_stream
from open_mythos.training.trainer import spread

EOS = ByteTokenizer.eos_id
SPLITS = ("train", "validation", "test")


def make(source: str | Path, **options: Any) -> Prepared:
    return prepare(DataConfig(str(source), options))


def documents(prepared: Prepared, split: str) -> list[list[int]]:
    """What the shards of a split hold, end marks left out."""
    shards = prepared.index["splits"][split]["shards"]
    runs = [np.fromfile(prepared.folder / shard["file"], dtype=prepared.index["dtype"]) for shard in shards]
    found: list[list[int]] = [[]]
    for token in itertools.chain(*(run.tolist() for run in runs)):
        if token == prepared.index["eos_id"]:
            found.append([])
        else:
            found[-1].append(token)
    assert found[-1] == [], "a split must end with an end mark"
    return found[:-1]


def all_documents(prepared: Prepared) -> list[list[int]]:
    return [document for split in SPLITS for document in documents(prepared, split)]


def jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


# Bad records


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


# Splits


def test_a_document_keeps_its_split_when_others_come_and_go(tmp_path: Path):
    rows = [f"text {i}" for i in range(400)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    prepared = make(path)
    for number, split in enumerate(SPLITS):
        own = [row for i, row in enumerate(rows, start=1) if split_of_name(f"x.jsonl:{i}") == number]
        assert [bytes(d).decode() for d in documents(prepared, split)] == own
        assert prepared.index["splits"][split]["documents"] == len(own)
    assert len(documents(prepared, "test")) / 400 == pytest.approx(0.05, abs=0.03)
    # Pinned: published losses name a split.
    assert [i for i in range(400) if split_of_name(f"n{i}") == 2][:5] == [10, 33, 64, 67, 77]


@pytest.mark.parametrize(("count", "cut"), [(1, True), (19, True), (20, False)])
def test_few_documents_are_cut_between_characters(tmp_path: Path, count: int, cut: bool):
    text = "äöü€𝄞 " * 50
    prepared = make(jsonl(tmp_path / "x.jsonl", [text] * count))
    assert ("cut" in prepared.index["split"]) == cut
    assert prepared.index["documents"] == count
    if cut:
        pieces = [documents(prepared, split) for split in SPLITS]
        for parts in zip(*pieces, strict=True):
            assert "".join(bytes(part).decode() for part in parts) == text
            assert len(bytes(parts[0]).decode()) == 270


# Tokenizers


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE in one JSON file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the loop is run again and again, the state goes on"] * 50, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file_gives_ids_vocabulary_and_end_mark(tmp_path: Path, bpe: Path):
    rows = [f"the state of loop {i} – again" for i in range(30)] + ["a fake <|endoftext|> inside"]
    path = jsonl(tmp_path / "x.jsonl", rows)
    prepared = make(path, tokenizer=str(bpe), bos=True)
    tokenizer = MythosTokenizer(str(bpe))
    assert prepared.index["vocab_size"] == tokenizer.vocab_size
    assert prepared.index["eos_id"] == tokenizer.eos_id == 0
    assert tokenizer.bos_id == 1
    found = all_documents(prepared)
    assert all(document[0] == 1 for document in found)
    # A document that holds the name of the end mark does not end there.
    assert Counter(tokenizer.decode(document[1:]) for document in found) == Counter(rows)
    assert max(map(len, found)) < 30, "BPE must merge"
    config = load_config(text_config(tmp_path, path, f'tokenizer = "{bpe}"'))
    assert config.model.vocab_size == tokenizer.vocab_size
    assert config.model.eos_token_id == 0
    assert not config.data.is_bytes
    named = load_config(text_config(tmp_path, path, f'tokenizer = "{bpe}"\neos_token = "<s>"'))
    assert named.model.eos_token_id == 1


def text_config(folder: Path, source: Path, data: str = "", model: str = "") -> Path:
    path = folder / "text.toml"
    path.write_text(
        f'[model]\nvariant = "mythos_nano"\n{model}\n[data]\nsource = "{source}"\nseq_len = 16\n{data}\n'
        '[loops]\nkind = "fixed"\nloops = 2\n[train]\nbatch_size = 4\n'
    )
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('tokenizer = "none.json"', r"data.tokenizer = 'none.json' cannot be loaded: .*exists"),
        ('eos_token = "nope"', r"data.tokenizer = 'bytes' cannot be loaded: eos_token='nope'; allowed is a token of"),
    ],
)  # fmt: skip
def test_bad_tokenizers_are_refused(tmp_path: Path, data: str, message: str):
    with pytest.raises(ConfigError, match=message):
        make(
            jsonl(tmp_path / "x.jsonl", ["x"]),
            **dict([line.replace('"', "").split(" = ") for line in [data]]),
        )


def test_a_model_that_does_not_fit_the_tokens_is_refused(tmp_path: Path, bpe: Path):
    path = jsonl(tmp_path / "x.jsonl", [f"the state {i}" * 20 for i in range(40)])
    data = f'tokenizer = "{bpe}"'
    fits = load_config(text_config(tmp_path, path, data, "vocab_size = 512\neos_token_id = 0"))
    train_stream(fits)
    for model, message in (
        ("vocab_size = 100\neos_token_id = 0", "model.vocab_size = 100 is not allowed: .* at least"),
        ("vocab_size = 512\neos_token_id = 5", "model.eos_token_id = 5 is not allowed: it must be 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_stream(load_config(text_config(tmp_path, path, data, model)))


# The cache


def test_a_source_is_prepared_once_and_again_when_it_changes(tmp_path: Path):
    cache = tmp_path / "cache"
    path = jsonl(tmp_path / "x.jsonl", ["one", "two"])
    first = make(path, cache=str(cache))
    stamp = (first.folder / "index.json").stat().st_mtime_ns
    again = make(path, cache=str(cache), seq_len=7, prefetch=0)
    assert again.folder == first.folder
    assert (again.folder / "index.json").stat().st_mtime_ns == stamp
    others = {make(path, cache=str(cache), **o).folder for o in ({"bos": True}, {"max_document_chars": 9})}
    jsonl(path, ["one", "three"])
    others.add(make(path, cache=str(cache)).folder)
    assert len({first.folder, *others}) == 4


def test_processes_at_once_prepare_once(tmp_path: Path):
    path = jsonl(tmp_path / "x.jsonl", ["some text"] * 2000)
    cache = tmp_path / "cache"
    cache.mkdir()
    # Leftovers of a prepare that was killed are removed.
    prepared = make(path, cache=str(tmp_path / "elsewhere"))
    stale = cache / f"{prepared.folder.name}.part-1"
    stale.mkdir()
    code = (
        "import sys; from open_mythos.training.prepare import prepare\n"
        "from open_mythos.training.dataconfig import DataConfig\n"
        "print(prepare(DataConfig(sys.argv[1], {'cache': sys.argv[2]})).folder)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(path), str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    folders = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(folders)) == 1
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [prepared.folder.name]


def test_a_prepare_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = jsonl(tmp_path / "x.jsonl", ["some text"] * 30)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            make(path, cache=str(tmp_path / "cache"))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert make(path, cache=str(tmp_path / "cache")).index["documents"] == 30


def test_max_tokens_stops_after_whole_documents_in_order(tmp_path: Path):
    rows = [f"text {i:04d}" for i in range(500)]  # 10 tokens each with the end mark
    prepared = make(jsonl(tmp_path / "x.jsonl", rows), max_tokens=1001)
    assert prepared.index["documents"] == 101
    assert sum(split["tokens"] for split in prepared.index["splits"].values()) == 1010
    assert Counter(bytes(d).decode() for d in all_documents(prepared)) == Counter(rows[:101])


def test_without_locks_two_may_prepare_and_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = jsonl(tmp_path / "x.jsonl", ["some text"] * 30)
    cache = tmp_path / "cache"

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    fsync, other = os.fsync, []

    def meanwhile(number: int) -> None:
        if not other:
            other.append(None)
            other[0] = make(path, cache=str(cache)).folder
        fsync(number)

    monkeypatch.setattr(os, "fsync", meanwhile)
    assert make(path, cache=str(cache)).folder == other[0]
    assert [p for p in cache.iterdir() if p.is_dir()] == other


def test_few_documents_and_a_limit_on_tokens(tmp_path: Path):
    prepared = make(jsonl(tmp_path / "x.jsonl", ["0123456789" * 10] * 5), max_tokens=150)
    assert prepared.index["documents"] == 5
    assert sum(split["tokens"] for split in prepared.index["splits"].values()) >= 150


def test_a_prepared_folder_is_a_source_itself(tmp_path: Path, bpe: Path):
    made = make(jsonl(tmp_path / "x.jsonl", [f"text {i}" * 9 for i in range(50)]))
    moved = tmp_path / "moved"
    made.folder.rename(moved)
    found = make(moved)
    assert found.folder == moved
    assert found.index == made.index
    with pytest.raises(ConfigError, match="was prepared with tokenizer 'bytes', and this run has"):
        make(moved, tokenizer=str(bpe))


@pytest.mark.parametrize("fault", ["flip", "cut", "missing", "swapped", "index"])
def test_damage_is_found_and_the_file_named(tmp_path: Path, fault: str):
    made = make(jsonl(tmp_path / "x.jsonl", [f"text {i:03d}" for i in range(400)]), cache=str(tmp_path / "c"))
    shard = made.folder / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)
    elif fault == "cut":
        shard.write_bytes(data[:-2])
    elif fault == "missing":
        shard.unlink()
    elif fault == "swapped":
        data[:18], data[18:36] = data[18:36], data[:18]
        shard.write_bytes(data)
    else:
        (made.folder / "index.json").write_text('{"format": 1')
    config = load_config(text_config(tmp_path, tmp_path / "x.jsonl", f'cache = "{tmp_path}/c"'))
    name = "index.json is damaged" if fault == "index" else r"token shard .*train-00000.bin is damaged"
    with pytest.raises(ConfigError, match=rf"{name}.*remove its folder, and prepare again"):
        train_stream(config)


# Runs


def test_a_resume_on_other_data_is_refused(tmp_path: Path):
    path = jsonl(tmp_path / "x.jsonl", [f"text number {i}" for i in range(100)])
    config = load_config(text_config(tmp_path, path))
    stream, _ = train_stream(config)
    batch, state = next(stream), stream.state_dict()
    same, _ = train_stream(config, rank=1, size=2)
    same.load_state_dict({**state, "samples": 0})
    assert torch.equal(next(same)["ids"], batch["ids"][2:])
    jsonl(path, [f"text number {i}" for i in range(101)])
    other, _ = train_stream(config)
    with pytest.raises(ValueError, match=r"fingerprint=.* in the state, but this data has"):
        other.load_state_dict(state)


def test_machines_with_other_data_are_told_before_training(tmp_path: Path):
    class Second(World):
        """The second of two processes; the first one's answer is given."""

        def broadcast(self, value: Any) -> Any:
            return first

        def all_agree(self, flag: bool) -> bool:
            return flag

    world = Second(rank=1, local_rank=0, size=2, device=torch.device("cpu"), mesh=None)
    config = load_config(text_config(tmp_path, jsonl(tmp_path / "x.jsonl", ["some text"] * 30)))
    first = train_stream(config, 0, 2)[0].state_dict()
    spread(config, world)
    first = {**first, "fingerprint": "other"}
    with pytest.raises(ConfigError, match=r"data.source is not the same text on all machines"):
        spread(config, world)


def test_a_batch_must_divide_among_the_processes(tmp_path: Path):
    config = load_config(text_config(tmp_path, jsonl(tmp_path / "x.jsonl", ["text"])))
    with pytest.raises(ConfigError, match=r"train.batch_size = 4 .* multiple of the number of processes, 3"):
        train_stream(config, rank=0, size=3)


def test_a_split_too_small_for_a_block_is_refused(tmp_path: Path):
    config = load_config(text_config(tmp_path, jsonl(tmp_path / "x.jsonl", ["text"])))
    with pytest.raises(ConfigError, match=r"data.seq_len = 16 .* the train split holds 4 tokens"):
        train_stream(config)


def test_the_config_for_fineweb_edu_trains_on_parquet_of_its_schema(root: Path, tmp_path: Path, bpe: Path):
    from .test_data import fineweb

    rng = random.Random(0)
    words = ["the", "loop", "is", "run", "again", "and", "state", "goes", "on", "until", "told", "to", "stop"]
    rows = [" ".join(rng.choices(words, k=200)) for _ in range(120)]
    fineweb(tmp_path / "sample/10BT/000_00000.parquet", rows[:70])
    fineweb(tmp_path / "sample/10BT/001_00000.parquet", rows[70:])
    config = load_config(
        root / "configs" / "fineweb-edu.toml",
        [
            f"data.source={tmp_path}/sample/10BT/*.parquet",
            f"data.tokenizer={bpe}",
            "data.seq_len=64",
            "model.eos_token_id=0",
            "train.batch_size=8",
        ],
    )
    stream, report = train_stream(config)
    assert report["documents"] == 120
    assert report["bad"] == {}
    batch = next(stream)
    assert batch["ids"].shape == (8, 64)
    tokenizer = MythosTokenizer(str(bpe))
    piece = tokenizer.decode(batch["ids"][0][batch["document_ids"][0] == 0].tolist())
    assert piece
    assert any(piece in row for row in rows)
    assert next(iter(evaluation_batches(config, "test")))["ids"].shape[1] == 64
    stream.close()
