"""Answers into a file that is complete or is not there, and that an interrupted run can go on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mtpjax.cli.jsonl import Job

# JSON lets them stand in a text, but some readers (`str.splitlines`) end a line there.
LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


class ResumeError(ValueError):
    """What an earlier run left behind does not belong to this one."""


class Answers:
    """A JSON-lines file of answers: written to `FILE.part` as they come, renamed to `FILE`, in order, by `finish`.

    Beside the part, `FILE.part.settings` says what the texts depend on: only a run with the same settings goes on with it.

    Args:
        resume: keep the answers of an interrupted run; `has` tells which they are.

    Raises:
        FileExistsError: `FILE` is there, or `FILE.part` unless `resume`; with `overwrite` neither matters.
        ResumeError: `FILE.part` was made with other settings, or is no file of answers.
    """

    def __init__(self, file: Path, settings: dict[str, Any], *, overwrite: bool = False, resume: bool = False):
        if file.is_dir():
            raise FileExistsError(f"{file}: is a folder, expected a file name")
        self.file, self.part, self._overwrite = file, file.with_name(file.name + ".part"), overwrite
        self._settings = file.with_name(file.name + ".part.settings")
        self._places: list[tuple[int, int, int]] = []  # line of the input, offset and size in the part
        self._found: dict[str, tuple[int, int, Any]] = {}  # of an earlier run, by id: offset, size, prompt
        self._check_free(self.file, "exists already; choose another --output, or say --overwrite")
        if resume and self.part.exists():
            self._compare(settings)
            self._stream = open(self.part, "r+b")
            self._take_over()
            return
        problem = "is what an earlier run left behind; go on with it by --resume, move it away, or say --overwrite"
        self._check_free(self.part, problem)
        self._stream = open(self.part, "wb")
        self._settings.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def _check_free(self, file: Path, problem: str) -> None:
        if file.exists() and not self._overwrite:
            raise FileExistsError(f"{file}: {problem}")

    def _compare(self, settings: dict[str, Any]) -> None:
        try:
            before = dict(json.loads(self._settings.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            told = f"{self._settings}: cannot be read ({error}); without it nobody knows how {self.part} was made"
            raise ResumeError(told) from None
        for name, value in json.loads(json.dumps(settings)).items():
            if before.get(name) != value:
                was = before.get(name)
                raise ResumeError(f"{self.part}: was made with {name} = {was!r}, not {value!r}; go on with the same")

    def _take_over(self) -> None:
        """Find the answers in the part, and cut off what was half-written when the earlier run ended."""
        offset = 0
        for data in self._stream:
            if not data.endswith(b"\n"):
                break
            try:
                row = json.loads(data)
                self._found[json.dumps(row["id"])] = (offset, len(data), row["prompt"])
            except (ValueError, KeyError, TypeError) as error:
                self._stream.close()
                raise ResumeError(
                    f"{self.part}: at byte {offset} is no answer ({error}); move it away to begin anew"
                ) from None
            offset += len(data)
        self._stream.truncate(offset)
        self._stream.seek(offset)

    def has(self, job: Job) -> bool:
        """Whether an earlier run answered this job. Raises ResumeError where it answered another prompt under its id."""
        if (found := self._found.pop(json.dumps(job.id), None)) is None:
            return False
        offset, size, prompt = found
        if prompt != job.prompt:
            raise ResumeError(
                f"{job.where}: {self.part} answers another prompt under the id {job.id!r}; was the input changed?"
            )
        self._places.append((job.line, offset, size))
        return True

    def __len__(self) -> int:
        return len(self._places) + len(self._found)

    def write(self, line: int, row: dict[str, Any]) -> None:
        """Append the answer to a line of the input, and hand it to the operating system."""
        data = (json.dumps(row, ensure_ascii=False).translate(LINE_ENDS) + "\n").encode()
        self._places.append((line, self._stream.tell(), len(data)))
        self._stream.write(data)
        self._stream.flush()

    def finish(self) -> None:
        """Bring the answers into the order of the input and give the file its name.

        What an earlier run answered under ids that the input did not have is left out.
        """
        self.close()
        self._check_free(self.file, f"has come into being meanwhile; the answers are in {self.part}")
        if self._places == sorted(self._places) and not self._found:
            self.part.replace(self.file)
            self._settings.unlink()
            return
        ordered = self.file.with_name(self.file.name + ".ordered")
        with open(self.part, "rb") as source, open(ordered, "wb") as target:
            for _, offset, size in sorted(self._places):
                source.seek(offset)
                target.write(source.read(size))
            _sync(target)
        ordered.replace(self.file)
        self.part.unlink()
        self._settings.unlink()

    def discard(self) -> None:
        """Remove the part, if nothing is in it."""
        self.close()
        if not len(self):
            self.part.unlink()
            self._settings.unlink()

    def close(self) -> None:
        """Close the part, which stays."""
        if not self._stream.closed:
            _sync(self._stream)
            self._stream.close()


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
