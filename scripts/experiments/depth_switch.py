"""One decode program that chooses the depth in every round, against one program for each depth: compiling and speed.

    python -m scripts.experiments.depth_switch

The engine has a program for each depth, and chooses between calls. This script makes the other design, a `lax.switch`
over the depths in the body of the loop, for one sequence of the embedded model, and times both at each depth.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from mtpjax.decoding.speculative import DECODE_DONATED, DecodeState, decode, mtp_drafter, speculative_step
from mtpjax.engine.decode_batch import DecodeBatch
from mtpjax.engine.depth import DEPTHS
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.request import Request
from mtpjax.engine.scheduler import Scheduler
from mtpjax.engine.stack_requests import stack_requests
from mtpjax.llm import LLM
from mtpjax.model.cache import pending_between_windows
from scripts.benchmarks.demo_prompts import excerpts

STEPS, ENDLESS = 32, 10**6  # steps of a call; tokens of the text
Program = Callable[[DecodeState], Any]


def switched(params: Any, state: DecodeState, sampling_params: Any, index: Array, *, graph: Any, vocab: int) -> Any:
    """Run `STEPS` steps; each chooses the depth `DEPTHS[index]`."""
    model, width = nnx.merge(graph, params), DEPTHS[-1] + 1
    batch, capacity = state.token.shape[0], STEPS * (DEPTHS[-1] + 1)
    if pending_between_windows(state.cache, width) is not None:
        raise SystemExit("on this platform accepted rows wait for the next window; the script is about a CPU")

    def at_depth(k: int, state: DecodeState) -> tuple[DecodeState, Array, Array]:
        state, _, tokens, num_new, _ = speculative_step(
            model, state, None, sampling_params, k, vocab, mtp_drafter, sync_without_drafts=True
        )
        return state, jnp.pad(tokens, ((0, 0), (0, width - k - 1))), num_new

    def body(carry: tuple[Array, DecodeState, Array, Array]) -> tuple[Array, DecodeState, Array, Array]:
        step, state, out, count = carry
        state, tokens, num_new = lax.switch(index, [partial(at_depth, k) for k in DEPTHS], state)
        rows = jnp.arange(width)
        places = jnp.where(rows < num_new[:, None], count[:, None] + rows, capacity)
        out = out.at[jnp.arange(batch)[:, None], places].set(tokens, mode="drop")
        return step + 1, state, out, count + num_new

    out, count = jnp.zeros((batch, capacity), jnp.int32), jnp.zeros(batch, jnp.int32)
    return lax.while_loop(lambda carry: carry[0] < STEPS, body, (jnp.int32(0), state, out, count))


def started() -> tuple[ModelRunner, DecodeState, Any]:
    """Return the runner, the state after a prompt, and parameters of a text that does not end."""
    llm = LLM(num_speculative_tokens=DEPTHS[-1], dtype="float32", max_model_len=512, max_num_seqs=1)
    assert llm.tokenizer is not None
    runner = llm.engine.runner
    request = Request(0, tuple(excerpts(llm.tokenizer)[0]), ENDLESS, 0.0, 0)
    scheduler = Scheduler([request], 1)
    batch = DecodeBatch(runner, 1, scheduler.prefill_batch)
    group = scheduler.admit()
    assert group is not None
    batch.prefill(group, scheduler.requests_by_slot)
    assert batch.state is not None
    return runner, batch.state, stack_requests([request])


def compile_program(fn: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """Return a program, and the seconds of the processor and of the clock that it took to make."""

    def processor() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    before, start = processor(), time.perf_counter()
    compiled = jax.jit(fn, donate_argnames=DECODE_DONATED).lower(*args).compile()
    return compiled, processor() - before, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    runner, state, params = started()
    weights, graph, vocab = runner.model.params, runner.model.graph, runner.vocab_size
    kept = jax.tree.map(np.array, state)
    limits = np.array(1, np.int32), np.array(STEPS, np.int32)

    own: dict[int, Any] = {}
    for k in DEPTHS:
        options: dict[str, Any] = {"num_speculative_tokens": k, "max_steps": STEPS, "vocab_size": vocab}
        options["sync_without_drafts"] = k == 0
        own[k], processor, seconds = compile_program(
            partial(decode, graph=graph, **options), weights, state, params, *limits
        )
        print(f"depth {k}: compiled in {processor:.1f} s of the processor, {seconds:.1f} s", flush=True)
    step = partial(switched, graph=graph, vocab=vocab)
    one, processor, seconds = compile_program(step, weights, state, params, jnp.int32(0))
    print(f"all in one: compiled in {processor:.1f} s of the processor, {seconds:.1f} s", flush=True)

    def timed(program: Program) -> float:
        fresh = jax.block_until_ready(jax.tree.map(jnp.array, kept))
        start = time.perf_counter()
        jax.block_until_ready(program(fresh))
        return time.perf_counter() - start

    for i, k in enumerate(DEPTHS):
        index, ratios, best = jnp.int32(i), list[float](), float("inf")
        for _ in range(args.repeats):
            alone = timed(lambda state, k=k: own[k](weights, state, params, *limits))  # type: ignore[misc]
            switch = timed(lambda state, index=index: one(weights, state, params, index))  # type: ignore[misc]
            ratios.append(switch / alone)
            best = min(best, alone)
        print(f"depth {k}: {1e3 * best / STEPS:.3f} ms a round; with a switch {statistics.median(ratios):.2f} times")


if __name__ == "__main__":
    main()
