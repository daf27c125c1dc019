"""Batches: each sample once an epoch, the same order on every number of ranks, exact resumption."""

from __future__ import annotations

import itertools
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from open_mythos.tasks import Addition, Parity, split_of
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.training.batches import PackedDataset, Permutation, TaskStream
from open_mythos.training.shards import Blocks, ShardWriter

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


def toy_texts(count: int = 23) -> list[bytes]:
    """Lengths from 1 to 19 characters, no two stretches alike."""
    return ["".join(f"{i:02d}-{j:02d};" for j in range(4))[: 1 + (7 * i) % 19].encode() for i in range(count)]


def write(folder: Path, texts: list[bytes], bos: bool = False, shard_tokens: int = 2**26) -> dict[str, Any]:
    """The index of one split made of these documents."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, "train", "uint16", shard_tokens)
    for text in texts:
        writer.write(np.array([BOS] * bos + list(text) + [EOS]), 1)
    return {"eos_id": EOS, "dtype": "uint16", "splits": {"train": writer.finish()}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


def packed(folder: Path, seq_len: int = 8, bos: bool = False) -> Blocks:
    """The toy documents; written once, for a file that is mapped must not change."""
    name = folder / f"bos-{bos}"
    if not name.is_dir():
        (folder / f"{name.name}.json").write_text(json.dumps(write(name, toy_texts(), bos)))
    return Blocks(name, json.loads((folder / f"{name.name}.json").read_text()), "train", seq_len)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# Permutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_a_permutation_visits_each_index_once(n: int):
    order = Permutation(n, 3, 1)(np.arange(n))
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == [int(Permutation(n, 3, 1)(np.array([i]))[0]) for i in range(n)]


def test_permutations_are_well_mixed_and_differ_by_key():
    """Where index 0 goes, over many keys: near uniform (chi-square, 9 degrees of freedom, 99.9 % is 27.9)."""
    places = [int(Permutation(10, seed, 0)(np.array([0]))[0]) for seed in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9
    # Neighbours do not stay neighbours: the mean step of a random order of n is about n / 3.
    order = Permutation(10_000, 0, 0)(np.arange(10_000))
    assert np.abs(np.diff(order)).mean() == pytest.approx(10_000 / 3, rel=0.05)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 4 / math.sqrt(10_000)


def test_a_permutation_of_a_huge_range_costs_nothing():
    order = Permutation(10**15, 0, 0)(np.arange(10**15 - 1000, 10**15))
    assert len(set(order.tolist())) == 1000
    assert 0 <= order.min() <= order.max() < 10**15


# Blocks


@pytest.mark.parametrize("bos", [False, True])
def test_blocks_lay_documents_end_to_end(folder: Path, bos: bool):
    blocks = packed(folder, bos=bos)
    tokens = [i for text in toy_texts() for i in [BOS] * bos + list(text) + [EOS]]
    assert len(blocks) == (len(tokens) - 1) // 8
    rows = blocks.rows(np.arange(len(blocks)))
    for n, row in enumerate(rows.tolist()):
        assert row == tokens[8 * n : 8 * n + 9]
    assert blocks.dropped_tokens == len(tokens) - (8 * len(blocks) + 1)
    assert 0 <= blocks.dropped_tokens < 8
    assert blocks.report()["target_tokens"] == 8 * len(blocks)
    assert blocks.report()["documents"] == 23


def test_blocks_go_on_over_shards_and_documents_are_never_divided(folder: Path):
    index = write(folder / "many", toy_texts(), shard_tokens=30)
    shards = index["splits"]["train"]["shards"]
    assert len(shards) > 4
    blocks = Blocks(folder / "many", index, "train", 8)
    runs = [np.fromfile(folder / "many" / shard["file"], dtype="<u2").tolist() for shard in shards]
    assert [*itertools.chain(*runs)] == [i for text in toy_texts() for i in [*text, EOS]]
    assert all(run[-1] == EOS for run in runs)
    expected = [run[8 * n : 8 * n + 9] for run in runs for n in range((len(run) - 1) // 8)]
    assert blocks.rows(np.arange(len(blocks))).tolist() == expected
    assert blocks.dropped_tokens == sum(map(len, runs)) - sum(
        8 * ((len(run) - 1) // 8) + 1 for run in runs if len(run) > 8
    )


@pytest.mark.parametrize("bos", [False, True])
def test_document_ids_change_exactly_after_eos(folder: Path, bos: bool):
    for batch in PackedDataset(packed(folder, bos=bos), 4, epochs=1):
        ids, documents, targets = batch["ids"], batch["document_ids"], batch["targets"]
        change = documents[:, 1:] != documents[:, :-1]
        assert torch.equal(change, ids[:, :-1] == EOS)
        # The loss does not cross: after EOS nothing is asked, everywhere else the next token is.
        assert torch.equal(targets == -100, ids == EOS)
        inside = targets[:, :-1] != -100
        assert torch.equal(targets[:, :-1][inside], ids[:, 1:][inside])
        if bos:
            assert torch.equal(ids[:, 1:][change], torch.full((int(change.sum()),), BOS))


def test_documents_that_are_not_kept_apart_have_the_same_ids_and_targets(folder: Path):
    apart, joined = (list(PackedDataset(packed(folder), 4, epochs=1, apart=apart)) for apart in (True, False))
    for one, other in zip(apart, joined, strict=True):
        assert one.keys() - other.keys() == {"document_ids"}
        assert all(torch.equal(one[name], value) for name, value in other.items())


def test_with_bos_every_byte_and_end_is_asked_once_but_for_the_tail(folder: Path):
    blocks = packed(folder, bos=True)
    asked = torch.cat([b["targets"].flatten() for b in PackedDataset(blocks, 4, shuffle=False, epochs=1)])
    asked = asked[asked != -100]
    run = [t for text in toy_texts() for t in [*text, EOS]]
    assert asked.tolist() == run[: len(asked)]
    assert len(run) - len(asked) <= blocks.dropped_tokens


# Order


def test_an_epoch_visits_each_block_once_and_the_next_one_in_another_order(folder: Path):
    blocks = packed(folder)
    lookup = {tuple(row[:-1]): n for n, row in enumerate(blocks.rows(np.arange(len(blocks))).tolist())}
    assert len(lookup) == len(blocks), "toy blocks must be told apart"
    stream = PackedDataset(blocks, 1, seed=3)
    order = [lookup[tuple(next(stream)["ids"][0].tolist())] for _ in range(3 * len(blocks))]
    epochs = [order[i : i + len(blocks)] for i in range(0, len(order), len(blocks))]
    assert all(sorted(epoch) == list(range(len(blocks))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = PackedDataset(blocks, 1, seed=4)
    assert [lookup[tuple(next(other)["ids"][0].tolist())] for _ in range(len(blocks))] != epochs[0]


def test_batches_are_full_across_epochs_and_only_the_last_of_all_is_short(folder: Path):
    blocks = packed(folder)
    endless = PackedDataset(blocks, 5)
    assert {len(batch["ids"]) for batch in itertools.islice(endless, 30)} == {5}
    finite = list(PackedDataset(blocks, 5, epochs=2))
    sizes = [len(batch["ids"]) for batch in finite]
    assert sum(sizes) == 2 * len(blocks)
    assert set(sizes[:-1]) == {5}


def test_a_batch_may_hold_more_than_an_epoch(folder: Path):
    blocks = packed(folder)
    batch = next(PackedDataset(blocks, 3 * len(blocks)))["ids"]
    single = torch.cat([b["ids"] for b in itertools.islice(PackedDataset(blocks, 1), 3 * len(blocks))])
    assert torch.equal(batch, single)


def test_without_shuffling_the_order_is_that_of_the_corpus(folder: Path):
    blocks = packed(folder)
    ids = torch.cat([b["ids"] for b in PackedDataset(blocks, 4, shuffle=False, epochs=1)])
    assert ids.tolist() == blocks.rows(np.arange(len(blocks)))[:, :-1].tolist()


# Resuming, on any number of ranks, with batches in flight


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 6, 11, 17])
@pytest.mark.parametrize(("prefetch", "workers"), [(0, 1), (3, 1), (5, 3)])
def test_packed_data_resumes_exactly(folder: Path, steps: int, prefetch: int, workers: int):
    """Stops before, at and after the ends of epochs; the state passes through JSON."""
    ahead = {"prefetch": prefetch, "workers": workers}
    whole = list(itertools.islice(PackedDataset(packed(folder), 5, seed=9), 30))
    first = PackedDataset(packed(folder), 5, seed=9, **ahead)
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = PackedDataset(packed(folder), 5, seed=0, **ahead)
    next(second)
    second.load_state_dict(state)
    assert all(same(next(second), batch) for batch in whole[steps:])
    first.close()
    second.close()


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_the_order_of_samples_does_not_depend_on_the_number_of_ranks(folder: Path, before: int, after: int):
    blocks = packed(folder)
    whole = list(itertools.islice(PackedDataset(blocks, 8, seed=2), 9))

    def together(
        size: int, state: dict[str, Any] | None, steps: int
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        ranks = [PackedDataset(blocks, 8, seed=2, rank=r, size=size, prefetch=2) for r in range(size)]
        for stream in ranks:
            if state is not None:
                stream.load_state_dict(state)
        taken = [torch.cat([next(stream)["ids"] for stream in ranks]) for _ in range(steps)]
        states = [stream.state_dict() for stream in ranks]
        for stream in ranks:
            stream.close()
        return taken, states

    head, states = together(before, None, 4)
    assert all(state == states[0] for state in states)
    tail, _ = together(after, json.loads(json.dumps(states[0])), 5)
    assert torch.equal(torch.cat(head + tail), torch.cat([batch["ids"] for batch in whole]))


def test_a_resume_may_change_the_batch_size(folder: Path):
    whole = torch.cat([b["ids"] for b in itertools.islice(PackedDataset(packed(folder), 6, seed=1), 10)])
    first = PackedDataset(packed(folder), 6, seed=1)
    head = [next(first)["ids"] for _ in range(4)]
    second = PackedDataset(packed(folder), 4, seed=1)
    second.load_state_dict(first.state_dict())
    tail = [next(second)["ids"] for _ in range(9)]
    assert torch.equal(torch.cat(head + tail), whole)


def test_a_batch_is_made_ahead_and_the_state_does_not_know(folder: Path):
    made: list[int] = []
    third = threading.Event()

    class Watched(PackedDataset):
        def batch_at(self, position: int) -> dict[str, Tensor] | None:
            made.append(position)
            if len(made) == 3:
                third.set()
            return super().batch_at(position)

    stream = Watched(packed(folder), 5, prefetch=2)
    next(stream)
    assert third.wait(30)
    assert made == [0, 5, 10]
    assert stream.state_dict()["samples"] == 5
    stream.close()


def test_an_error_in_a_batch_made_ahead_reaches_the_caller(folder: Path):
    class Broken(PackedDataset):
        def batch_at(self, position: int) -> dict[str, Tensor] | None:
            raise OSError("the disk is gone")

    stream = Broken(packed(folder), 5, prefetch=2)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    stream.close()


def test_no_batch_is_lost_when_one_could_not_be_read_at_first(folder: Path):
    class Once(PackedDataset):
        failed = False

        def batch_at(self, position: int) -> dict[str, Tensor] | None:
            if position == 5 and not self.failed:
                self.failed = True
                raise OSError("the disk is away")
            return super().batch_at(position)

    plain, stream = PackedDataset(packed(folder), 5), Once(packed(folder), 5, prefetch=2)
    assert torch.equal(next(stream)["ids"], next(plain)["ids"])
    with pytest.raises(OSError, match="the disk is away"):
        next(stream)
    for _ in range(3):
        assert torch.equal(next(stream)["ids"], next(plain)["ids"])
    assert stream.state_dict() == plain.state_dict()
    stream.close()


def test_a_finite_stream_ends_with_batches_in_flight(folder: Path):
    plain = list(PackedDataset(packed(folder), 5, epochs=1))
    stream = PackedDataset(packed(folder), 5, epochs=1, prefetch=4, workers=2)
    ahead = list(stream)
    assert len(plain) == len(ahead)
    assert all(same(*pair) for pair in zip(plain, ahead, strict=True))
    assert next(stream, None) is None
    stream.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": -1}, r"samples=-1; allowed is an integer >= 0"),
        ({"seed": "a"}, r"seed='a'"),
        ({"shuffle": False}, r"shuffle=False in the state; allowed is True"),
        ({"fingerprint": "0"}, r"fingerprint='0' in the state.*allowed is the same documents"),
        ({"extra": 1}, r"state has the fields .*'extra'"),
    ],
)
def test_packed_data_refuses_a_foreign_state(folder: Path, change: dict[str, Any], message: str):
    stream = PackedDataset(packed(folder), 5)
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict({**stream.state_dict(), **change})


def test_the_fingerprint_tells_data_apart_and_nothing_else(folder: Path, tmp_path: Path):
    prints = {
        packed(folder).fingerprint,
        packed(folder, seq_len=9).fingerprint,
        packed(folder, bos=True).fingerprint,
    }
    assert len(prints) == 3
    assert packed(tmp_path).fingerprint in prints


# Tasks


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_task_stream_resumes_exactly(steps: int):
    def fresh(seed: int = 5) -> TaskStream:
        return TaskStream(Parity(length=12), 6, seed=seed, length=(3, 12))

    whole = list(itertools.islice(fresh(), 12))
    first = fresh()
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = fresh(seed=0)
    second.load_state_dict(state)
    assert all(same(next(second), batch) for batch in whole[steps:])
    assert not torch.equal(whole[0]["ids"], whole[1]["ids"])


def test_tasks_give_the_same_samples_on_every_number_of_ranks():
    whole = list(itertools.islice(TaskStream(Parity(length=12), 8, seed=5), 3))
    for size in (2, 4):
        ranks = [TaskStream(Parity(length=12), 8, seed=5, rank=r, size=size) for r in range(size)]
        for batch in whole:
            parts = [next(stream) for stream in ranks]
            assert all(len(part["ids"]) == 8 // size for part in parts)
            assert same({key: torch.cat([part[key] for part in parts]) for key in batch}, batch)
        assert ranks[0].state_dict() == ranks[-1].state_dict()


def test_a_task_stream_keeps_to_its_split_and_stops():
    batches = list(TaskStream(Addition(digits=2), 16, split="test", steps=5))
    assert len(batches) == 5
    for batch in batches:
        assert set(batch) == {"ids", "targets"}
        assert batch["ids"].shape == batch["targets"].shape == (16, 8)
        assert torch.equal(split_of(batch["ids"]), torch.full((16,), 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: TaskStream(Parity(), 0), "batch_size=0"),
        (lambda _: TaskStream(Parity(), 1, seed=-1), "seed=-1"),
        (lambda _: TaskStream(Parity(), 1, split="dev"), "split='dev'"),
        (lambda _: TaskStream(Parity(), 1, hops=3), "difficulty 'hops' is unknown"),
        (lambda _: TaskStream(Parity(), 1, steps=0), "steps=0"),
        (lambda _: TaskStream(Parity(), 4, rank=2, size=2), "rank=2; allowed is an integer >= 0 and <= 1"),
        (lambda b: PackedDataset(b, 0), "batch_size=0"),
        (lambda b: PackedDataset(b, 1, epochs=0), "epochs=0"),
        (lambda b: PackedDataset(b, 1, seed=-1), "seed=-1"),
        (lambda b: PackedDataset(b, 5, size=2), "batch_size=5; allowed is a multiple of the number of ranks, 2"),
        (lambda b: PackedDataset(b, 1, prefetch=-1), "prefetch=-1"),
        (lambda b: PackedDataset(b, 1, workers=0), "workers=0"),
    ],
)  # fmt: skip
def test_streams_refuse_bad_arguments(folder: Path, make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make(packed(folder))


def test_a_task_stream_refuses_the_state_of_another_task():
    state = TaskStream(Parity(length=12), 2).state_dict()
    with pytest.raises(ValueError, match=r"length=12.* in the state; allowed is .*length=13"):
        TaskStream(Parity(length=13), 2).load_state_dict(state)
    with pytest.raises(ValueError, match="split='train' in the state"):
        TaskStream(Parity(length=12), 2, split="validation").load_state_dict(state)
