"""What the MTP head costs while a prompt is read: prefill throughput with it, without it, and with every row an output row.

    python scripts/bench_prefill.py --runs 5 --json docs/benchmarks/prefill.json

A random Mixture-of-Experts of about 50 M active parameters with a 32k vocabulary, batch 1. The sides alternate inside one
run, so a drifting machine hits all alike; ratios are those of neighbouring runs, and medians are quoted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from results import describe, ratio_table, write_json

from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.engine import Engine
from mtpjax.loading import storage
from mtpjax.rows import OutputRows
from mtpjax.weights import random_model

CONFIG = ModelConfig(
    hidden_size=384, layers=12, pattern=(LINEAR, LINEAR, LINEAR, FULL), q_heads=6, kv_heads=2, head_dim=64, rotary_dim=16,
    rope_theta=1e7, linear_k_heads=8, linear_v_heads=16, linear_k_dim=64, linear_v_dim=64, conv_width=4, vocab_size=32768,
    experts=16, experts_per_token=4, expert_size=512, shared_expert_size=512, mtp_layers=1,
)  # fmt: skip
OFF, ON, ALL = "MTP off", "MTP on", "MTP on, rows = all"


def sides(max_len: int, chunk: int) -> dict[str, Callable[[list[int]], float]]:
    """Seconds to read a prompt, by side; compilation excluded."""

    def side(cfg: ModelConfig, rows: OutputRows) -> Callable[[list[int]], float]:
        model = random_model(cfg, **storage(jnp.float32, cfg))
        engine = Engine(
            model,
            draft=cfg.mtp_layers,
            max_len=max_len,
            vocab=cfg.vocab_size,
            cache_dtype=jnp.float32,
            buckets=(chunk,),
        )

        def run(prompt: list[int]) -> float:
            compiled, start = engine.compile_seconds, time.perf_counter()
            jax.block_until_ready(engine.read([prompt], rows)[:2])
            return time.perf_counter() - start - (engine.compile_seconds - compiled)

        return run

    return {
        OFF: side(CONFIG.without_mtp(), OutputRows.none()),
        ON: side(CONFIG, OutputRows.none()),
        ALL: side(CONFIG, OutputRows.all()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--chunk", type=int, default=512, help="rows of a prompt chunk")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    side = sides(max(args.prompts) + 8, args.chunk)
    figures: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for length in args.prompts:
        prompt = np.random.default_rng(length).integers(0, CONFIG.vocab_size, length).tolist()
        speed: dict[str, list[float]] = {name: [] for name in side}
        for run in range(args.runs + 1):  # the first is a warm-up
            order = list(side) if run % 2 else list(side)[::-1]
            for name in order:
                seconds = side[name](prompt)
                if run:
                    speed[name].append(length / seconds)
        figures[f"prefill of {length} tokens, tok/s"] = speed
        ratios[str(length)] = {
            name: statistics.median(a / b for a, b in zip(speed[name], speed[OFF], strict=True)) for name in (ON, ALL)
        }
        print(
            f"{length} tokens: " + ", ".join(f"{n} / {OFF} = {r:.3f}" for n, r in ratios[str(length)].items()),
            flush=True,
        )
    print(ratio_table(figures))
    if args.json:
        write_json(
            args.json, {"what": "prefill, MTP on / off", **describe(), "figures": figures, "ratio_to_off": ratios}
        )


if __name__ == "__main__":
    main()
