"""`ProgramCache`: compiled programs in a folder of the user's, so that the next start traces and compiles nothing.

There are two kinds of files. A `.program` holds an executable; its name is a digest of the lowered program. A `.name`
says which one a step has with certain arguments (`mtpjax.engine.program_key`), so that nothing is traced to find it. An
edited source file changes the latter digest but often not the former.

A file begins with `MAGIC` and a SHA-256 of the rest, which is a line of JSON for people who look into it and a pickle.
Reading a pickle can run any code: files count only if they and their folder belong to the user and nobody else may
write to them. They are written under another name and renamed, so that a reader never sees half of one and several
processes may write the same. Beyond `max_bytes`, the least recently used go first.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from mtpjax.engine.program_key import default_device

VARIABLE = "MTPJAX_PROGRAM_CACHE"  # a folder; empty: nothing is kept
AUTO = "auto"
MAX_BYTES = 2 << 30
MAGIC = b"mtpjax program 1\n"
NAME, PROGRAM, UNFINISHED = ".name", ".program", ".unfinished"
UNFINISHED_SECONDS = 3600  # after that, the process that was writing a file has ended
Result = TypeVar("Result")


class ProgramCache:
    """Compiled programs in a folder.

    Args:
        folder: made if it is missing.
        max_bytes: of all files together.

    Attributes:
        num_loaded, num_saved: executables that this object has read and written.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES):
        self.folder, self.max_bytes = folder, max_bytes
        self.num_loaded = self.num_saved = 0
        self._enabled = True
        self._writer = ThreadPoolExecutor(1, "mtpjax-program-cache")
        self._writes: list[Future[None]] = []

    def has(self, digest: str | None) -> bool:
        """Return whether there is a program for a step with this digest."""
        return digest is not None and self._enabled and self._path(digest, NAME).exists()

    def load(self, digest: str, args: Any) -> jax.stages.Compiled | None:
        """Return the program of a step with this digest, for arguments like `args`, or None if there is none.

        A damaged file is reported by a warning and removed. So is one that this device cannot load.
        """
        in_tree: Any = jax.tree_util.tree_structure((args, {}))
        name = self._read(self._path(digest, NAME), _Name._make)
        if name is None or name.num_arguments != in_tree.num_leaves:
            return None
        return self._load_executable(name.executable, in_tree, name.out_tree)

    def load_lowered(self, lowered: Lowered, digest: str) -> jax.stages.Compiled | None:
        """Return the program of a lowered step, or None. If there is one, the digest of the step leads to it now."""
        program = self._load_executable(lowered.digest, lowered.in_tree, lowered.out_tree)
        if program is not None:
            self._submit(self._save_name, digest, lowered)
        return program

    def save(self, digest: str, lowered: Lowered, program: Any) -> None:
        """Keep a program. It is written in the background; the process waits for that before it ends.

        The program may not have run yet: XLA's CPU runtime cannot serialise a sort that has run.

        Args:
            digest: of the step.
            lowered: what was compiled.
            program: a `jax.stages.Compiled`.
        """
        if not self._enabled:
            return
        try:
            executable, _, _ = serialize(program)
        except Exception as error:  # the platform decides what it raises where it cannot serialise
            _warn_once(f"a compiled program cannot be kept here: {type(error).__name__}: {str(error).strip()[:200]}")
            return
        self._submit(self._save_executable, lowered, executable)
        self._submit(self._save_name, digest, lowered)

    def wait(self) -> None:
        """Wait until everything that was to be kept is on disk."""
        for write in self._writes:
            write.result()
        self._writes.clear()

    def _submit(self, *task: Any) -> None:
        if self._enabled:
            self._writes.append(self._writer.submit(*task))

    def _path(self, digest: str, suffix: str) -> Path:
        return self.folder / (digest + suffix)

    def _load_executable(self, digest: str, in_tree: Any, out_tree: Any) -> jax.stages.Compiled | None:
        device = default_device()

        def load(executable: bytes) -> jax.stages.Compiled:
            return deserialize_and_load(executable, in_tree, out_tree, device.client, [device])

        program = self._read(self._path(digest, PROGRAM), load)
        self.num_loaded += program is not None
        return program

    def _save_executable(self, lowered: Lowered, executable: bytes) -> None:
        self._write(self._path(lowered.digest, PROGRAM), lowered, executable)
        self.num_saved += 1

    def _save_name(self, digest: str, lowered: Lowered) -> None:
        if self._path(lowered.digest, PROGRAM).exists():
            name = _Name(lowered.digest, lowered.in_tree.num_leaves, lowered.out_tree)
            self._write(self._path(digest, NAME), lowered, tuple(name))

    def _read(self, file: Path, use: Callable[[Any], Result]) -> Result | None:
        """Return `use` of what was kept in a file; None if there is no such file, or no usable one."""
        try:
            content = self._read_own(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._turn_off(f"{file} cannot be read ({error})")
            return None
        try:
            result = use(_unpack(content))
        except Exception as error:  # a damaged pickle raises anything, and so does the runtime
            reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
            warnings.warn(f"{file}: not a usable program ({reason}); it is compiled anew", stacklevel=2)
            with suppress(OSError):
                file.unlink()
            return None
        with suppress(OSError):
            os.utime(file)  # used now
        return result

    def _read_own(self, file: Path) -> bytes:
        """Return the content of a file that only the user can have written."""
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
        with open(handle, "rb") as stream:
            _check_owner(os.stat(self.folder), self.folder)
            _check_owner(os.fstat(handle), file)
            return stream.read()

    def _write(self, file: Path, lowered: Lowered, value: Any) -> None:
        """Write a file, all or nothing, and make room for it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(os.stat(self.folder), self.folder)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=UNFINISHED, delete=False) as unfinished:
                try:
                    unfinished.write(_pack(lowered.description, value))
                    unfinished.close()
                    os.replace(unfinished.name, file)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(unfinished.name)
                    raise
            self._remove_oldest()
        except OSError as error:
            self._turn_off(f"{self.folder} cannot be written ({error})")

    def _remove_oldest(self) -> None:
        """Remove files until `max_bytes` are left, and what writers that were interrupted left behind."""
        found = []
        for file in self.folder.iterdir():
            with suppress(OSError):  # another process may remove it, too
                status = file.stat()
                if file.suffix in (NAME, PROGRAM):
                    found.append((status.st_mtime, status.st_size, file))
                elif file.suffix == UNFINISHED and time.time() - status.st_mtime > UNFINISHED_SECONDS:
                    file.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= self.max_bytes:
                break
            with suppress(OSError):
                file.unlink()
            total -= size

    def _turn_off(self, reason: str) -> None:
        self._enabled = False
        _warn_once(f"compiled programs are not kept for the next start: {reason}")


class Lowered(NamedTuple):
    """What `ProgramCache` needs to know of a lowered step.

    Attributes:
        digest: of the text of the program and of what XLA makes of it.
        description: a JSON object, for people.
        in_tree, out_tree: structures of arguments and of results.
    """

    digest: str
    description: dict[str, Any]
    in_tree: Any
    out_tree: Any


class _Name(NamedTuple):
    """The content of a `.name` file."""

    executable: str  # digest of the lowered program
    num_arguments: int
    out_tree: Any


def open_program_cache(folder: str | PathLike[str] | None) -> ProgramCache | None:
    """Return the cache in a folder.

    Args:
        folder: "auto": that of `VARIABLE` in the environment, else `mtpjax/programs` in the user's folder for caches;
            None or empty: none.
    """
    if folder == AUTO:
        folder = os.environ.get(VARIABLE, _default_folder())
    if not folder:
        return None
    if not hasattr(os, "getuid") or not hasattr(os, "O_NOFOLLOW"):
        _warn_once(f"compiled programs are not kept on {sys.platform}, which does not tell whom a file belongs to")
        return None
    return ProgramCache(Path(folder).expanduser().absolute())


def _default_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG standard says to ignore it then
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:  # no home
            return ""
    return os.path.join(base, "mtpjax", "programs")


def _check_owner(status: os.stat_result, path: Path) -> None:
    """Raise OSError if somebody else may have written a file or folder."""
    if status.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to user {status.st_uid}; give a folder of your own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others may write to {path}; take that permission away (chmod go-w), or give another folder")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _pack(description: dict[str, Any], value: Any) -> bytes:
    made = {"made": time.strftime("%Y-%m-%d %H:%M:%S")}
    payload = json.dumps(description | made).encode() + b"\n" + pickle.dumps(value)
    return MAGIC + hashlib.sha256(payload).digest() + payload


def _unpack(content: bytes) -> Any:
    start = len(MAGIC) + 32
    if not content.startswith(MAGIC):
        raise ValueError("it does not begin as such a file does")
    if hashlib.sha256(memoryview(content)[start:]).digest() != content[start - 32 : start]:
        raise ValueError("its checksum is wrong")
    return pickle.loads(memoryview(content)[content.index(b"\n", start) + 1 :])
