"""`AsyncLLM`: many callers of one event loop share the batch of one `LLM`. Names follow vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import itertools
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from mtpjax.engine.live_requests import LiveRequests
from mtpjax.engine.request import Request, RequestState
from mtpjax.llm import LLM
from mtpjax.sampling_params import SamplingParams, check_int
from mtpjax.streaming import STEPS_PER_UPDATE, StreamOutput, Updates
from mtpjax.text.prompts import Prompt
from mtpjax.text_params import RequestOutputKind

SHUT_DOWN = "this AsyncLLM was shut down; make a new one"


class AsyncLLM:
    """A checkpoint that generates for any number of coroutines at the same time.

    A thread runs one loop: between two calls of the decode loop it takes new requests and fills free slots with them,
    `max_num_seqs` at once.

    Example:

        async with AsyncLLM("Qwen3.6-35B-A3B", max_num_seqs=32) as llm:
            async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=50), "a"):
                print(output.text)

    Args:
        model: as for `LLM`, or an `LLM`; do not call that one's own `generate` meanwhile.
        max_waiting: requests at most that have been handed to the engine and have no slot; other callers of `generate`
            wait for room, in their order. None: four times `max_num_seqs`.
        steps_per_update: steps of the decode loop at most between two updates. More of them are faster together, and
            new requests and updates wait longer.
        settings: other arguments of `LLM`.

    Attributes:
        llm: the `LLM`; `llm.chat_prompt` makes prompts of conversations.

    Raises:
        ValueError, TypeError: as `LLM`.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        max_waiting: int | None = None,
        steps_per_update: int = STEPS_PER_UPDATE,
        **settings: Any,
    ):
        check_int("max_waiting", max_waiting, 1, optional=True)
        check_int("steps_per_update", steps_per_update, 1)
        if isinstance(model, LLM) and settings:
            raise ValueError(f"the LLM is made already; {', '.join(settings)} would have no effect")
        self.llm = model if isinstance(model, LLM) else LLM(model, **settings)
        self._loop = _EngineLoop(self.llm, max_waiting or 4 * self.llm.max_num_seqs, steps_per_update)
        self._shut_down = weakref.finalize(self, self._loop.shut_down)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[StreamOutput, None]:
        """Generate for one prompt. Yields updates; the last one is `finished` and has a `result`.

        `SamplingParams.output_kind` says whether an update has all text so far or what is new. A caller that is slow
        gets several updates as one. The text is that of `LLM.generate` with the seed that `result` names. A request
        without a seed gets one from its id and the LLM's seed.

        When the caller is cancelled or closes the iterator, the request ends and its slot becomes free. Leaving an
        `async for` with `break` closes it when Python gets to it; `contextlib.aclosing` does it at once.

        Args:
            prompt: a text or token ids.
            sampling_params: None: `SamplingParams()`.
            request_id: other than that of any request that runs; None: a new one.

        Raises:
            ValueError: as `LLM.generate`, or a request with this id runs.
            RuntimeError: the engine was shut down, or an error stopped it, which is the cause.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        stream = self._loop.begin(prompt, params, request_id)
        try:
            output: StreamOutput | None = None
            while output is None or not output.finished:
                update = await stream.get()
                if output is None or params.output_kind is RequestOutputKind.DELTA:
                    output = update
                else:
                    output = output.then(update)
                if update.finished or params.output_kind is not RequestOutputKind.FINAL_ONLY:
                    yield output
        finally:
            self._loop.end(stream)

    async def abort(self, request_id: str) -> None:
        """End a request. Its caller gets a last update whose `finish_reason` is "abort"; unknown ids do no harm."""
        self._loop.abort(request_id)

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._loop.streams)

    def shutdown(self) -> None:
        """End the thread, after the present call of the decode loop. Callers that wait get a RuntimeError."""
        self._shut_down()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)


class _Stream:
    """One request between the engine's thread, which puts, and its caller, who gets.

    What the caller has not fetched is one update, however much has happened. Memory is bounded by the text.
    """

    def __init__(self, request: Request, updates: Updates):
        self.request, self.updates, self.request_id = request, updates, updates.request_id
        self.in_engine = self.has_started = self.is_done = False
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._lock = threading.Lock()
        self._pending: list[StreamOutput] = []
        self._error: BaseException | None = None

    def put(self, update: StreamOutput) -> bool:
        """Hand an update over, in any thread. Returns False if the caller has left."""
        with self._lock:
            self._pending = [self._pending[0].then(update)] if self._pending else [update]
        return self._wake()

    def fail(self, error: BaseException) -> None:
        """Let `get` raise a RuntimeError, in any thread."""
        self._error = error
        self._wake()

    def _wake(self) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the event loop of the caller is closed
            return False
        return True

    async def get(self) -> StreamOutput:
        """Return what has happened since the last call, or wait for it."""
        while True:
            with self._lock:
                self._ready.clear()
                pending, self._pending = self._pending, []
            if pending:
                return pending[0]
            if self._error is not None:
                raise RuntimeError(str(self._error)) from self._error
            await self._ready.wait()


class _EngineLoop:
    """The thread and what it shares with the callers. It does not know its `AsyncLLM`, so that this one can go.

    Attributes:
        streams: the requests that run or wait, by their ids.
    """

    def __init__(self, llm: LLM, max_waiting: int, steps_per_update: int):
        self.streams: dict[str, _Stream] = {}
        self._llm, self._max_waiting, self._steps_per_update = llm, max_waiting, steps_per_update
        self._by_index: dict[int, _Stream] = {}
        self._outside: deque[_Stream] = deque()  # wait for room in the engine
        self._num_waiting = 0  # in the engine, without a slot
        self._live, self._indices, self._lock = LiveRequests(), itertools.count(), threading.RLock()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def begin(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> _Stream:
        """Check a request and hand it in, or let it wait for room."""
        index = next(self._indices)
        request_id = f"request-{index}" if request_id is None else request_id
        if not isinstance(request_id, str):
            raise ValueError(f"request_id is {request_id!r}; expected a text")
        self._check(request_id)
        if params.seed is None:
            params = replace(params, seed=self._llm.seed + _number(request_id))
        request = self._llm.stream_request(index, prompt, params, f"request {request_id!r}")
        stream = _Stream(request, Updates(request_id, prompt, self._llm._output))
        with self._lock:
            self._check(request_id)
            self.streams[request_id] = self._by_index[index] = stream
            self._outside.append(stream)
            self._let_in()
            if self._thread is None:
                atexit.register(self.shut_down)  # before what the thread needs is taken down
                self._thread = threading.Thread(target=self._run, name="mtpjax-engine", daemon=True)
                self._thread.start()
        return stream

    def _check(self, request_id: str) -> None:
        if self._error is not None:
            raise RuntimeError(str(self._error)) from self._error
        if request_id in self.streams:
            raise ValueError(f"a request with the id {request_id!r} runs; give another id, or none")

    def abort(self, request_id: str) -> None:
        """End a request wherever it is."""
        with self._lock:
            stream = self.streams.get(request_id)
            if stream is None or stream.is_done:
                return
            if stream.in_engine:
                self._live.abort(stream.request.index)
                return
            self._outside.remove(stream)
            self._deliver(stream, RequestState(stream.request, finished=True, aborted=True))

    def end(self, stream: _Stream) -> None:
        """Forget a request whose caller has gone; it is aborted unless it is finished."""
        with self._lock:
            self.abort(stream.request_id)
            if self.streams.get(stream.request_id) is stream:
                del self.streams[stream.request_id]

    def shut_down(self) -> None:
        """End the thread; what runs and waits fails."""
        self._fail(RuntimeError(SHUT_DOWN))
        self._live.close()
        atexit.unregister(self.shut_down)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            states = self._llm.engine.stream(
                self._live, self._llm.max_num_seqs, yields_progress=True, steps_per_call=self._steps_per_update
            )
            for state in states:
                with self._lock:
                    stream = self._by_index.get(state.request.index)
                    if stream is not None:
                        self._deliver(stream, state)
        except BaseException as error:
            failure = RuntimeError(f"the engine stopped: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail(failure)
            self._live.close()

    def _deliver(self, stream: _Stream, state: RequestState) -> None:
        if stream.in_engine and not stream.has_started:
            stream.has_started = True
            self._num_waiting -= 1
            self._let_in()
        is_heard = stream.put(stream.updates.next(state))
        if state.finished:
            stream.is_done = True
            del self._by_index[stream.request.index]
        if not is_heard:
            self.end(stream)

    def _let_in(self) -> None:
        """Hand requests to the engine as far as there is room."""
        while self._outside and self._num_waiting < self._max_waiting and self._error is None:
            stream = self._outside.popleft()
            stream.in_engine = True
            self._num_waiting += 1
            self._live.add(stream.request)

    def _fail(self, error: BaseException) -> None:
        """Let all callers know, those to come too."""
        with self._lock:
            if self._error is None:
                self._error = error
                for stream in self.streams.values():
                    if not stream.is_done:
                        stream.fail(error)


def _number(request_id: str) -> int:
    """A number of 31 bits that belongs to an id."""
    return int.from_bytes(hashlib.sha256(request_id.encode(errors="replace")).digest()[:4], "little") >> 1
