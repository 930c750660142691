"""What the MTP head costs while a prompt is read: prefill throughput with it, without it, and with every row an output row.

    python -m scripts.benchmarks.bench_prefill --runs 5 --json docs/benchmarks/prefill.json

"MTP off" is measured twice. As the engine runs it, nothing reads the trunk's last rows, and what only they need is left
out: queries, attention and experts of the last layer, 1 / layers of the work. "Whole layers" keeps them, as
engines do that run every layer for every row. What the MTP head itself does is the difference to the latter.

"MTP on" is measured twice as well: with a head that reads the whole prompt, and with `LLM(mtp_prompt_tokens=64)`, whose chunks but the
last are those of MTP off.

A random Mixture-of-Experts of about 50 M active parameters with a 32k vocabulary, batch 1. The sides take
turns chunk by chunk, so a drifting machine hits all alike; ratios are those within a run, and medians are quoted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.decoding.output_rows import NO_ROWS, OutputRows
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.random_init import random_model
from mtpjax.model.cache import new_cache, padded_kv_length
from scripts.benchmarks.jitted_steps import forward_hidden, prefill
from scripts.benchmarks.results import describe, ratio_table, write_json

CONFIG = ModelConfig(
    hidden_size=384, num_layers=12, layer_pattern=(LINEAR, LINEAR, LINEAR, FULL), q_heads=6, kv_heads=2, head_dim=64,
    rotary_dim=16, rope_theta=1e7, linear_k_heads=8, linear_v_heads=16, linear_k_dim=64, linear_v_dim=64, conv_width=4, vocab_size=32768,
    num_experts=16, experts_per_token=4, expert_size=512, shared_expert_size=512, mtp_layers=1,
)  # fmt: skip
DEEP = replace(  # as deep as the 35B-A3B, and as narrow as that takes
    CONFIG, num_layers=40, hidden_size=256, linear_k_heads=4, linear_v_heads=8, expert_size=192, shared_expert_size=192
)
READ = 64
OFF, WHOLE, ON, ALL = "MTP off", "MTP off, whole layers", "MTP on", "MTP on, rows = all"
PART = f"MTP on, last {READ} tokens"


class Side:
    """One way to read prompts; time adds up chunk by chunk, so that the sides can take turns within a prompt."""

    def __init__(
        self,
        cfg: ModelConfig,
        chunk: int,
        max_len: int,
        rows: OutputRows = NO_ROWS,
        whole: bool = False,
        read: int | None = None,
    ):
        self.model = optimize_for_cpu(random_model(cfg, dtype=jnp.float32))
        self.new = jax.jit(partial(new_cache, cfg, 1, padded_kv_length(max_len, 1)))
        self.pad = jnp.zeros(1, jnp.int32)
        self.step: Any = (
            partial(forward_hidden, graph=self.model.graph)
            if whole
            else partial(prefill, graph=self.model.graph, rows=rows)
        )
        self.whole, self.tapped = whole, read

    def begin(self, length: int) -> None:
        cache = self.new()
        if self.tapped is not None:
            cache = cache.replace(mtp_start_pos=jnp.full(1, max(0, length - self.tapped), jnp.int32))
        self.cache, self.seconds = jax.block_until_ready(cache), 0.0

    def read(self, tokens: np.ndarray, following: np.ndarray, behind: int) -> None:
        """One chunk, with `behind` tokens of the prompt behind it."""
        start = time.perf_counter()
        inputs = (tokens, self.pad) if self.whole else (tokens, following, self.pad)
        rows = {} if self.tapped is None else {"mtp_rows": max(0, min(self.tapped - behind, tokens.shape[1]))}
        out = jax.block_until_ready(self.step(self.model.params, *inputs, self.cache, **rows))
        self.seconds += time.perf_counter() - start
        self.cache = out[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--chunk", type=int, default=512, help="rows of a prompt chunk; divides the prompt lengths")
    parser.add_argument("--deep", action="store_true", help="40 layers of width 256 instead of 12 of width 384")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    cfg = DEEP if args.deep else CONFIG
    size, plain, longest = args.chunk, cfg.without_mtp(), max(args.prompts) + 8
    side = {
        OFF: Side(plain, size, longest),
        WHOLE: Side(plain, size, longest, whole=True),
        ON: Side(cfg, size, longest),
        PART: Side(cfg, size, longest, read=READ),
        ALL: Side(cfg, size, longest, OutputRows.all()),
    }
    figures: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for length in args.prompts:
        ids = np.random.default_rng(length).integers(0, cfg.vocab_size, (1, length + 1)).astype(np.int32)
        speed: dict[str, list[float]] = {name: [] for name in side}
        for run in range(args.runs + 1):  # the first is a warm-up
            for each in side.values():
                each.begin(length)
            # The warm-up reads the first and the last chunk: what is compiled for either is compiled then.
            starts = range(0, length, size) if run else sorted({0, length - size})
            for number, at in enumerate(starts):
                order = list(side.values())
                turn = (number + run) % len(order)
                for each in order[turn:] + order[:turn]:
                    each.read(ids[:, at : at + size], ids[:, at + 1 : at + size + 1], length - at - size)
            for name, each in side.items():
                if run:
                    speed[name].append(length / each.seconds)
        figures[f"prefill of {length} tokens, tok/s"] = speed
        ratios[str(length)] = {
            f"{name} / {base}": statistics.median(a / b for a, b in zip(speed[name], speed[base], strict=True))
            for base in (WHOLE, OFF)
            for name in (ON, PART, ALL)
        }
        print(f"{length} tokens: " + ", ".join(f"{n} = {r:.3f}" for n, r in ratios[str(length)].items()), flush=True)
    print(ratio_table(figures))
    if args.json:
        what = {"what": "prefill, MTP on / off", "layers": cfg.num_layers}
        write_json(args.json, what | describe() | {"figures": figures, "ratios": ratios})


if __name__ == "__main__":
    main()
