"""A batch job of texts of very unequal length: continuous batching compared with static batches, taking turns.

    python -m scripts.benchmarks.bench_batch [--max-num-seqs 8 32] [--json FILE]

The texts are stories of the embedded model, each cut at a length drawn from a log-normal distribution. With continuous
batching, slots are refilled as sequences end; static batches are formed once. Compilation is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import numpy as np

from checkpoints import TINY
from mtpjax import LLM
from scripts.benchmarks.demo_prompts import STORIES
from scripts.benchmarks.results import describe, write_json

STATIC = "formed once"


def run(llm: LLM, lengths: list[int]) -> tuple[dict[str, float], list[list[int]]]:
    """Return the figures of a job with a text of each length, and the token ids of its texts."""
    prompts = [llm.chat_prompt([{"role": "user", "content": STORIES[i % len(STORIES)]}]) for i in range(len(lengths))]
    params = [llm.get_default_sampling_params(max_tokens=n, seed=i, ignore_eos=True) for i, n in enumerate(lengths)]
    engine = llm.engine
    start, slot_steps = engine.seconds_without_compile(), engine.slot_steps
    prefill_seconds, decode_seconds = engine.prefill_seconds, engine.decode_seconds
    outputs = llm.generate(prompts, params)
    seconds = engine.seconds_without_compile() - start
    figures = {
        "tokens_per_second": sum(len(o.token_ids) for o in outputs) / seconds,
        "busy": sum(o.metrics.num_steps for o in outputs) / (engine.slot_steps - slot_steps),
        "prefill_seconds": engine.prefill_seconds - prefill_seconds,
        "decode_seconds": engine.decode_seconds - decode_seconds,
    }
    return figures, [o.token_ids for o in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--model", default=str(TINY))
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    add("--max-num-seqs", type=int, nargs="+", default=[8, 32], help="sequences that are generated at the same time")
    add("--num-speculative-tokens", type=int, default=4)
    add("--num-prompts", type=int, default=96)
    add("--max-tokens", type=int, default=256, help="length of the longest text")
    add("--repeats", type=int, default=5)
    add("--json", help="write the figures to this file")
    args = parser.parse_args()
    drawn = np.random.default_rng(0).lognormal(4, 1, args.num_prompts)
    lengths = np.clip(drawn, 4, args.max_tokens).astype(int).tolist()
    rows: list[dict[str, Any]] = []
    for dtype, batch in itertools.product(args.dtype, args.max_num_seqs):
        max_prefill_seqs = {STATIC: batch, "admit a quarter": max(1, batch // 4), "admit one": 1}
        variants = {
            name: LLM(
                args.model,
                num_speculative_tokens=args.num_speculative_tokens,
                dtype=dtype,
                max_model_len=args.max_tokens + 64,
                max_num_seqs=batch,
                max_prefill_seqs=count,
            )
            for name, count in max_prefill_seqs.items()
        }
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        texts = {}
        for repeat in range(args.repeats + 1):
            for name, llm in variants.items():
                figures, texts[name] = run(llm, lengths)
                if repeat:  # the first one compiles
                    measured[name].append(figures)
        for name, runs in measured.items():
            base, same_text = measured[STATIC], texts[name] == texts[STATIC]
            ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs, base, strict=True)]
            row = {
                "dtype": dtype,
                "batch": batch,
                "side": name,
                "admit": max_prefill_seqs[name],
                "same_text": same_text,
                **{figure: statistics.median(r[figure] for r in runs) for figure in runs[0]},
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
            rows.append(row)
            print(
                f"{dtype}  batch {batch}  {name:15}: {row['tokens_per_second']:8.1f} tokens/s, "
                f"slots {row['busy']:.0%} busy, {row['ratio']:.2f} x formed once "
                f"({min(ratios):.2f} to {max(ratios):.2f}), text {'the same' if same_text else 'another'}",
                flush=True,
            )
    if args.json:
        about = {
            "draft": args.num_speculative_tokens,
            "tokens": lengths,
            "repeats": args.repeats,
            "acceptance": "real",
        }
        write_json(args.json, {"what": "a batch job of unequal texts", **describe(), **about, "rows": rows})


if __name__ == "__main__":
    main()
