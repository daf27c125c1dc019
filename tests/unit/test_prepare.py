"""Preparing: splits, tokenizers, the cache, damage; and the ready config for FineWeb-Edu."""

from __future__ import annotations

import itertools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from open_mythos.config import ConfigError
from open_mythos.tokenizer import MythosTokenizer
from open_mythos.training.config import load_config
from open_mythos.training.dataconfig import DataConfig
from open_mythos.training.parallel import World
from open_mythos.training.prepare import Prepared, prepare, split_of_name
from open_mythos.training.shards import Blocks
from open_mythos.training.sources import evaluation_batches, train_stream
from open_mythos.training.trainer import spread

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


PREPARE = """
import sys
from open_mythos.training.dataconfig import DataConfig
from open_mythos.training.prepare import prepare
print(prepare(DataConfig(sys.argv[1], {"cache": sys.argv[2]})).folder)
assert "torch" not in sys.modules
"""


def test_processes_at_once_prepare_once(tmp_path: Path):
    path = jsonl(tmp_path / "x.jsonl", ["some text"] * 2000)
    cache = tmp_path / "cache"
    cache.mkdir()
    # Leftovers of a prepare that was killed are removed.
    prepared = make(path, cache=str(tmp_path / "elsewhere"))
    stale = cache / f"{prepared.folder.name}.part-1"
    stale.mkdir()
    command = [sys.executable, "-c", PREPARE, str(path), str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    folders = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(folders)) == 1
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [prepared.folder.name]


def test_a_killed_prepare_leaves_nothing_that_is_used(tmp_path: Path):
    path = jsonl(tmp_path / "x.jsonl", ["some text " * 100] * 40_000)
    cache = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", PREPARE, str(path), str(cache)], stdout=subprocess.PIPE)
    while process.poll() is None and not list(cache.glob("*.part-*/train-*.bin")):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list(cache.glob("*/index.json"))
    prepared = make(path, cache=str(cache))
    assert prepared.index["documents"] == 40_000
    assert [p for p in cache.iterdir() if p.is_dir()] == [prepared.folder]


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


def test_max_tokens_is_refused_where_one_split_would_take_it_all(tmp_path: Path):
    for split in ("train", "validation", "test"):
        jsonl(tmp_path / f"{split}.jsonl", [f"{split} {i}" for i in range(30)])
    with pytest.raises(
        ConfigError, match=r"^data\.max_tokens = 50 is not allowed with files named by their splits"
    ):
        make(tmp_path, max_tokens=50)
    assert make(tmp_path).index["documents"] == 90


def test_documents_that_max_tokens_leaves_out_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Although the first twenty are read together, to know whether there are that many."""
    monkeypatch.setattr("open_mythos.training.prepare._BATCH_BYTES", 1)
    prepared = make(jsonl(tmp_path / "x.jsonl", ["some text"] * 30), max_tokens=15)
    assert prepared.index["documents"] == 2
    assert sum(split["documents"] for split in prepared.index["splits"].values()) == 2


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


def test_without_verify_only_the_size_of_a_shard_is_compared(tmp_path: Path):
    made = make(jsonl(tmp_path / "x.jsonl", [f"text {i:03d}" for i in range(400)]))
    shard = made.folder / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match="its sha256 is not the one"):
        Blocks(made.folder, made.index, "train", 8)
    Blocks(made.folder, made.index, "train", 8, verify=False)
    shard.write_bytes(data[:-2])
    with pytest.raises(ConfigError, match=rf"it has {len(data) - 2} bytes, not {len(data)}"):
        Blocks(made.folder, made.index, "train", 8, verify=False)


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


def test_files_named_by_their_splits_are_those_splits(tmp_path: Path) -> None:
    words = {"train": ["one", "two"], "validation": ["three"], "test": ["four"]}
    for split, rows in words.items():
        plain = jsonl(tmp_path / f"{split}.jsonl", rows)
        plain.with_suffix(".jsonl.xz").write_bytes(lzma.compress(plain.read_bytes()))
        plain.unlink()
    prepared = make(tmp_path, cache=str(tmp_path / "cache"))
    found = {split: [bytes(d).decode() for d in documents(prepared, split)] for split in SPLITS}
    assert found == words
    assert prepared.report()["split"] == "by the names of the files"


def test_two_files_named_by_splits_are_split_like_any_others(tmp_path: Path) -> None:
    for split in ("train", "test"):
        jsonl(tmp_path / f"{split}.jsonl", [f"{split} {number}" for number in range(200)])
    prepared = make(tmp_path, cache=str(tmp_path / "cache"))
    assert {bytes(d).split()[0] for d in documents(prepared, "train")} == {b"train", b"test"}


@pytest.mark.parametrize(("harm", "reason"), [("cut", "truncated"), ("flip", "damaged")])
def test_a_harmed_xz_file_is_found_out(tmp_path: Path, harm: str, reason: str) -> None:
    packed = bytearray(lzma.compress(b"".join(b'{"text": "row %d"}\n' % n for n in range(5000))))
    if harm == "cut":
        del packed[len(packed) // 2 :]
    else:
        packed[len(packed) // 2] ^= 255
    (tmp_path / "x.jsonl.xz").write_bytes(packed)
    jsonl(tmp_path / "y.jsonl", [f"whole {number}" for number in range(30)])
    prepared = make(tmp_path, cache=str(tmp_path / "cache"))
    assert prepared.index["bad"] == {reason: 1}
