"""An output file of JSON lines that is complete or absent, and that an interrupted run can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mtpjax.cli.jsonl import PromptLine
from mtpjax.cli.tables import check_pyarrow, is_table, write_table

# JSON allows these characters in a string, but some readers (`str.splitlines`) end a line there.
LINE_SEPARATORS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


class ResumeError(ValueError):
    """The partial file of an earlier run does not belong to this run."""


class ResumableJsonl:
    """A JSON-lines file: rows are appended to `FILE.part` as they come; `finish` sorts them and renames it to `FILE`.

    Where `FILE` is named `.parquet` or `.csv`, `finish` turns the lines into such a table.

    Beside the partial file, `FILE.part.settings` records the settings that the texts depend on. Only a run with the
    same settings may continue it.

    Args:
        file: the output file.
        settings: everything that the texts depend on, as JSON values.
        overwrite: whether existing files of both names are replaced.
        resume: whether the rows of an interrupted run are kept; `has` tells which lines they answer.

    Raises:
        FileExistsError: `FILE` exists, or `FILE.part` exists and `resume` is False (neither matters with `overwrite`).
        ResumeError: `FILE.part` was made with other settings, or holds something other than rows.
        ValueError: a table is asked for and pyarrow is not installed.
    """

    def __init__(self, file: Path, settings: dict[str, Any], *, overwrite: bool = False, resume: bool = False) -> None:
        if file.is_dir():
            raise FileExistsError(f"{file}: is a folder, expected a file name")
        if is_table(file):
            check_pyarrow(file)
        self.file, self.part, self._overwrite = file, file.with_name(file.name + ".part"), overwrite
        self._settings = file.with_name(file.name + ".part.settings")
        self._rows: list[tuple[int, int, int]] = []  # line of the input, byte offset and size in the partial file
        self._earlier: dict[str, tuple[int, int, Any]] = {}  # answers of an earlier run by id: offset, size, request
        self._num_errors = 0
        self._has_dropped_rows = False
        self._stream: IO[bytes]
        self._check_absent(self.file, "exists already; choose another --output, or give --overwrite")
        if resume and self.part.exists():
            self._compare_settings(settings)
            self._stream = open(self.part, "r+b")
            self._read_earlier_rows()
            return
        problem = (
            "is the partial output of an earlier run; continue it with --resume, move it away, or give --overwrite"
        )
        self._check_absent(self.part, problem)
        self._stream = open(self.part, "wb")
        self._settings.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def _check_absent(self, file: Path, problem: str) -> None:
        if file.exists() and not self._overwrite:
            raise FileExistsError(f"{file}: {problem}")

    def _compare_settings(self, settings: dict[str, Any]) -> None:
        try:
            earlier = dict(json.loads(self._settings.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            message = f"{self._settings}: cannot be read ({error}); it says with which settings {self.part} was made"
            raise ResumeError(message) from None
        for name, value in json.loads(json.dumps(settings)).items():
            if earlier.get(name) != value:
                raise ResumeError(
                    f"{self.part}: was made with {name} = {earlier.get(name)!r}, not {value!r}; continue with the same"
                )

    def _read_earlier_rows(self) -> None:
        """Index the rows of the partial file, and cut off a row that was half-written when the earlier run ended."""
        offset = 0
        for data in self._stream:
            if not data.endswith(b"\n"):
                break
            try:
                row = json.loads(data)
                if row.get("error") is not None:  # the line is checked anew
                    self._has_dropped_rows = True
                elif "custom_id" in row:
                    self._earlier[json.dumps(row["custom_id"])] = (offset, len(data), row["id"])
                else:
                    self._earlier[json.dumps(row["id"])] = (offset, len(data), row["prompt"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self._stream.close()
                raise ResumeError(
                    f"{self.part}: the bytes from {offset} are not an answer ({error}); move it away to begin anew"
                ) from None
            offset += len(data)
        self._stream.truncate(offset)
        self._stream.seek(offset)

    def has(self, line: PromptLine) -> bool:
        """Return whether an earlier run answered this line.

        Raises:
            ResumeError: it answered another prompt under the same id.
        """
        earlier = self._earlier.pop(json.dumps(line.id), None)
        if earlier is None:
            return False
        offset, size, request = earlier
        if request != (line.request_id if line.url else line.prompt):
            raise ResumeError(
                f"{line.source}: {self.part} answers another prompt under the id {line.id!r}; was the input changed?"
            )
        self._rows.append((line.line, offset, size))
        return True

    def __len__(self) -> int:
        return len(self._rows) + len(self._earlier) - self._num_errors

    def write(self, line: int, row: dict[str, Any]) -> None:
        """Append the answer to line `line` of the input, or its "error", and hand it to the operating system."""
        text = json.dumps(row, ensure_ascii=False).translate(LINE_SEPARATORS)
        try:
            data = (text + "\n").encode()
        except UnicodeEncodeError:  # half of a surrogate pair, in the id of a line
            data = (json.dumps(row) + "\n").encode()
        self._rows.append((line, self._stream.tell(), len(data)))
        self._num_errors += row.get("error") is not None
        self._stream.write(data)
        self._stream.flush()

    def finish(self) -> None:
        """Sort the rows by line of the input and give the file its name.

        Rows of an earlier run whose ids are not in the input are dropped.

        Raises:
            FileExistsError: a file of that name has appeared in the meantime; the partial file stays.
        """
        self.close()
        self._check_absent(self.file, f"has appeared in the meantime; the answers are in {self.part}")
        whole = not self._earlier and not self._has_dropped_rows
        if whole and self._rows == sorted(self._rows) and not is_table(self.file):
            self.part.replace(self.file)
            self._settings.unlink()
            return
        in_order = self.file.with_name(self.file.name + ".ordered")
        with open(self.part, "rb") as unsorted, open(in_order, "wb") as output:
            for _, offset, size in sorted(self._rows):
                unsorted.seek(offset)
                output.write(unsorted.read(size))
            _sync(output)
        if is_table(self.file):
            table = self.file.with_name(f"{self.file.stem}.table{self.file.suffix}")
            write_table(table, lambda: _rows_of(in_order))
            in_order.unlink()
            in_order = table
        in_order.replace(self.file)
        self.part.unlink()
        self._settings.unlink()

    def discard(self) -> None:
        """Remove the partial file if it has no rows."""
        self.close()
        if not self._rows and not self._earlier:
            self.part.unlink()
            self._settings.unlink()

    def close(self) -> None:
        """Close the partial file, which stays on disk."""
        if not self._stream.closed:
            _sync(self._stream)
            self._stream.close()


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
