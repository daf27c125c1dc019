"""Records out of tables: parquet files, and data sets of the Hugging Face Hub. Needs the extra ``data``.

Columns are read as bytes and judged later, for Arrow strings need not be UTF-8 and one that is not must not end the
reading of its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_mythos.config import ConfigError
from open_mythos.training.data import Record, Source, stamps, walk
from open_mythos.training.dataconfig import HUB, DataConfig

__all__ = ["hub_records", "parquet_records", "zstd_stream"]

_ROWS = 256


def parquet_records(name: str, path: Path, data: DataConfig) -> Iterator[Record]:
    """One document a row of ``text_field``. A damaged row group is one bad record, located by its first row."""
    pa, parquet = _arrow()
    key, row = data.options["text_field"], 0
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as problem:
        yield Record(name, None, "truncated", _line(problem))
        return
    with file:
        if key not in file.schema_arrow.names:
            if rows := file.metadata.num_rows:
                yield Record(name, None, "missing field", f"{key}, {rows} rows", rows)
            return
        for group in range(file.num_row_groups):
            first, rows = row, file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[key]):
                    yield from _column(name, row, batch.column(0), key)
                    row += len(batch)
            except (OSError, pa.ArrowException) as problem:
                lost = rows - (row - first)
                yield Record(f"{name}:{row}", None, "damaged", f"{lost} rows: {_line(problem)}", lost)
            row = first + rows


def hub_records(data: DataConfig) -> Source:
    """A data set by name, streamed or downloaded, one document a row of ``text_field``, in its own order."""
    options, name = data.options, data.source.removeprefix(HUB)
    folder = Path(name)
    identity: list[Any] = [name, options["name"], options["split"], options["revision"]]
    if folder.is_dir():
        files, _ = walk(folder, frozenset(), ("",))
        identity.append(stamps([(file.relative_to(folder).as_posix(), file) for file in files]))

    def records() -> Iterator[Record]:
        rows = _load(name, data)
        key, row = options["text_field"], 0
        for table in rows.with_format("arrow").iter(_ROWS):
            if key not in table.column_names:
                columns = ", ".join(table.column_names)
                raise ConfigError(f"data.text_field = {key!r} is not allowed: it must be a column: {columns}")
            for chunk in table.column(key).chunks:
                yield from _column(folder.name if folder.is_dir() else name, row, chunk, key)
                row += len(chunk)

    return Source(records(), identity)


def _load(name: str, data: DataConfig) -> Any:
    try:
        import datasets
    except ImportError as problem:
        raise ImportError(
            f"data.source = {data.source!r} needs the package datasets: pip install open-mythos[data]"
        ) from problem
    options = data.options
    try:
        return datasets.load_dataset(
            name,
            options["name"],
            split=options["split"],
            revision=options["revision"],
            streaming=options["streaming"],
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        raise ConfigError(f"data.source = {data.source!r} cannot be loaded: {_line(problem)}") from problem


def zstd_stream(path: Path) -> Any:
    """A file of Zstandard frames, decompressed."""
    pa, _ = _arrow()
    return pa.input_stream(str(path), compression="zstd")


def _column(name: str, first: int, column: Any, key: str) -> Iterator[Record]:
    """The records of one Arrow array, whose first row has this number."""
    pa, _ = _arrow()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    raw = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if not any(fits(column.type) for fits in (*text, *raw)):
        detail = f"{key} is {column.type}, {len(column)} rows"
        yield Record(f"{name}:{first}", None, "not text", detail, len(column))
        return
    for row, value in enumerate(column.cast(pa.large_binary()).to_pylist(), start=first):
        where = f"{name}:{row}"
        yield Record(where, None, "null", key) if value is None else Record(where, value)


def _arrow() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as problem:
        raise ImportError(
            "parquet and .zst need the package pyarrow: pip install open-mythos[data]"
        ) from problem
    return pyarrow, parquet


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200]
