"""How often XLA compiles: once for each length of prompt chunk, and a few programs more."""

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mtpjax import LLM, SamplingParams
from tests.helpers.models import numpy_model, tiny_config

COMPILED = "/jax/core/compile/backend_compile_duration"  # of every program, those of single operations included
BUCKETS = (16, 32, 64)


@pytest.fixture
def events() -> Iterator[Counter[str]]:
    """How often jax reports each event while the test runs."""
    counts: Counter[str] = Counter()

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        counts[event] += 1

    jax.clear_caches()  # an operation that another test has compiled would not show
    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


def prompts(number: int, longest: int, vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(number)
    return [rng.integers(0, vocab, length).tolist() for length in rng.integers(1, longest, number, endpoint=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("num_speculative_tokens", "max_prefill_seqs", "others"), [(2, None, 4), (0, 3, 4), (2, 8, 2)])
def test_a_job_compiles_as_many_programs_as_chunk_lengths_and_a_few(
    events: Counter[str], num_speculative_tokens: int, max_prefill_seqs: int | None, others: int
) -> None:
    """The others are the loop and an empty cache; to refill slots also an empty cache for them and an insertion.

    Of whole batches of eight, those of the first call never need one of the chunk lengths.
    """
    model = numpy_model(tiny_config(moe=num_speculative_tokens > 0, num_superblocks=1))
    before = events[COMPILED]
    llm = LLM(
        model,
        num_speculative_tokens=num_speculative_tokens,
        max_model_len=240,
        max_num_seqs=8,
        max_prefill_seqs=max_prefill_seqs,
        prefill_buckets=BUCKETS,
    )
    job = prompts(100, 200, model.cfg.vocab_size)
    limits = [4 + n % 4 if n else 0 for n in range(len(job))]  # alike, so that prompts are read by their lengths
    sampling = [SamplingParams(max_tokens=m, temperature=0.5 * (n % 3), seed=n) for n, m in enumerate(limits)]
    assert len({len(p) for p in job}) > 60
    outputs = llm.generate(job, sampling)
    # A stop token ends a text before its limit.
    assert all(len(o.token_ids) == m or o.finish_reason == "stop" for o, m in zip(outputs, limits, strict=True))
    compiled = events[COMPILED] - before
    most = len(BUCKETS) + others
    assert compiled == llm.engine.num_programs == most - (max_prefill_seqs == 8)

    # Other prompts, other lengths, other sampling: nothing new, but a chunk length that was not needed before.
    for number, longest in ((9, 239), (20, 50)):
        llm.generate(prompts(number, longest, model.cfg.vocab_size), SamplingParams(max_tokens=1, temperature=1.0))
    assert events[COMPILED] - before == llm.engine.num_programs <= most


def test_the_count_sees_a_single_operation(events: Counter[str]) -> None:
    x = jax.device_put(np.ones(3, np.float32))
    before = events[COMPILED]
    _ = x + x
    assert events[COMPILED] == before + 1


CHILD = """
import json
from collections import Counter
import jax

seen = Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name]))

from tests.helpers.models import numpy_model, tiny_config
from mtpjax import LLM, SamplingParams

model = numpy_model(tiny_config(moe=True, num_superblocks=1))
seen.clear()
llm = LLM(model, num_speculative_tokens=2, max_model_len=64, max_num_seqs=2, prefill_buckets=(16,))
tokens = [o.token_ids for o in llm.generate([[5, 6, 7], [8] * 20], SamplingParams(max_tokens=9))]
cache = "/jax/compilation_cache/cache_"
counts = [seen[cache + "hits"], seen[cache + "misses"], llm.engine.num_programs]
print(json.dumps({"counts": counts, "tokens": tokens}))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run() -> dict[str, Any]:
        child = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, child.stderr
        return json.loads(child.stdout)

    first, second = run(), run()
    assert first["counts"] == [0, 3, 3]  # hits, misses, programs
    assert second["counts"] == [3, 0, 3]
    assert first["tokens"] == second["tokens"]


def test_programs_go_with_their_llm() -> None:
    """JAX keeps a program as long as the function that it wraps; a process that makes many LLMs must not keep theirs.

    Each holds hundreds of memory mappings, of which Linux gives a process 65,530.
    """
    model = numpy_model(tiny_config(moe=False, num_superblocks=1))

    def alive() -> int:
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    def use(max_model_len: int) -> int:
        llm = LLM(model, num_speculative_tokens=1, max_model_len=max_model_len)
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
        llm.hidden_states([1, 2, 3])
        return llm.engine.num_programs

    assert use(80) >= 4
    before = alive()
    for max_model_len in (100, 2000):
        use(max_model_len)
    assert alive() <= before
