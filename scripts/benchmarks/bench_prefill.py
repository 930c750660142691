"""Cost of the MTP head while a prompt is read: prefill speed with it, without it, and with every row an output row.

    python -m scripts.benchmarks.bench_prefill --runs 5 --json docs/benchmarks/prefill.json

"MTP off" is measured twice. In the first program, the one of the engine, nothing reads the trunk's last rows, so the
queries, attention and experts of the last layer are left out: 1 / layers of the work. "Whole layers" keeps them, like
engines that run every layer for every row. The difference to the latter is the MTP head's own work.

"MTP on" is measured twice as well: with a head that reads the whole prompt, and with `LLM(mtp_prompt_tokens=64)`, where
all chunks but the last are those of MTP off.

The model is a random Mixture-of-Experts with about 50 M active parameters and a 32k vocabulary, batch 1. The variants
take turns chunk by chunk, so a drifting machine affects all of them alike. Ratios are taken within a run, and their
medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpjax.config import ModelConfig
from mtpjax.decoding.output_rows import NO_ROWS, OutputRows
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.random_init import random_model
from mtpjax.model.cache import new_cache, padded_kv_length
from scripts.benchmarks.jitted_steps import forward_hidden, prefill
from scripts.benchmarks.random_models import MOE_40_LAYERS, MOE_50M_ACTIVE
from scripts.benchmarks.results import describe, ratio_table, write_json

MTP_PROMPT_TOKENS = 64
OFF, WHOLE, ON, ALL = "MTP off", "MTP off, whole layers", "MTP on", "MTP on, rows = all"
LAST_TOKENS = f"MTP on, last {MTP_PROMPT_TOKENS} tokens"


class PrefillVariant:
    """One way to read prompts. Its seconds add up chunk by chunk, so variants can take turns within a prompt.

    Args:
        max_len: tokens of the longest prompt.
        rows: the output rows of each chunk.
        whole_layers: run every layer on every row, without a head.
        mtp_prompt_tokens: how many of the last prompt tokens the MTP head reads; None: all.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        max_len: int,
        rows: OutputRows = NO_ROWS,
        whole_layers: bool = False,
        mtp_prompt_tokens: int | None = None,
    ):
        self.model = optimize_for_cpu(random_model(cfg, dtype=jnp.dtype(jnp.float32)))
        self.new_cache = jax.jit(partial(new_cache, cfg, 1, padded_kv_length(max_len, 1)))
        self.pad = jnp.zeros(1, jnp.int32)
        self.step: Any = (
            partial(forward_hidden, graph=self.model.graph)
            if whole_layers
            else partial(prefill, graph=self.model.graph, rows=rows)
        )
        self.whole_layers, self.mtp_prompt_tokens = whole_layers, mtp_prompt_tokens
        self.cache: Any = None
        self.seconds = 0.0

    def begin(self, length: int) -> None:
        """Make an empty cache for a prompt of `length` tokens."""
        cache = self.new_cache()
        if self.mtp_prompt_tokens is not None:
            cache = cache.replace(mtp_start_pos=jnp.full(1, max(0, length - self.mtp_prompt_tokens), jnp.int32))
        self.cache, self.seconds = jax.block_until_ready(cache), 0.0

    def read(self, tokens: np.ndarray, next_tokens: np.ndarray, num_tokens_after: int) -> None:
        """Read one chunk `[1, T]`, which `num_tokens_after` tokens of the prompt follow."""
        start = time.perf_counter()
        inputs = (tokens, self.pad) if self.whole_layers else (tokens, next_tokens, self.pad)
        options = {}
        if self.mtp_prompt_tokens is not None:
            options["mtp_rows"] = max(0, min(self.mtp_prompt_tokens - num_tokens_after, tokens.shape[1]))
        out = jax.block_until_ready(self.step(self.model.params, *inputs, self.cache, **options))
        self.seconds += time.perf_counter() - start
        self.cache = out[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 2048, 8192], help="prompt lengths")
    parser.add_argument("--chunk", type=int, default=512, help="rows of a prompt chunk; divides the prompt lengths")
    parser.add_argument("--deep", action="store_true", help="40 layers of width 256 instead of 12 of width 384")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    cfg = MOE_40_LAYERS if args.deep else MOE_50M_ACTIVE
    chunk, trunk, longest = args.chunk, cfg.without_mtp(), max(args.prompt_tokens) + 8
    variants = {
        OFF: PrefillVariant(trunk, longest),
        WHOLE: PrefillVariant(trunk, longest, whole_layers=True),
        ON: PrefillVariant(cfg, longest),
        LAST_TOKENS: PrefillVariant(cfg, longest, mtp_prompt_tokens=MTP_PROMPT_TOKENS),
        ALL: PrefillVariant(cfg, longest, OutputRows.all()),
    }
    figures: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for length in args.prompt_tokens:
        ids = np.random.default_rng(length).integers(0, cfg.vocab_size, (1, length + 1)).astype(np.int32)
        speeds: dict[str, list[float]] = {name: [] for name in variants}
        for run in range(args.runs + 1):  # the first is a warm-up
            for variant in variants.values():
                variant.begin(length)
            # The warm-up reads the first and the last chunk, which compiles the programs of both.
            starts = range(0, length, chunk) if run else sorted({0, length - chunk})
            for number, at in enumerate(starts):
                order = list(variants.values())
                first = (number + run) % len(order)
                for variant in order[first:] + order[:first]:
                    tokens, next_tokens = ids[:, at : at + chunk], ids[:, at + 1 : at + chunk + 1]
                    variant.read(tokens, next_tokens, length - at - chunk)
            for name, variant in variants.items():
                if run:
                    speeds[name].append(length / variant.seconds)
        figures[f"prefill of {length} tokens, tok/s"] = speeds
        ratios[str(length)] = {
            f"{name} / {base}": statistics.median(a / b for a, b in zip(speeds[name], speeds[base], strict=True))
            for base in (WHOLE, OFF)
            for name in (ON, LAST_TOKENS, ALL)
        }
        print(f"{length} tokens: " + ", ".join(f"{n} = {r:.3f}" for n, r in ratios[str(length)].items()), flush=True)
    print(ratio_table(figures))
    if args.json:
        about = {"what": "prefill, MTP on / off", "layers": cfg.num_layers}
        write_json(args.json, about | describe() | {"figures": figures, "ratios": ratios})


if __name__ == "__main__":
    main()
