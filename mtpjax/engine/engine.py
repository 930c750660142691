"""`Engine`: runs any number of requests through the slots of one decode loop; the host sees tokens every few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mtpjax.engine.decode_batch import DecodeBatch
from mtpjax.engine.depth import DepthController
from mtpjax.engine.live_requests import LiveRequests
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.prefix_cache import PrefixCache
from mtpjax.engine.request import Request, RequestState
from mtpjax.engine.scheduler import Scheduler
from mtpjax.engine.shared_prefixes import SharedPrefixes

STEPS_OF_FIRST_CALL = 4  # of the decode loop in a run, so that the first tokens do not wait for a whole call
STEPS_WITH_STOP_STRINGS = 8  # of a call, so that a slot does not go on for long behind a stop string

TokenCallback = Callable[[RequestState, list[int]], None]
"""Called with the state of a request and its new tokens."""


class Engine:
    """Generates with one `ModelRunner`.

    Each run has a `Scheduler` and a `DecodeBatch` of its own, so runs may be interleaved or left in the middle.

    A run uses one program for each prompt-chunk bucket, one that makes an empty cache, and one decode loop. With more
    requests than slots, or with shared prompts, it needs one more that makes a cache and one that copies prompts into
    their slots.

    Args:
        runner: the model.
        max_prefill_seqs: prompts that are read together when slots become free; None: a quarter of the slots.
        prefix_cache: common beginnings of prompts are read once and kept there; None: every prompt is read whole.

    Attributes:
        num_prompt_tokens: prompt tokens read so far; those of a prompt, or a beginning, that requests share count once.
        num_cached_tokens: prompt tokens of requests so far that came from a shared prompt or beginning.
        prefill_seconds, decode_seconds: spent so far in prefills and in the decode loop, without compilation.
        slot_steps: steps of the decode loop times its slots, whether or not a slot had a request.
        depths: chooses how many tokens each call drafts; None: every call drafts the runner's number.
    """

    def __init__(
        self, runner: ModelRunner, *, max_prefill_seqs: int | None = None, prefix_cache: PrefixCache | None = None
    ):
        self.runner, self.max_prefill_seqs, self.prefix_cache = runner, max_prefill_seqs, prefix_cache
        self.depths = None if runner.auto_depths is None else DepthController(runner.auto_depths)
        self.num_prompt_tokens = self.num_cached_tokens = self.slot_steps = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling so far."""
        return self.runner.compile_seconds

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return self.runner.num_programs

    def seconds_without_compile(self) -> float:
        """Seconds of a clock that stands still while something compiles."""
        return self.runner.seconds_without_compile()

    def run(
        self, requests: Sequence[Request], num_slots: int, on_tokens: TokenCallback | None = None
    ) -> list[RequestState]:
        """Generate for all requests. Returns their states in the order of the requests.

        Arguments are those of `stream`; the requests are sorted by the lengths of their prompts all together.
        """
        stream = self.stream(requests, num_slots, on_tokens, lookahead=len(requests))
        states = {(s.request.index, s.request.sample): s for s in stream}
        return [states[r.index, r.sample] for r in requests]

    def stream(
        self,
        requests: Iterable[Request],
        num_slots: int,
        on_tokens: TokenCallback | None = None,
        *,
        lookahead: int | None = None,
        yields_progress: bool = False,
        steps_per_call: int | None = None,
    ) -> Iterator[RequestState]:
        """Generate for all requests. Yields the state of each request when it is finished, in any order.

        With `LiveRequests` it goes on until they are closed, and waits when there is nothing to do.

        Args:
            requests: taken from as they are needed; their indices differ.
            num_slots: requests that run at the same time.
            on_tokens: called after each call of the decode loop, for each request that has a slot.
            lookahead: requests that are taken together and started in the order of their prompts' lengths; see
                `Scheduler`.
            yields_progress: yield also the states of requests that go on, after each call of the decode loop.
            steps_per_call: steps of the decode loop at most before the host looks at the tokens.
        """
        live = requests if isinstance(requests, LiveRequests) else None
        scheduler = Scheduler(requests, num_slots, max_prefill_seqs=self.max_prefill_seqs, lookahead=lookahead)
        cache = self.prefix_cache
        prefixes = SharedPrefixes(cache, scheduler) if cache is not None and cache.is_in_use else None
        batch = DecodeBatch(
            self.runner, num_slots, scheduler.prefill_batch, scheduler.static_batch, self.depths, prefixes
        )
        step_limit: int | None = STEPS_OF_FIRST_CALL
        while True:
            if live is not None:
                if live.closed:
                    return
                if aborted := live.take_aborted():
                    yield from scheduler.abort(aborted)
                    yield from _finished(scheduler, batch)
            while group := scheduler.admit():
                num_read = batch.num_tokens_read
                seconds = batch.prefill(group, scheduler.requests_by_slot, scheduler.waiting)
                self.prefill_seconds += seconds
                self.num_prompt_tokens += batch.num_tokens_read - num_read
                for state in group.states:
                    state.prefill_seconds = seconds
                    self.num_cached_tokens += state.num_cached_tokens
                yield from _finished(scheduler, batch)
            if scheduler.num_free_slots == num_slots:
                if live is None or not live.wait():
                    return
                continue
            limits = [step_limit, steps_per_call, STEPS_WITH_STOP_STRINGS if scheduler.has_stop_strings else None]
            limit = min((limit for limit in limits if limit is not None), default=None)
            decoded = batch.decode(scheduler.return_when_finished, limit)
            step_limit = None
            self.decode_seconds += decoded.seconds
            self.slot_steps += num_slots * decoded.num_steps
            for running, tokens, logprobs in zip(scheduler.running, decoded.tokens, decoded.logprobs, strict=True):
                if running is not None:
                    tokens = running.add(tokens, logprobs)
                    running.decode_seconds += decoded.seconds
                    if on_tokens is not None:
                        on_tokens(running, tokens)
            yield from _finished(scheduler, batch)
            if yields_progress:
                yield from [state for state in scheduler.running if state is not None]


def _finished(scheduler: Scheduler, batch: DecodeBatch) -> Iterator[RequestState]:
    """Free the slots whose requests are finished, and yield their states."""
    if scheduler.num_free_slots == scheduler.num_slots:
        return
    figures = batch.figures()
    ended = [slot for slot, running in enumerate(scheduler.running) if running is not None and running.ended_by_host]
    if going_on := [slot for slot in ended if not figures.finished[slot]]:
        batch.finish(going_on)
    for slot, running in enumerate(scheduler.running):
        if running is not None and (figures.finished[slot] or slot in ended):
            state = scheduler.finish(slot)
            state.stopped = bool(figures.stopped[slot]) and not state.ended_by_host
            state.num_steps = int(figures.num_steps[slot])
            state.num_accepted_tokens_per_pos = figures.accepted[slot].tolist()
            state.num_drafts, state.num_draft_tokens = (
                int(figures.num_drafts[slot]),
                int(figures.num_draft_tokens[slot]),
            )
            yield state
