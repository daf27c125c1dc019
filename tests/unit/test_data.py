"""Reading: which records each kind of source gives, in which order, under which names."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_mythos.config import ConfigError
from open_mythos.training.data import Record, open_source, python_corpus
from open_mythos.training.dataconfig import DataConfig


def read(source: str | Path, **options: Any) -> list[Record]:
    return list(open_source(DataConfig(str(source), options)).records)


def texts(source: str | Path, **options: Any) -> list[tuple[str, Any]]:
    records = read(source, **options)
    assert not [record for record in records if record.reason]
    return [(record.where, record.text) for record in records]


def fineweb(path: Path, rows: list[str]) -> Path:
    """A parquet file with the columns of HuggingFaceFW/fineweb-edu."""
    count = len(rows)
    table = pa.table(
        {
            "text": pa.array(rows, pa.string()),
            "id": [f"<urn:uuid:{i}>" for i in range(count)],
            "dump": ["CC-MAIN-2024-10"] * count,
            "url": [f"https://example.org/{i}" for i in range(count)],
            "file_path": ["s3://commoncrawl/x"] * count,
            "language": ["en"] * count,
            "language_score": [0.9] * count,
            "token_count": pa.array([len(text) // 4 for text in rows], pa.int64()),
            "score": [3.1] * count,
            "int_score": pa.array([3] * count, pa.int64()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return path


def test_python_corpus_is_prose_and_sources():
    source = python_corpus()
    documents = {record.where: record.text for record in source.records}
    assert {name.split("/")[0] for name in documents} == {"topics", "stdlib"}
    assert "topics/assert" in documents
    assert not [n for n in documents if {"test", "tests", "idlelib", "site-packages"} & set(n.split("/"))]
    assert not [n for n in documents if "_sysconfigdata" in n or Path(n).is_absolute()]
    assert sum(map(len, documents.values())) > 5_000_000
    assert source.skipped["idlelib/"] == "excluded directory"
    import json.decoder

    assert documents["stdlib/json/decoder.py"] == Path(str(json.decoder.__file__)).read_bytes()
    again = python_corpus()
    assert again.identity == source.identity
    assert [record.where for record in again.records] == list(documents)


def test_a_directory_is_read_in_order_and_everything_else_is_reported(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b.md").write_bytes(b"zwei\r\n")
    (tmp_path / "a.txt").write_text("eins")
    (tmp_path / "sub" / "c.py").write_text("drei = 3\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".secret.txt").write_text("hidden too")
    found = [("a.txt", b"eins"), ("b.md", b"zwei\r\n"), ("sub/c.py", b"drei = 3\n")]
    assert texts(tmp_path) == found
    assert open_source(DataConfig(str(tmp_path))).skipped == {
        ".git/": "hidden",
        ".secret.txt": "hidden",
        "image.png": "other suffix",
    }
    assert texts(tmp_path / "a.txt") == found[:1]
    assert texts(tmp_path / "*.*") == found[:2]
    assert texts(f"{tmp_path}/**/*.py") == [("c.py", b"drei = 3\n")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_is_one_document_a_line(tmp_path: Path, suffix: str):
    path = tmp_path / f"x.jsonl{suffix}"
    lines = [
        json.dumps({"text": "one\u2028still one"}, ensure_ascii=False),
        *(json.dumps({"text": f"{i} " * 5000, "id": i}) for i in range(300)),  # more than one chunk
        '{"body": 1, "text": "four"}',
    ]
    data = ("\n".join(lines) + "\n").encode()
    packers = {"": bytes, ".gz": gzip.compress, ".zst": lambda b: pa.compress(b, codec="zstd", asbytes=True)}
    path.write_bytes(packers[suffix](data))
    expected = [(f"{path.name}:{i}", json.loads(line)["text"]) for i, line in enumerate(lines, start=1)]
    assert texts(path) == expected


def test_an_endless_line_is_passed_by_and_the_next_one_read(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "' + b"x" * 5_000_000 + b'"}\n{"text": "three"}')
    records = read(path, max_document_chars=1000)
    assert [record.text for record in records] == ["one", None, "three"]
    assert (records[1].where, records[1].reason) == ("x.jsonl:2", "too long")


def test_the_field_of_a_record_can_be_chosen(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "other field"}')
    assert texts(path, text_field="body") == [("x.jsonl:1", "other field")]
    pq.write_table(pa.table({"body": ["other column"], "text": ["no"]}), tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet", text_field="body") == [("x.parquet:0", b"other column")]


def test_parquet_is_one_document_a_row(tmp_path: Path):
    rows = [f"page {i} – text" for i in range(20)]
    fineweb(tmp_path / "sample/10BT/000.parquet", rows)
    fineweb(tmp_path / "sample/10BT/001.parquet", rows[:3])
    expected = [(f"000.parquet:{i}", text.encode()) for i, text in enumerate(rows)]
    expected += [(f"001.parquet:{i}", text.encode()) for i, text in enumerate(rows[:3])]
    assert texts(tmp_path / "sample/10BT") == expected
    assert texts(tmp_path / "sample/*/*.parquet") == expected
    assert [name for name, _ in texts(tmp_path)] == [f"sample/10BT/{name}" for name, _ in expected]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_text_may_be_stored_in_any_way(tmp_path: Path, kind: pa.DataType):
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), tmp_path / "x.parquet")
    assert [text for _, text in texts(tmp_path / "x.parquet")] == [b"a", b"b", b"a"]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_is_read_by_name_config_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
):
    """A local folder laid out like HuggingFaceFW/fineweb-edu: the same code of `datasets`, and no network."""
    rows = [f"page {i}" for i in range(300)]
    folder = tmp_path / "fineweb-edu"
    fineweb(folder / "sample/10BT/000.parquet", rows)
    fineweb(folder / "sample/10BT/001.parquet", rows[:3])
    fineweb(folder / "data/other.parquet", ["not in the sample"])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    options = {"name": "sample-10BT", "streaming": streaming}
    found = texts(f"hf:{folder}", **options)
    assert found == [(f"fineweb-edu:{i}", text.encode()) for i, text in enumerate(rows + rows[:3])]
    with pytest.raises(
        ConfigError, match=r"data.text_field = 'body' is not allowed: it must be a column: text, id"
    ):
        texts(f"hf:{folder}", text_field="body", **options)
    with pytest.raises(ConfigError, match=r"data.source = .* cannot be loaded: .*sample-11BT"):
        texts(f"hf:{folder}", name="sample-11BT")


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_token_files_are_documents_between_separators(tmp_path: Path, suffix: str):
    ids = np.array([5, 6, 9, 7, 9, 9, 8, 1, 2], dtype=np.uint32)
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, ids)
    else:
        ids.astype("<u4").tofile(path)
    options = {"token_dtype": "uint32", "vocab_size": 10, "eos_id": 9}
    found = [(record.where, record.text.tolist()) for record in read(path, **options)]
    assert found == [(f"x{suffix}:{n}", d) for n, d in ((0, [5, 6]), (3, [7]), (5, []), (6, [8, 1, 2]))]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.csv", r"'.*x.csv' is not allowed: it must be a file with suffix .jsonl, .*.parquet$"),
        ("x.bin", r"with suffix .*; data.token_dtype says that a file holds ids"),
        ("nothing.txt", r"it must be 'python', 'hf:OWNER/NAME', or a file, directory or glob that exists"),
        ("*.no", r"a file, directory or glob that exists"),
        ("", r"it holds no file with suffix .jsonl"),
    ],
)
def test_bad_sources_are_refused(tmp_path: Path, name: str, message: str):
    for file in ("x.csv", "x.bin"):
        (tmp_path / file).write_text("a,b")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "data.seq_len = 0 is not allowed"),
        ({"max_document_chars": 0}, "data.max_document_chars = 0"),
        ({"max_tokens": -1}, "data.max_tokens = -1"),
        ({"on_bad": "warn"}, "data.on_bad = 'warn' is not allowed: it must be 'skip' or 'error'"),
        ({"streaming": 1}, "data.streaming = 1 is not allowed: it must be True or False"),
        ({"name": 3}, "data.name = 3 is not allowed: it must be a string"),
        ({"prefech": 3}, "data.prefech is not allowed: text has no such key; did you mean 'prefetch'"),
        ({"token_dtype": "int8"}, "data.token_dtype = 'int8' is not allowed: it must be 'uint16' or 'uint32'"),
        ({"vocab_size": 5, "eos_id": 1}, "data.vocab_size is for token files"),
        ({"vocab_size": 5, "token_dtype": "uint16"}, "data.eos_id = None is not allowed"),
        ({"vocab_size": 5, "eos_id": 5, "token_dtype": "uint16"}, r"data.eos_id = 5 .* below data.vocab_size \(5\)"),
        ({"vocab_size": 5, "eos_id": 1, "token_dtype": "uint16", "bos": True}, "data.bos = True is not allowed"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        DataConfig("x.txt", options)
