"""Data: what is read and what is reported, splits by document, packing, and exact resumption."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos.tasks import Addition, Parity, split_of
from open_mythos.tokenizer import ByteTokenizer, MythosTokenizer
from open_mythos.training.batches import PackedDataset, TaskStream
from open_mythos.training.data import (
    Corpus,
    Document,
    PackedTokens,
    load_documents,
    pack_documents,
    python_corpus,
    split_documents,
)

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


def toy_documents(count: int = 23) -> list[Document]:
    """Lengths from 1 to 19 characters, no two stretches alike."""
    return [
        Document(f"d{i}", "".join(f"{i:02d}-{j:02d};" for j in range(4))[: 1 + (7 * i) % 19])
        for i in range(count)
    ]


def packed(seq_len: int = 8, bos: bool = False) -> PackedTokens:
    return pack_documents(toy_documents(), MythosTokenizer(), seq_len=seq_len, bos=bos)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def python() -> Corpus:
    return python_corpus()


def test_python_corpus_is_prose_and_sources(python: Corpus) -> None:
    names = [d.name for d in python.documents]
    assert {name.split("/")[0] for name in names} == {"topics", "stdlib"}
    assert "topics/assert" in names
    assert "stdlib/json/decoder.py" in names
    assert len(names) == len(set(names))
    assert not [n for n in names if {"test", "tests", "idlelib", "site-packages"} & set(n.split("/"))]
    assert not [n for n in names if "_sysconfigdata" in n or Path(n).is_absolute()]
    assert python.report()["characters"] > 5_000_000
    assert python.skipped["idlelib/"] == "excluded directory"
    import json.decoder

    text = dict(python.documents)["stdlib/json/decoder.py"]
    assert text.encode() == Path(str(json.decoder.__file__)).read_bytes()


def test_python_corpus_is_the_same_each_time(python: Corpus) -> None:
    assert load_documents("python") == python


def test_a_directory_is_read_in_order_and_everything_else_is_reported(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b.md").write_bytes(b"zwei\r\n")
    (tmp_path / "a.txt").write_text("eins")
    (tmp_path / "sub" / "c.py").write_text("drei = 3\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".secret.txt").write_text("hidden too")
    corpus = load_documents(tmp_path)
    assert corpus.documents == (("a.txt", "eins"), ("b.md", "zwei\r\n"), ("sub/c.py", "drei = 3\n"))
    assert corpus.skipped == {
        ".git/": "hidden",
        ".secret.txt": "hidden",
        "empty.txt": "empty",
        "image.png": "other suffix",
        "latin.txt": "not UTF-8",
    }
    assert corpus.report()["skipped"] == {"empty": 1, "hidden": 2, "not UTF-8": 1, "other suffix": 1}
    assert load_documents(str(tmp_path / "a.txt")).documents == (("a.txt", "eins"),)


def test_jsonl_is_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        json.dumps({"text": "one\u2028still one"}, ensure_ascii=False),
        "",
        '{"text": "", "id": 3}',
        '{"text": "four"}',
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = load_documents(path)
    assert corpus.documents == (("x.jsonl:1", "one\u2028still one"), ("x.jsonl:4", "four"))
    assert corpus.skipped == {"x.jsonl:2": "empty", "x.jsonl:3": "empty"}
    path.write_text('{"body": "other field"}')
    assert load_documents(path, text_field="body").documents[0].text == "other field"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text"', r"x.jsonl, line 2: not JSON"),
        ("x.jsonl", '{"text": 3}', r"x.jsonl, line 1: allowed is an object with a string in field 'text'"),
        ("x.jsonl", '["text"]', r"line 1: allowed is an object"),
        ("x.csv", "a,b", r"suffix '.csv'; allowed: .jsonl, .md, .py, .txt"),
        ("x.txt", "", r"holds no document; left out there: {'empty': 1}"),
    ],
)
def test_bad_sources_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_documents(tmp_path / name)


def test_a_missing_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"source='no/such'; allowed is 'python', or a file or directory"):
        load_documents("no/such")


def test_splits_are_whole_documents_without_overlap(python: Corpus) -> None:
    splits = split_documents(python.documents)
    names = {split: {d.name for d in documents} for split, documents in splits.items()}
    assert list(names) == ["train", "validation", "test"]
    assert sum(map(len, names.values())) == len(python.documents) == len(set().union(*names.values()))
    for split, share in zip(names, (0.9, 0.05, 0.05), strict=True):
        assert len(names[split]) / len(python.documents) == pytest.approx(share, abs=0.03)


def test_a_document_keeps_its_split_when_others_come_and_go() -> None:
    documents = [Document(f"n{i}", "x") for i in range(400)]
    where = {d.name: split for split, ds in split_documents(documents).items() for d in ds}
    fewer = {d.name: split for split, ds in split_documents(documents[::-3]).items() for d in ds}
    assert all(where[name] == split for name, split in fewer.items())
    # Pinned: published losses name a split.
    assert [i for i in range(400) if where[f"n{i}"] == "test"][:5] == [10, 33, 64, 67, 77]


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.1, 0.9, 0.0)])
def test_a_share_of_zero_gives_an_empty_split(shares: tuple[float, float, float]) -> None:
    splits = split_documents([Document(f"n{i}", "x") for i in range(300)], shares)
    for share, documents in zip(shares, splits.values(), strict=True):
        assert bool(documents) == bool(share)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.2, -0.1), (0.5, 0.2, 0.2)])
def test_bad_shares_are_refused(shares: Any) -> None:
    with pytest.raises(ValueError, match="allowed are three numbers >= 0 with sum 1"):
        split_documents(toy_documents(), shares)


def test_documents_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'d0' more than once"):
        split_documents([*toy_documents(), Document("d0", "again")])


@pytest.mark.parametrize("bos", [False, True])
def test_packing_lays_documents_end_to_end(bos: bool) -> None:
    blocks = packed(seq_len=8, bos=bos)
    tokens: list[int] = []
    owners: list[int] = []
    for i, document in enumerate(toy_documents()):
        ids = ByteTokenizer().encode(document.text, bos=bos, eos=True)
        tokens += ids
        owners += [i] * len(ids)
    assert len(blocks) == (len(tokens) - 1) // 8
    for n in range(len(blocks)):
        assert blocks.tokens[n].tolist() == tokens[8 * n : 8 * n + 9]
        assert blocks.document_ids[n].tolist() == owners[8 * n : 8 * n + 9]
    assert blocks.dropped_tokens == len(tokens) - (8 * len(blocks) + 1)
    assert 0 <= blocks.dropped_tokens < 8
    assert blocks.names == tuple(d.name for d in toy_documents())
    assert blocks.tokens.dtype == torch.uint16
    assert blocks.report()["target_tokens"] == 8 * len(blocks)


@pytest.mark.parametrize("bos", [False, True])
def test_document_ids_change_exactly_after_eos(bos: bool) -> None:
    for batch in PackedDataset(packed(bos=bos), 4, epochs=1):
        ids, documents, targets = batch["ids"], batch["document_ids"], batch["targets"]
        change = documents[:, 1:] != documents[:, :-1]
        assert torch.equal(change, ids[:, :-1] == EOS)
        # The loss does not cross: after EOS nothing is asked, everywhere else the next token is.
        assert torch.equal(targets == -100, ids == EOS)
        inside = targets[:, :-1] != -100
        assert torch.equal(targets[:, :-1][inside], ids[:, 1:][inside])
        if bos:
            assert torch.equal(ids[:, 1:][change], torch.full((int(change.sum()),), BOS))


def test_with_bos_every_byte_and_end_is_asked_once_but_for_the_tail() -> None:
    blocks = packed(bos=True)
    asked = torch.cat([b["targets"].flatten() for b in PackedDataset(blocks, 4, shuffle=False, epochs=1)])
    asked = asked[asked != -100]
    run = [t for d in toy_documents() for t in [*d.text.encode(), EOS]]
    assert asked.tolist() == run[: len(asked)]
    assert len(run) - len(asked) <= blocks.dropped_tokens


class Wide(ByteTokenizer):
    vocab_size = 70_000

    def encode(self, text: str | bytes, bos: bool = False, eos: bool = False) -> list[int]:
        return [69_999 for _ in text]


def test_a_large_vocabulary_is_not_squeezed_into_16_bits() -> None:
    blocks = pack_documents(toy_documents(), Wide(), seq_len=4)
    assert blocks.tokens.dtype == torch.int32
    assert int(blocks.tokens.max()) == 69_999


class Liar(ByteTokenizer):
    vocab_size = 100


class Endless(ByteTokenizer):
    eos_id = None  # type: ignore[assignment]


class Beginningless(ByteTokenizer):
    bos_id = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("tokenizer", "kwargs", "message"),
    [
        (Liar(), {}, r"document 'd0' has token ids 48 … 257; allowed is 0 <= id < vocab_size=100"),
        (Endless(), {}, r"tokenizer.eos_id is None"),
        (Beginningless(), {"bos": True}, r"bos=True with tokenizer.bos_id None"),
        (ByteTokenizer(), {"seq_len": 0}, r"seq_len=0; allowed is an integer >= 1"),
        (ByteTokenizer(), {"seq_len": 5000}, r"documents hold \d+ tokens.*at least seq_len \+ 1 = 5001"),
    ],
)
def test_packing_refuses(tokenizer: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_documents(toy_documents(), tokenizer, **{"seq_len": 8, **kwargs})


def test_an_epoch_visits_each_block_once_and_the_next_one_in_another_order() -> None:
    blocks = packed()
    lookup = {tuple(row): n for n, row in enumerate(blocks.tokens.long()[:, :-1].tolist())}
    assert len(lookup) == len(blocks), "toy blocks must be told apart"
    stream = PackedDataset(blocks, 1, seed=3)
    order = [lookup[tuple(next(stream)["ids"][0].tolist())] for _ in range(3 * len(blocks))]
    epochs = [order[i : i + len(blocks)] for i in range(0, len(order), len(blocks))]
    assert all(sorted(epoch) == list(range(len(blocks))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = PackedDataset(blocks, 1, seed=4)
    assert [lookup[tuple(next(other)["ids"][0].tolist())] for _ in range(len(blocks))] != epochs[0]


def test_batches_are_full_across_epochs_and_only_the_last_of_all_is_short() -> None:
    blocks = packed()
    endless = PackedDataset(blocks, 5)
    assert {len(batch["ids"]) for batch in itertools.islice(endless, 30)} == {5}
    finite = list(PackedDataset(blocks, 5, epochs=2))
    sizes = [len(batch["ids"]) for batch in finite]
    assert sum(sizes) == 2 * len(blocks)
    assert set(sizes[:-1]) == {5}


def test_without_shuffling_the_order_is_that_of_the_corpus() -> None:
    blocks = packed()
    ids = torch.cat([b["ids"] for b in PackedDataset(blocks, 4, shuffle=False, epochs=1)])
    assert torch.equal(ids, blocks.tokens[:, :-1].long())


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 6, 11, 17])
def test_packed_data_resumes_exactly(steps: int) -> None:
    """Stops before, at and after the ends of epochs; the state passes through JSON."""
    whole = list(itertools.islice(PackedDataset(packed(), 5, seed=9), 30))
    first = PackedDataset(packed(), 5, seed=9)
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = PackedDataset(packed(), 5, seed=0)
    next(second)
    second.load_state_dict(state)
    assert all(same(next(second), batch) for batch in whole[steps:])


def test_a_resume_may_change_the_batch_size() -> None:
    whole = torch.cat([b["ids"] for b in itertools.islice(PackedDataset(packed(), 6, seed=1), 10)])
    first = PackedDataset(packed(), 6, seed=1)
    head = [next(first)["ids"] for _ in range(4)]
    second = PackedDataset(packed(), 4, seed=1)
    second.load_state_dict(first.state_dict())
    tail = [next(second)["ids"] for _ in range(9)]
    assert torch.equal(torch.cat(head + tail), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 10_000}, r"position=10000; allowed is an integer >= 0 and <= \d+"),
        ({"epoch": -1}, r"epoch=-1"),
        ({"seed": "a"}, r"seed='a'"),
        ({"shuffle": False}, r"shuffle=False in the state; allowed is True"),
        ({"fingerprint": "0"}, r"fingerprint='0' in the state.*allowed is the same documents"),
        ({"extra": 1}, r"state has the fields .*'extra'"),
    ],
)
def test_packed_data_refuses_a_foreign_state(change: dict[str, Any], message: str) -> None:
    stream = PackedDataset(packed(), 5)
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict({**stream.state_dict(), **change})


def test_the_fingerprint_tells_data_apart() -> None:
    prints = {packed().fingerprint, packed(seq_len=9).fingerprint, packed(bos=True).fingerprint}
    assert len(prints) == 3
    assert packed().fingerprint in prints


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_task_stream_resumes_exactly(steps: int) -> None:
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


def test_a_task_stream_keeps_to_its_split_and_stops() -> None:
    batches = list(TaskStream(Addition(digits=2), 16, split="test", steps=5))
    assert len(batches) == 5
    for batch in batches:
        assert set(batch) == {"ids", "targets"}
        assert batch["ids"].shape == batch["targets"].shape == (16, 8)
        assert torch.equal(split_of(batch["ids"]), torch.full((16,), 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskStream(Parity(), 0), "batch_size=0"),
        (lambda: TaskStream(Parity(), 1, seed=-1), "seed=-1"),
        (lambda: TaskStream(Parity(), 1, split="dev"), "split='dev'"),
        (lambda: TaskStream(Parity(), 1, hops=3), "difficulty 'hops' is unknown"),
        (lambda: TaskStream(Parity(), 1, steps=0), "steps=0"),
        (lambda: PackedDataset(packed(), 0), "batch_size=0"),
        (lambda: PackedDataset(packed(), 1, epochs=0), "epochs=0"),
        (lambda: PackedDataset(packed(), 1, seed=-1), "seed=-1"),
    ],
)
def test_streams_refuse_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_task_stream_refuses_the_state_of_another_task() -> None:
    state = TaskStream(Parity(length=12), 2).state_dict()
    with pytest.raises(ValueError, match=r"task='Parity\(length=12"):
        TaskStream(Parity(length=13), 2).load_state_dict(state)
    with pytest.raises(ValueError, match="split='train' in the state"):
        TaskStream(Parity(length=12), 2, split="validation").load_state_dict(state)
