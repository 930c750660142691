"""Parquet and CSV files of prompts and answers in `mtpjax generate`."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtpjax.cli import generate
from mtpjax.cli.jsonl import LineError, read_prompt_lines
from mtpjax.cli.tables import write_table
from mtpjax.text.messages import normalize_messages
from tests.helpers.batch_job import SETTINGS, rows, watch_answers

pa = pytest.importorskip("pyarrow", reason="Parquet and CSV files need pyarrow: pip install pyarrow")

HELLO: list[dict[str, Any]] = [
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2", "tool_calls": None},
]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "w1 w2", "max_tokens": 3},
    {"id": "b", "prompt": 'w3,\n"w4"', "temperature": 5.0, "seed": 7},
    {"id": "c", "prompt": "17", "stop_token_ids": [94]},
    {"id": "d", "prompt": "w9", "ignore_eos": True},
    {"id": "e", "prompt": "w1", "max_tokens": -3},
]


def write_input(file: Path, some: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key for row in some for key in row))
    if file.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pa.Table.from_pylist([{name: row.get(name) for name in names} for row in some]), file
        )
        return
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for row in some:
            cells = [row.get(name, "") for name in names]
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])


def read_answers(file: Path) -> list[dict[str, Any]]:
    """Read a table; no value of a CSV file is None, and lists and objects are read out of their JSON texts."""
    import pyarrow.parquet

    if file.suffix == ".parquet":
        some = pyarrow.parquet.read_table(file).to_pylist()
    else:
        with open(file, newline="", encoding="utf-8") as stream:
            some = [{name: text or None for name, text in row.items()} for row in csv.DictReader(stream)]
    for row in some:
        for name in ("token_ids", "metrics", "response"):
            if isinstance(row.get(name), str):
                row[name] = json.loads(row[name])
    return some


def start(file: Path, out: Path, *options: str) -> int:
    paths = ["--model", "model", "--input", str(file), "--output", str(out)]
    return generate.main([*paths, *SETTINGS, "--max-tokens", "6", *options])


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_table_gives_what_json_lines_give(
    suffix: str, job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an interruption; the answers of a table are a table."""
    assert job(ROWS) == 1
    expected = {row["id"]: row for row in rows(tmp_path / "out.jsonl")}
    file, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write_input(file, ROWS)

    def stop(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch_answers(patch, stop)
        assert start(file, out) == 130
    assert not out.exists() and start(file, out, "--resume") == 1
    answers = read_answers(out)
    assert [row["id"] for row in answers] == [row["id"] for row in ROWS]
    for row in answers:
        want = expected[row["id"]]
        if "error" in want:
            assert row["error"] == want["error"] and not row["text"]
            continue
        assert all(row[name] == want[name] for name in ("prompt", "text", "token_ids", "finish_reason"))
        assert row["metrics"]["num_steps"] == want["metrics"]["num_steps"]
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(["in.jsonl", "out.jsonl", file.name, out.name])


def test_columns_of_a_table_are_keys_of_lines(tmp_path: Path) -> None:
    """Messages are a list of objects or a JSON text. A text that looks like a number stays one. Null is no value."""
    some: list[dict[str, Any]] = [
        {"messages": json.dumps(HELLO), "chat_template_kwargs": '{"enable_thinking": false}'},
        {"prompt": "17", "top_p": 0.5},
        {"messages": "[1"},
    ]
    for name in ("in.csv", "in.parquet"):
        write_input(tmp_path / name, some)
        first, second, third = read_prompt_lines(tmp_path / name)
        assert not isinstance(first, LineError) and not isinstance(second, LineError)
        assert (first.id, first.messages) == (1, HELLO) and first.chat_template_kwargs == {"enable_thinking": False}
        assert (second.id, second.prompt, second.options) == (2, "17", {"top_p": 0.5})
        assert isinstance(third, LineError) and "has 'messages' of type str, expected a list" in str(third)
    write_input(tmp_path / "nested.parquet", [{"messages": HELLO}, {"prompt": [1, 2]}])
    nested, ids = read_prompt_lines(tmp_path / "nested.parquet")
    assert not isinstance(nested, LineError) and normalize_messages(nested.messages) == normalize_messages(HELLO)
    assert not isinstance(ids, LineError) and ids.prompt == [1, 2]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_table_that_cannot_be_used_is_named(
    suffix: str, job: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write_input(file, [{"prompt": "w1", "colour": "red"}])
    assert start(file, out) == 2
    assert f"{file}: has unknown columns ['colour']" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe\x00PAR1,\n1")
    assert start(file, out) == 2
    assert f"{file}: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert start(file, out) == 2
    assert "need the package pyarrow: pip install 'mtpjax[tables]'" in capsys.readouterr().err
    write_input_lines = tmp_path / "in.jsonl"
    write_input_lines.write_text('{"prompt": "w1"}\n')
    assert start(write_input_lines, out) == 2  # before anything is computed
    assert f"{out}: Parquet and CSV files need the package pyarrow" in capsys.readouterr().err


def test_answers_of_all_forms_fit_into_one_table(tmp_path: Path) -> None:
    """Ids are whole numbers if all of them are; a prompt of token ids is a JSON text."""
    some: list[dict[str, Any]] = [
        {"id": 1, "prompt": [1, 2], "text": "ä", "token_ids": [3], "stop_reason": 94, "metrics": {"a": 1}},
        {"id": "two", "prompt": "p", "text": "b", "token_ids": [], "unfinished_thought": True, "tool_calls": []},
        {"id": "batch_req_1", "custom_id": "c", "response": {"status_code": 200}, "error": None},
    ]
    file = tmp_path / "out.parquet"
    write_table(file, lambda: iter(some))
    first, second, third = read_answers(file)
    assert (first["id"], first["prompt"], first["token_ids"], first["stop_reason"]) == ("1", "[1, 2]", [3], 94)
    assert (second["unfinished_thought"], second["tool_calls"]) == (True, "[]")
    assert third["response"] == {"status_code": 200} and third["error"] is None
    write_table(file, lambda: iter(some[:1]))
    assert read_answers(file)[0]["id"] == 1
