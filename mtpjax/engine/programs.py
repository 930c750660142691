"""`Programs`: the compiled programs of one `ModelRunner`, made when they are needed or begun ahead in other threads.

JAX traces and lowers in the thread that asks, whose settings count. XLA compiles, and kept programs are read, in other
threads: both release the interpreter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import jax

from kernels_pallas.platform import compile_options
from mtpjax.engine.program_cache import Lowered, ProgramCache
from mtpjax.engine.program_key import environment, lowered_digest, step_digest

CompileFn = Callable[[Any, tuple[Any, ...]], Callable[..., Any]]
"""Compiles a jitted function for arguments like the given ones; returns a callable for such arguments."""

ProgramName = tuple[Any, ...]
Step = partial[Any]
"""`partial(make, fn, *args, **static)`; called without arguments it returns the jitted step."""
CACHE_HIT = "/jax/compilation_cache/cache_hits"  # an event of JAX
MAX_THREADS = 4  # programs that compile at the same time; XLA's CPU compiler has threads of its own


def compile_ahead(fn: Any, args: tuple[Any, ...]) -> Callable[..., Any]:
    """Compile a jitted function ahead of time for arguments like these; the default `CompileFn`."""
    return fn.lower(*args).compile(**compile_options())


class Programs:
    """Compiled programs by name.

    Args:
        compile_fn: makes each program. One other than `compile_ahead` is asked when the program is needed, and what it
            makes is not kept.
        kept: programs of earlier processes; None: every program is compiled.

    Attributes:
        compiled: the programs that have been asked for.
        seconds: spent waiting for programs.
    """

    def __init__(self, compile_fn: CompileFn, kept: ProgramCache | None):
        self.compile_fn, self.kept, self.seconds = compile_fn, kept, 0.0
        self.compiled: dict[ProgramName, Callable[..., Any]] = {}
        self._begun: dict[ProgramName, Future[Callable[..., Any] | None]] = {}

    def __len__(self) -> int:
        return len(self.compiled.keys() | self._begun.keys())

    def begin(self, name: ProgramName, step: Step, args: tuple[Any, ...]) -> None:
        """Make a program ready in another thread, unless that has begun already.

        Args:
            name: of the program.
            step: what it computes.
            args: arrays, or their shapes, that it is made for.
        """
        if name in self.compiled or name in self._begun or self.compile_fn is not compile_ahead:
            return
        start = time.perf_counter()
        digest = self._digest(step, args)
        if self.kept is not None and digest is not None and self.kept.has(digest):
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
            self._begun[name] = _threads().submit(self.kept.load, digest, shapes)
        else:
            self._begun[name] = _threads().submit(self._lower(name, step, args, digest))
        self.seconds += time.perf_counter() - start

    def get(self, name: ProgramName, step: Step, args: tuple[Any, ...]) -> Callable[..., Any]:
        """Return a program; arguments as those of `begin`. Waits until it is ready."""
        if name not in self.compiled:
            self.begin(name, step, args)
            start = time.perf_counter()
            begun = self._begun.pop(name, None)
            program = None if begun is None else begun.result()
            if program is None and begun is not None:  # a kept program that cannot be used
                program = self._lower(name, step, args, self._digest(step, args))()
            self.compiled[name] = self.compile_fn(step(), args) if program is None else program
            self.seconds += time.perf_counter() - start
        return self.compiled[name]

    def _digest(self, step: Step, args: tuple[Any, ...]) -> str | None:
        if self.kept is None:
            return None
        return step_digest(step.args[0], (step.args[1:], step.keywords), args, compile_options())

    def _lower(
        self, name: ProgramName, step: Step, args: tuple[Any, ...], digest: str | None
    ) -> Callable[[], Callable[..., Any]]:
        """Trace and lower a step. Returns what compiles it, in any thread."""
        lowered, options, kept = step().lower(*args), compile_options(), self.kept
        key = lowered_digest(lowered, args, options) if digest is not None else None
        if kept is None or digest is None or key is None:
            return lambda: lowered.compile(**options)
        keepable = Lowered(
            key, {"program": " ".join(map(str, name)), **environment()}, lowered.in_tree, lowered.out_tree
        )

        def make() -> Callable[..., Any]:
            program = kept.load_lowered(keepable, digest)
            if program is None:
                with count_cache_hits() as hits:
                    program = lowered.compile(**options)
                # What JAX's own cache hands out has lost functions when it is serialised again (XLA's CPU runtime).
                if not hits:
                    kept.save(digest, keepable, program)
            return program

        return make


class _CacheHits(threading.local):
    """The hits of JAX's persistent cache that are being counted in this thread, if any."""

    counted: list[str] | None = None


_cache_hits = _CacheHits()


@cache
def _listen() -> None:
    def count(event: str, **_: str | int) -> None:
        if event == CACHE_HIT and _cache_hits.counted is not None:
            _cache_hits.counted.append(event)

    jax.monitoring.register_event_listener(count)


@contextmanager
def count_cache_hits() -> Iterator[list[str]]:
    """Yield a list that grows with each program that JAX's persistent cache gives this thread."""
    _listen()
    hits: list[str] = []
    _cache_hits.counted = hits
    try:
        yield hits
    finally:
        _cache_hits.counted = None


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, "mtpjax-compile")
