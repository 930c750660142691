"""Shared prefixes with and without: tokens read, seconds, memory.

    python -m scripts.benchmarks.bench_prefix --json docs/benchmarks/prefix.json

Three cases: many prompts that differ in the last token, prompts with the same examples before their own question, and a
tree (a common instruction, documents, questions about each). Both sides take turns in one process after a warm-up that
compiles their programs; every round starts with an empty cache, so seconds include reading what is shared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from mtpjax import LLM, SamplingParams

Prompts = list[list[int]]


def cases(scale: float, vocab_size: int, seed: int = 0) -> dict[str, Prompts]:
    """Return the prompts of each case; `scale` multiplies how many there are, not their lengths."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, vocab_size, count).tolist()

    def number(count: int) -> int:
        return max(4, round(count * scale))

    last, shots, instruction = tokens(369), tokens(1000), tokens(300)
    tree = []
    for _ in range(max(2, round(10 * scale))):
        document = tokens(500)
        tree += [[*instruction, *document, *tokens(30)] for _ in range(10)]
    return {
        "370 tokens, 369 shared": [[*last, i % vocab_size] for i in range(number(2000))],
        "1,040 tokens, 1,000 shared": [[*shots, *tokens(40)] for _ in range(number(100))],
        "a tree: 300 shared by all, 500 by ten, 30 own": tree,
    }


def measure(llm: LLM, prompts: Prompts, max_tokens: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Generate once with an empty prefix cache. Returns the figures and the texts."""
    cache = llm.engine.prefix_cache
    assert cache is not None
    cache.clear()
    tokens, prefill, compiling = llm.engine.num_prompt_tokens, llm.engine.prefill_seconds, llm.engine.compile_seconds
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    figures = {
        "tokens_read": llm.engine.num_prompt_tokens - tokens,
        "prefill_seconds": llm.engine.prefill_seconds - prefill,
        "seconds": time.perf_counter() - start - (llm.engine.compile_seconds - compiling),
        "entries": len(cache.entries),
        "entry_bytes": cache.nbytes,
    }
    return figures, [output.token_ids for output in outputs]


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; without one the embedded model")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the prompts; 1 is all of them")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds; the one with the fewest seconds counts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common: dict[str, Any] = {"max_model_len": 1280, "max_num_seqs": args.max_num_seqs}
    common["num_speculative_tokens"] = args.drafts
    sides = {
        name: LLM(args.model, enable_prefix_caching=enable, **common)
        for name, enable in (("whole prompts", False), ("shared prefixes", True))
    }
    results: dict[str, Any] = {"arguments": {k: v for k, v in vars(args).items() if k != "json"}, "cases": {}}
    for case, prompts in cases(args.scale, next(iter(sides.values())).cfg.vocab_size).items():
        best, texts = dict[str, Any](), dict[str, list[list[int]]]()
        for round_number in range(args.rounds + 1):
            for side, llm in sides.items():
                figures, texts[side] = measure(llm, prompts, args.max_tokens)
                if round_number and (side not in best or figures["seconds"] < best[side]["seconds"]):
                    best[side] = figures
        different = sum(a != b for a, b in zip(*texts.values(), strict=True))
        row = {"prompts": len(prompts), "prompt_tokens": sum(map(len, prompts)), "texts_that_differ": different}
        results["cases"][case] = row | best
        print(case, json.dumps(row | best, indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
