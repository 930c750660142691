"""Throughput of a batch of unequal requests with features of `SamplingParams` on, against the same batch without.

    python -m scripts.benchmarks.bench_features [--json docs/benchmarks/features.json]

All variants take turns on one engine, so the programs of all are compiled before the clock runs. Tokens a second are
those of whole calls of `generate`, reading of prompts included. "all" has every feature in every request but structured
outputs, which one request in four has.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from mtpjax import LLM, SamplingParams, StructuredOutputs
from scripts.benchmarks.demo_prompts import prompts_by_domain
from scripts.benchmarks.results import describe, write_json

FEATURES: dict[str, dict[str, Any]] = {
    "off": {},
    "stop strings": {"stop": ["\n\n", "zzz"]},
    "logprobs=5": {"logprobs": 5},
    "penalties": {"presence_penalty": 0.1, "repetition_penalty": 1.02},
    "logit bias": {"logit_bias": {7: 0.5, 300: -1.0}},
    "bad words, min_tokens": {"bad_words": ["zebra", "quixotic"], "min_tokens": 4},
    "structured": {"structured_outputs": StructuredOutputs(regex=r"[\s\S]*")},
}


def options_of(variant: str, index: int) -> dict[str, Any]:
    """Return the parameters of one request."""
    if variant != "all":
        return FEATURES[variant]
    merged = {key: value for options in FEATURES.values() for key, value in options.items()}
    if index % 4:
        del merged["structured_outputs"]
    return merged


def run(llm: LLM, prompts: list[list[int]], variant: str) -> float:
    """Return the tokens a second of one call, without compilation."""
    rng = np.random.default_rng(0)
    params = [
        SamplingParams(max_tokens=int(rng.integers(16, 97)), temperature=0.8, seed=i, **options_of(variant, i))
        for i in range(len(prompts))
    ]
    before, start = llm.engine.compile_seconds, time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start - (llm.engine.compile_seconds - before)
    return sum(len(output.token_ids) for output in outputs) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    variants = [*FEATURES, "all"]
    # An engine each: one engine would run "logprobs" on the program of "all", which has more than it needs.
    engines = {v: LLM(dtype="float32", max_model_len=384, max_num_seqs=args.slots) for v in variants}
    some = [ids for domain in prompts_by_domain(engines["off"], 8).values() for ids in domain]
    prompts = [some[i % len(some)][: 20 + 7 * i % 60] for i in range(args.requests)]
    for variant, llm in engines.items():
        run(llm, prompts, variant)
    speeds: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(args.repeats):
        for variant in variants if repeat % 2 else reversed(variants):
            speeds[variant].append(run(engines[variant], prompts, variant))
    rows = []
    print("| features | tokens/s | ÷ off | programs |\n|---|---|---|---|")
    for variant in variants:
        ratio = statistics.median(a / b for a, b in zip(speeds[variant], speeds["off"], strict=True))
        speed, programs = statistics.median(speeds[variant]), engines[variant].engine.num_programs
        rows.append({"features": variant, "tokens_per_second": speed, "to_off": ratio, "programs": programs})
        print(f"| {variant} | {speed:,.0f} | {ratio:.2f} | {programs} |")
    if args.json:
        content = {"what": "throughput with features of SamplingParams", **describe()}
        write_json(args.json, content | {"requests": args.requests, "slots": args.slots, "rows": rows})


if __name__ == "__main__":
    main()
