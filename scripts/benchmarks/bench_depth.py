"""Speed with `num_speculative_tokens="auto"` against fixed numbers of drafts; all of them take turns in one process.

    python -m scripts.benchmarks.bench_depth [--json docs/benchmarks/depth.json]
    python -m scripts.benchmarks.bench_depth --small

Prompts are requests for stories in chat, excerpts of books (or windows of `--text`) and beginnings of Python files. A
batch of N has N prompts, repeated with other seeds where there are fewer. Seconds are those of a whole `generate`
without prompts and compilation, so the host's choice of depths counts. What "auto" measures when it starts does not.
A ratio compares neighbours in time; the table has medians. "best" is the fixed depth that is hardest to reach.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from scripts.benchmarks.bench_decode import text_windows
from scripts.benchmarks.demo_prompts import prompts_by_domain
from scripts.benchmarks.results import describe, write_json
from scripts.experiments.draft_length import PYTHON

Side = int | str  # drafts of a step, or "auto"
AUTO = "auto"
MAX_WARM_UP_RUNS = 40


def prompts_of(llm: LLM, files: list[str], count: int) -> dict[str, list[list[int]]]:
    """Return `count` prompts of each domain, as token ids."""
    assert llm.tokenizer is not None
    domains = prompts_by_domain(llm, 4)
    found = {"stories": domains["talk"], "books": domains["books"]}
    if files:
        found["books"] = text_windows(llm, files, count, 64)["text"]
    found["code"] = [llm.tokenizer.encode(text) for text in PYTHON]
    return {name: [prompts[i % len(prompts)] for i in range(count)] for name, prompts in found.items()}


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> dict[str, float]:
    """Return the tokens per second of one call, and the drafts and tokens of a round."""
    engine = llm.engine
    before, start = engine.prefill_seconds + engine.compile_seconds, time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start - (engine.prefill_seconds + engine.compile_seconds - before)
    rounds = sum(o.metrics.num_steps for o in outputs)
    tokens = sum(len(o.token_ids) for o in outputs)
    drafts = sum(o.metrics.num_draft_tokens for o in outputs)
    return {"tokens_per_second": tokens / seconds, "drafts": drafts / rounds, "tokens_per_round": tokens / rounds}


def warm_up(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> None:
    """Compile, and let "auto" measure its depths."""
    for _ in range(MAX_WARM_UP_RUNS):
        run(llm, prompts, params)
        depths = llm.engine.depths
        if depths is None or not depths.costs(len(prompts)).to_measure:
            return
    raise RuntimeError(f"{MAX_WARM_UP_RUNS} runs have not measured every depth; raise --max-tokens")


def compare(
    sides: dict[Side, LLM], prompts: list[list[int]], params: list[SamplingParams], repeats: int
) -> dict[str, Any]:
    """Let all sides take turns. Returns medians of their speeds and of the ratios of "auto" to each of the others."""
    measured: dict[Side, list[dict[str, float]]] = {side: [] for side in sides}
    for llm in sides.values():
        run(llm, prompts, params)
    for repeat in range(repeats):
        order = list(sides) if repeat % 2 else list(reversed(sides))
        for side in order:
            measured[side].append(run(sides[side], prompts, params))
    speeds = {side: [r["tokens_per_second"] for r in runs] for side, runs in measured.items()}
    ratios = {side: [a / b for a, b in zip(speeds[AUTO], speeds[side], strict=True)] for side in sides if side != AUTO}
    medians = {side: statistics.median(values) for side, values in ratios.items()}
    best = min(medians, key=lambda side: medians[side])
    return {
        "tokens_per_second": {str(side): statistics.median(values) for side, values in speeds.items()},
        "ratios": {str(side): values for side, values in ratios.items()},
        "auto_to_none": medians[0],
        "best": best,
        "auto_to_best": medians[best],
        "drafts": statistics.fmean(r["drafts"] for r in measured[AUTO]),
        "tokens_per_round": statistics.fmean(r["tokens_per_round"] for r in measured[AUTO]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| batch | prompts | T | drafts a round | auto ÷ none | best fixed | auto ÷ best | lowest … highest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = row["ratios"][str(row["best"])]
        lines.append(
            f"| {row['batch']} | {row['domain']} | {row['temperature']:g} | {row['drafts']:.1f} | "
            f"{row['auto_to_none']:.2f} | {row['best']} | {row['auto_to_best']:.2f} | "
            f"{min(runs):.2f} … {max(runs):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--model", default=str(TINY))
    add("--text", nargs="*", default=[], help="UTF-8 files to cut the prompts of books from")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--fixed", type=int, nargs="+", default=[0, 1, 3, 6], help="fixed numbers of drafts; 0 must be among them")
    add("--max-speculative-tokens", type=int, default=6, help="maximum of auto")
    add("--batch", type=int, nargs="+", default=[1, 8, 32])
    add("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    add("--max-tokens", type=int, default=256)
    add("--repeats", type=int, default=7)
    add("--small", action="store_true", help="a batch of one, two temperatures, short texts, three repeats")
    add("--json", help="write the figures to this file")
    args = parser.parse_args()
    if 0 not in args.fixed:
        parser.error("--fixed must have 0, which the other sides are compared with")
    if args.small:
        args.batch, args.temperature, args.max_tokens, args.repeats = [1], [0.0, 1.0], 96, 3

    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        options: dict[str, Any] = {"dtype": args.dtype, "max_model_len": 512, "max_num_seqs": batch}
        sides: dict[Side, LLM] = {k: LLM(args.model, num_speculative_tokens=k, **options) for k in args.fixed}
        auto = {"num_speculative_tokens": AUTO, "max_speculative_tokens": args.max_speculative_tokens}
        sides[AUTO] = LLM(args.model, **auto, **options)
        domains = prompts_of(sides[0], args.text, batch)
        for number, (domain, temperature) in enumerate(itertools.product(domains, args.temperature)):
            params = [
                SamplingParams(
                    max_tokens=args.max_tokens, temperature=temperature, seed=seed, ignore_eos=domain != "stories"
                )
                for seed in range(batch)
            ]
            if not number:
                for llm in sides.values():
                    warm_up(llm, domains[domain], params)
            row = {"batch": batch, "domain": domain, "temperature": temperature}
            rows.append(row | compare(sides, domains[domain], params, args.repeats))
            print(table(rows).splitlines()[-1], flush=True)
    print(table(rows))
    least = min(row["auto_to_none"] for row in rows), min(row["auto_to_best"] for row in rows)
    print(f"auto: at least {least[0]:.2f} times the speed of no drafts, {least[1]:.2f} times that of the best number")
    if args.json:
        about = {
            "new": args.max_tokens,
            "repeats": args.repeats,
            "dtype": args.dtype,
            "fixed": args.fixed,
            "max_speculative_tokens": args.max_speculative_tokens,
        }
        write_json(args.json, {"what": "depth of drafts", **describe(), **about, "rows": rows})


if __name__ == "__main__":
    main()
