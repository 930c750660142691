"""A batch job of texts of very unequal length: slots filled again as they fall free, and batches formed once, alternating.

    python -m scripts.benchmarks.bench_batch [--batch 8 32] [--json FILE]

Stories from the embedded model, each cut at a length drawn from a log-normal distribution. Compilation is not counted.
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


def run(llm: LLM, lengths: list[int]) -> tuple[dict[str, float], list[list[int]]]:
    """Figures of the job, and its texts."""
    prompts = [llm.chat_prompt([{"role": "user", "content": STORIES[i % len(STORIES)]}]) for i in range(len(lengths))]
    params = [llm.get_default_sampling_params(max_tokens=n, seed=i, ignore_eos=True) for i, n in enumerate(lengths)]
    engine = llm.engine
    began, prefill, decode, slots = (
        engine.seconds_without_compile(),
        engine.prefill_seconds,
        engine.decode_seconds,
        engine.slot_steps,
    )
    outputs = llm.generate(prompts, params)
    seconds = engine.seconds_without_compile() - began
    figures = {
        "tokens_per_second": sum(len(o.token_ids) for o in outputs) / seconds,
        "busy": sum(o.metrics.num_steps for o in outputs) / (engine.slot_steps - slots),
        "prefill_seconds": engine.prefill_seconds - prefill,
        "decode_seconds": engine.decode_seconds - decode,
    }
    return figures, [o.token_ids for o in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--draft", type=int, default=4)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    drawn = np.random.default_rng(0).lognormal(4, 1, args.requests)
    lengths = np.clip(drawn, 4, args.longest).astype(int).tolist()
    rows: list[dict[str, Any]] = []
    for dtype, batch in itertools.product(args.dtype, args.batch):
        ways = {"formed once": batch, "admit a quarter": max(1, batch // 4), "admit one": 1}
        sides = {
            name: LLM(
                args.model,
                num_speculative_tokens=args.draft,
                dtype=dtype,
                max_model_len=args.longest + 64,
                max_num_seqs=batch,
                max_prefill_seqs=admit,
            )
            for name, admit in ways.items()
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        texts = {}
        for repeat in range(args.repeats + 1):
            for name, llm in sides.items():
                figures, texts[name] = run(llm, lengths)
                if repeat:  # the first compiles
                    found[name].append(figures)
        same = [texts[name] == texts["formed once"] for name in sides]
        for (name, each), equal in zip(found.items(), same, strict=True):
            base = found["formed once"]
            ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(each, base, strict=True)]
            row = {
                "dtype": dtype, "batch": batch, "side": name, "admit": ways[name], "same_text": equal,
                **{figure: statistics.median(e[figure] for e in each) for figure in each[0]},
                "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
            }  # fmt: skip
            rows.append(row)
            print(
                f"{dtype}  batch {batch}  {name:15}: {row['tokens_per_second']:8.1f} tokens/s, slots {row['busy']:.0%} busy, "
                f"{row['ratio']:.2f} x formed once ({min(ratios):.2f} to {max(ratios):.2f}), "
                f"text {'the same' if equal else 'another'}",
                flush=True,
            )
    if args.json:
        about = {"draft": args.draft, "tokens": lengths, "repeats": args.repeats, "acceptance": "real"}
        write_json(args.json, {"what": "a batch job of unequal texts", **describe(), **about, "rows": rows})


if __name__ == "__main__":
    main()
