"""Many requests of all kinds through `AsyncLLM`, many of them cancelled: memory stays flat and nothing is compiled.

    python -m tests.helpers.soak [--requests 2000]

After a warm-up with the same kinds of requests, memory is read at each tenth of the requests. The exit status is 1 if a
program was compiled after the warm-up, a request is lost, or the memory of the last half grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Any

from mtpjax import LLM, AsyncLLM, SamplingParams, StructuredOutputs
from scripts.benchmarks.demo_prompts import prompts_by_domain

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"stop": [" the", "."]},
    {"logprobs": 2},
    {"presence_penalty": 0.5},
    {"logit_bias": {7: 1.0}, "min_tokens": 3},
    {"bad_words": ["zebra"]},
    {"structured_outputs": StructuredOutputs(choice=["yes", "no", "perhaps"])},
    {"num_speculative_tokens": 0},
)
AT_ONCE = 64  # callers


def resident_mb() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def one(llm: AsyncLLM, number: int, prompt: list[int], rng: random.Random) -> str:
    """Ask for one text; every third caller leaves in the middle. Returns how it ended."""
    kind = KINDS[number % len(KINDS)]
    params = SamplingParams(max_tokens=rng.randint(3, 60), temperature=0.8, seed=number, **kind)
    leave_after = rng.randint(1, 3) if number % 3 == 0 else None
    updates = 0
    stream = llm.generate(prompt, params, f"request-{number}")
    try:
        async for output in stream:
            updates += 1
            if output.finished:
                return str(output.finish_reason)
            if updates == leave_after:
                return "left"
    finally:
        await stream.aclose()
    return "lost"


async def ask_all(llm: AsyncLLM, prompts: list[list[int]], numbers: range, figures: list[float]) -> dict[str, int]:
    """Ask for all texts, `AT_ONCE` at a time. Returns how many ended in which way."""
    rng, ends, room = random.Random(numbers.start), dict[str, int](), asyncio.Semaphore(AT_ONCE)

    async def ask(number: int) -> None:
        async with room:
            end = await one(llm, number, prompts[number % len(prompts)], rng)
            ends[end] = ends.get(end, 0) + 1
            if sum(ends.values()) % max(1, len(numbers) // 10) == 0:
                figures.append(resident_mb())

    await asyncio.gather(*(ask(number) for number in numbers))
    return ends


async def soak(requests: int) -> int:
    """Run the soak; returns the exit status."""
    inner = LLM(dtype="float32", max_model_len=256, max_num_seqs=16, num_speculative_tokens=3)
    prompts = [ids[:50] for domain in prompts_by_domain(inner, 8).values() for ids in domain]
    async with AsyncLLM(inner) as llm:
        await ask_all(llm, prompts, range(-200, 0), [])
        programs, memory, start = inner.engine.num_programs, list[float](), time.perf_counter()
        ends = await ask_all(llm, prompts, range(requests), memory)
        print(f"{requests} requests in {time.perf_counter() - start:.0f} s: {ends}")
    print("memory in MB:", " ".join(f"{one:.0f}" for one in memory))
    print(f"programs: {programs} after the warm-up, {inner.engine.num_programs} at the end")
    half = memory[len(memory) // 2 :]
    flat = half[-1] < 1.05 * half[0]
    return int(not flat or inner.engine.num_programs != programs or sum(ends.values()) != requests or "lost" in ends)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=2000)
    return asyncio.run(soak(parser.parse_args().requests))


if __name__ == "__main__":
    sys.exit(main())
