"""Prompts from Parquet and CSV files, and answers into them, by pyarrow.

A row is what a line of a JSON-lines file is, and a column one of its keys. Lists and objects may be JSON texts; in a
CSV file they are, and in answers, but for the `token_ids` of a Parquet file.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtpjax.cli.line_keys import CHAT_KEYS, HARMLESS, NEUTRAL, SAMPLING_KEYS
from mtpjax.cli.openai_batch import LINE_KEYS

SUFFIXES = (".parquet", ".csv")
COLUMNS = {"id", "prompt", *LINE_KEYS, *CHAT_KEYS, *SAMPLING_KEYS, *NEUTRAL, *HARMLESS}
# Columns that are texts even where the text looks like JSON.
TEXTS = {"id", "prompt", "custom_id", "method", "url", "model", "user", "reasoning_effort", "tool_choice", "suffix"}
BATCH_ROWS = 1024  # read or written together
# Columns of answers, in this order.
ANSWER_COLUMNS = (
    "id",
    "custom_id",
    "prompt",
    "text",
    "reasoning",
    "content",
    "tool_calls",
    "unfinished_thought",
    "token_ids",
    "finish_reason",
    "stop_reason",
    "logprobs",
    "cumulative_logprob",
    "prompt_logprobs",
    "outputs",
    "metrics",
    "response",
    "error",
)


def is_table(file: Path) -> bool:
    """Return whether a file has rows and columns, by its name."""
    return file.suffix.lower() in SUFFIXES


def check_pyarrow(file: Path) -> None:
    """Raise ValueError if pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{file}: Parquet and CSV files need the package pyarrow: pip install 'mtpjax[tables]'"
        ) from None


def check_table(file: Path) -> int:
    """Return the number of rows.

    Raises:
        ValueError: pyarrow is not installed, the file cannot be read, or a column is unknown.
        OSError: there is no such file.
    """
    names, batches = _open(file)
    unknown = [name for name in names if name not in COLUMNS]
    if unknown or len(set(names)) < len(names):
        what = f"unknown columns {unknown}" if unknown else "two columns of one name"
        raise ValueError(f"{file}: has {what}; known are the keys of JSON lines, for example id, prompt, messages")
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(file).metadata.num_rows
    return sum(batch.num_rows for batch in _reading(file, batches))


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the rows of a table one by one, each with its number from 1. Values that are missing are left out.

    A value of a column of lists or objects that is a text is read as JSON, if it is JSON.
    """
    _, batches = _open(file)
    number = 0
    for batch in _reading(file, batches):
        for row in batch.to_pylist():
            number += 1
            yield number, {key: _value(key, value) for key, value in row.items() if value is not None}


def _value(key: str, value: Any) -> Any:
    if key in TEXTS or not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value  # the check of the line names its type
    return value if key == "stop" and not isinstance(read, list) else read


def _open(file: Path) -> tuple[list[str], Iterable[Any]]:
    """The names of the columns, and record batches."""
    check_pyarrow(file)
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if file.suffix.lower() == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            return table.schema_arrow.names, table.iter_batches(BATCH_ROWS)
        with open(file, newline="", encoding="utf-8-sig") as stream:
            names = next(csv.reader(stream), [])
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        )
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        return names, pyarrow.csv.open_csv(file, parse_options=parse, convert_options=convert)
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None


def _reading(file: Path, batches: Iterable[Any]) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from batches
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None


def write_table(file: Path, rows: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
    """Write answers as a Parquet or CSV file, by its name.

    Args:
        file: to write.
        rows: gives the answers, each time from the beginning; they are read twice.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    parquet = file.suffix.lower() == ".parquet"
    found: set[str] = set()
    whole_ids, whole_reasons = True, True
    for row in rows():
        found |= row.keys()
        whole_reasons = whole_reasons and not isinstance(row.get("stop_reason"), str)
        identity = row.get("id")
        whole_ids = whole_ids and isinstance(identity, int) and abs(identity) < 2**63
    types = {"unfinished_thought": pa.bool_(), "cumulative_logprob": pa.float64()}
    types |= {"id": pa.int64()} if whole_ids else {}
    types |= {"stop_reason": pa.int64()} if whole_reasons else {}
    types |= {"token_ids": pa.list_(pa.int64())} if parquet else {}
    names = [name for name in ANSWER_COLUMNS if name in found] or ["id"]
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    open_writer = pyarrow.parquet.ParquetWriter if parquet else pyarrow.csv.CSVWriter
    with open(file, "wb") as stream:
        with open_writer(stream, schema) as writer:
            for some in _in_batches(rows(), BATCH_ROWS):
                values = [{name: _cell(row.get(name), name in types) for name in names} for row in some]
                writer.write_batch(pa.RecordBatch.from_pylist(values, schema=schema))
        stream.flush()
        os.fsync(stream.fileno())


def _cell(value: Any, typed: bool) -> Any:
    return value if typed or value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _in_batches(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    some: list[Mapping[str, Any]] = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
