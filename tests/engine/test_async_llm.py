"""`AsyncLLM`: many callers share a batch, and slots become free when a caller goes."""

import asyncio
import gc
import random
import threading
import tracemalloc
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import jax
import pytest

from mtpjax import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from mtpjax.streaming import StreamOutput
from tests.helpers.streams import PROMPTS, SLOTS, joined, make_llm, params


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm()


async def collect(async_llm: AsyncLLM, *arguments: Any) -> list[StreamOutput]:
    return [output async for output in async_llm.generate(*arguments)]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run it, and fail if a thread of an engine is left."""
    result = asyncio.run(coroutine)
    assert not [thread for thread in threading.enumerate() if thread.name == "mtpjax-engine"]
    return result


@pytest.mark.slow
def test_many_callers_get_the_texts_that_they_get_alone(llm: LLM) -> None:
    """Two dozen, more than there are slots and room; of each kind of output."""
    todo = params(llm)
    wanted = llm.generate(PROMPTS, todo)

    async def main() -> list[list[StreamOutput]]:
        async with AsyncLLM(llm, max_waiting=2) as async_llm:
            kinds = list(RequestOutputKind)
            jobs = [(i % len(PROMPTS), kinds[i % 3 - i // 12]) for i in range(24)]
            calls = [collect(async_llm, PROMPTS[i], replace(todo[i], output_kind=kind)) for i, kind in jobs]
            answers = await asyncio.gather(*calls)
            assert async_llm.num_unfinished == 0
            for (i, kind), updates in zip(jobs, answers, strict=True):
                last, output = updates[-1], wanted[i]
                assert last.result is not None and last.result.outputs == output.outputs and last.finished
                if kind is RequestOutputKind.DELTA:
                    assert joined(updates) == (output.text, output.token_ids)
                else:
                    assert (last.text, last.token_ids) == (output.text, output.token_ids)
                    assert len(updates) == 1 or kind is RequestOutputKind.CUMULATIVE
                    assert all(str(b.text).startswith(str(a.text)) for a, b in zip(updates, updates[1:], strict=False))
            return answers

    run(main())


def test_a_request_without_a_seed_gets_one_of_its_id(llm: LLM) -> None:
    sampled = SamplingParams(max_tokens=12, temperature=1.0)

    async def main() -> list[Any]:
        async with AsyncLLM(llm) as async_llm:
            first = await asyncio.gather(*(collect(async_llm, "A dog", sampled, name) for name in "ab"))
            return [updates[-1].result for updates in (*first, await collect(async_llm, "A dog", sampled, "a"))]

    a, b, again = run(main())
    assert a.text == again.text != b.text and a.seed == again.seed != b.seed
    assert [one.text for one in llm.generate(["A dog"] * 2, [replace(sampled, seed=x.seed) for x in (a, b)])] == [
        a.text,
        b.text,
    ]


def test_ids_and_aborts(llm: LLM) -> None:
    """Two streams with one id, cancel twice, an unknown id, abort while a request runs or waits for room."""
    long = SamplingParams(max_tokens=50, ignore_eos=True)

    async def main() -> None:
        async with AsyncLLM(llm, max_waiting=1) as async_llm:
            running = async_llm.generate(PROMPTS[0], long, "a")
            first = await anext(running)
            with pytest.raises(ValueError, match="a request with the id 'a' runs"):
                await collect(async_llm, PROMPTS[0], long, "a")
            with pytest.raises(ValueError, match="request 'x' is empty"):
                await collect(async_llm, "", long, "x")
            with pytest.raises(ValueError, match="request_id is 3; expected a text"):
                await collect(async_llm, "A dog", long, 3)
            await async_llm.abort("unknown")
            for _ in range(2):
                await async_llm.abort("a")
            rest = [output async for output in running]
            last = rest[-1]
            assert last.finish_reason == "abort" and last.result is not None and len(last.token_ids) < 50
            whole = llm.generate([PROMPTS[0]], replace(long, seed=last.result.seed))[0]
            assert last.token_ids == whole.token_ids[: len(last.token_ids)] and str(whole.text).startswith(
                str(first.text)
            )
            await async_llm.abort("a")
            assert async_llm.num_unfinished == 0
            tasks = [asyncio.create_task(collect(async_llm, PROMPTS[i % 6], long, str(i))) for i in range(9)]
            await asyncio.sleep(0)
            await async_llm.abort("8")  # has no room yet
            answers = await asyncio.gather(*tasks)
            assert [one[-1].finish_reason for one in answers] == ["length"] * 8 + ["abort"]
            assert answers[8][-1].token_ids == []
            assert len((await collect(async_llm, "A dog", long, "a"))[-1].token_ids) == 50  # the id is free again

    run(main())


def test_a_cancelled_caller_frees_its_slot(llm: LLM) -> None:
    """Callers that go fill all slots with texts that take long; the next one gets a slot at once."""
    long = SamplingParams(max_tokens=56, ignore_eos=True)

    async def main() -> None:
        async with AsyncLLM(llm) as async_llm:

            async def begin(i: int, begun: asyncio.Event) -> None:
                async with aclosing(async_llm.generate(PROMPTS[i], long)) as outputs:  # type: ignore[type-var]
                    async for _ in outputs:
                        begun.set()

            events = [asyncio.Event() for _ in range(SLOTS)]
            tasks = [asyncio.create_task(begin(i, event)) for i, event in enumerate(events)]
            await asyncio.gather(*(event.wait() for event in events))
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            steps = llm.engine.slot_steps
            assert all(isinstance(one, asyncio.CancelledError) for one in done) and async_llm.num_unfinished == 0
            await collect(async_llm, "A dog", SamplingParams(max_tokens=1))
            assert llm.engine.slot_steps - steps <= SLOTS * 3 * async_llm._loop._steps_per_update

    run(main())


def test_a_slow_caller_gets_several_updates_as_one(llm: LLM) -> None:
    one = SamplingParams(max_tokens=50, ignore_eos=True, output_kind=RequestOutputKind.DELTA, seed=4)

    async def main() -> None:
        async with AsyncLLM(llm) as async_llm:
            outputs = async_llm.generate(PROMPTS[0], one, "slow")
            updates = [await anext(outputs)]
            stream = async_llm._loop.streams["slow"]
            while not stream.is_done:
                assert len(stream._pending) <= 1
                await asyncio.sleep(0.01)
            updates += [output async for output in outputs]
            assert len(updates) == 2
            (whole,) = llm.generate([PROMPTS[0]], one)
            assert joined(updates) == (whole.text, whole.token_ids)

    run(main())


def test_after_shutdown_and_after_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that wait and those to come get an error that says why."""
    long = SamplingParams(max_tokens=50)

    async def shut_down() -> None:
        async_llm = AsyncLLM(llm)
        tasks = [asyncio.create_task(collect(async_llm, prompt, long)) for prompt in PROMPTS]
        await asyncio.sleep(0.05)
        for _ in range(2):
            await asyncio.to_thread(async_llm.shutdown)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {str(one) for one in errors if isinstance(one, RuntimeError)} == {
            "this AsyncLLM was shut down; make a new one"
        }
        with pytest.raises(RuntimeError, match="was shut down"):
            await collect(async_llm, "A dog")

    run(shut_down())

    async def fail() -> None:
        async_llm = AsyncLLM(llm)
        monkeypatch.setattr(llm.engine.runner, "decode", lambda *_: 1 / 0)
        errors = await asyncio.gather(*(collect(async_llm, p, long) for p in PROMPTS), return_exceptions=True)
        for error in errors:
            assert isinstance(error, RuntimeError) and "the engine stopped: ZeroDivisionError" in str(error)
        with pytest.raises(RuntimeError, match="the engine stopped: ZeroDivisionError") as found:
            await collect(async_llm, "A dog")
        causes, cause = [], found.value.__cause__
        while cause is not None:
            causes.append(type(cause))
            cause = cause.__cause__
        assert ZeroDivisionError in causes
        async_llm.shutdown()

    run(fail())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the LLM is made already; dtype would have no effect"):
        AsyncLLM(llm, dtype="float32")
    with pytest.raises(ValueError, match="max_waiting is 0"):
        AsyncLLM(llm, max_waiting=0)
    with pytest.raises(TypeError, match="did you mean 'max_num_seqs'"):
        AsyncLLM(None, max_num_seq=3)


def test_the_thread_ends_with_its_owner(llm: LLM) -> None:
    async def main() -> None:
        await collect(AsyncLLM(llm), "A dog", SamplingParams(max_tokens=2))

    asyncio.run(main())
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "mtpjax-engine"]


@pytest.mark.slow
def test_two_hundred_requests_with_cancels(llm: LLM) -> None:
    """No slot is lost, nothing is compiled, and memory is flat: as many arrays and no more bytes than before."""
    rng = random.Random(0)
    todo = params(llm)
    wanted = [one.text for one in llm.generate(PROMPTS, todo)]

    async def one(async_llm: AsyncLLM, i: int) -> bool:
        await asyncio.sleep(rng.random())
        way, leave_after = rng.choice(["finish", "finish", "break", "cancel", "abort"]), rng.randint(1, 4)
        which, seen = i % len(PROMPTS), 0
        async with aclosing(async_llm.generate(PROMPTS[which], todo[which], f"r{i}")) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                seen += 1
                if seen >= leave_after and way != "finish" and not output.finished:
                    if way == "abort":
                        await async_llm.abort(f"r{i}")
                    elif way == "break":
                        return False
                    else:
                        raise asyncio.CancelledError
        assert output.text == wanted[which] or (way == "abort" and output.finish_reason == "abort")
        return output.finish_reason != "abort"

    async def main() -> None:
        async with AsyncLLM(llm, max_waiting=5) as async_llm:
            await asyncio.gather(*(collect(async_llm, p, q) for p, q in zip(PROMPTS, todo, strict=True)))
            programs, sizes = llm.engine.num_programs, []
            for half in range(2):
                jobs = [asyncio.create_task(one(async_llm, half * 100 + i)) for i in range(100)]
                done = await asyncio.gather(*jobs, return_exceptions=True)
                errors = [e for e in done if isinstance(e, BaseException) and not isinstance(e, asyncio.CancelledError)]
                assert not errors and 20 < done.count(True) < 80, errors
                # All slots are there: so many requests get their first tokens together.
                streams = [async_llm.generate(PROMPTS[i], replace(todo[0], max_tokens=50)) for i in range(SLOTS)]
                await asyncio.gather(*(anext(stream) for stream in streams))
                for stream in streams:
                    await stream.aclose()  # type: ignore[attr-defined]
                loop = async_llm._loop
                while loop._by_index:
                    await asyncio.sleep(0.01)
                assert (loop._num_waiting, len(loop.streams), len(loop._outside)) == (0, 0, 0)
                gc.collect()
                sizes.append((len(jax.live_arrays()), tracemalloc.get_traced_memory()[0]))
            assert llm.engine.num_programs == programs
            assert sizes[1][0] == sizes[0][0] and sizes[1][1] < sizes[0][1] + 100_000, sizes

    tracemalloc.start()
    try:
        run(main())
    finally:
        tracemalloc.stop()
