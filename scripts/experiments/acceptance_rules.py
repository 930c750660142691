"""The coupled rule against the rejection rule: acceptance and tokens a round of the embedded model.

    python -m scripts.experiments.acceptance_rules [--json docs/benchmarks/acceptance_rules.json]

Both rules get the same prompts, the embedded excerpts of books and requests for stories in chat, with the same seeds.
Their texts differ, and have the same distribution.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from mtpjax import LLM, RequestOutput, SamplingParams
from scripts.benchmarks.acceptance import figures_of
from scripts.benchmarks.demo_prompts import prompts_by_domain
from scripts.benchmarks.results import describe, write_json

RULES = ("coupled", "rejection")


def generate(
    llm: LLM, prompts: list[list[int]], *, seeds: int, max_tokens: int, temperature: float, ignore_eos: bool
) -> list[RequestOutput]:
    """Generate for every prompt with each of the first `seeds` seeds."""
    jobs = [
        (prompt, SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos))
        for prompt in prompts
        for seed in range(seeds)
    ]
    return llm.generate([prompt for prompt, _ in jobs], [params for _, params in jobs])


def standard_error(outputs: list[RequestOutput]) -> float:
    """Return the standard error of the tokens a round, from the differences between texts."""
    rounds = [o.metrics.num_steps for o in outputs]
    tokens = [o.metrics.num_steps + o.metrics.num_accepted_tokens for o in outputs]
    mean = sum(tokens) / sum(rounds)
    squares = sum((t - mean * r) ** 2 for t, r in zip(tokens, rounds, strict=True))
    return math.sqrt(squares) / sum(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--num-speculative-tokens", type=int, default=4)
    add("--temperature", type=float, nargs="+", default=[0.6, 1.0])
    add("--prompts", type=int, default=4, help="prompts of each domain")
    add("--seeds", type=int, default=8, help="texts of each prompt")
    add("--max-tokens", type=int, default=96)
    add("--max-num-seqs", type=int, default=8)
    add("--json", help="write the figures to this file")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for rule in RULES:
        llm = LLM(
            num_speculative_tokens=args.num_speculative_tokens,
            dtype="float32",
            max_model_len=384,
            max_num_seqs=args.max_num_seqs,
            acceptance=rule,
        )
        for domain, prompts in prompts_by_domain(llm, args.prompts).items():
            for temperature in args.temperature:
                outputs = generate(
                    llm,
                    prompts,
                    seeds=args.seeds,
                    max_tokens=args.max_tokens,
                    temperature=temperature,
                    ignore_eos=domain != "talk",
                )
                figures = figures_of(outputs, args.num_speculative_tokens)
                row = {"rule": rule, "domain": domain, "temperature": temperature} | figures
                row["tokens_per_round"] = 1 + sum(figures["accepted"])  # the last round may accept beyond the end
                row["standard_error"] = standard_error(outputs)
                rows.append(row)
    rows.sort(key=lambda r: (r["domain"], r["temperature"], RULES.index(r["rule"])))
    print("| prompts | T | rule | accepted, by position, if all before were | tokens a round |\n|---|---|---|---|---|")
    for row in rows:
        given = ", ".join(f"{100 * share:.0f} %" for share in row["accepted_given_earlier"])
        tokens = f"{row['tokens_per_round']:.2f} ± {row['standard_error']:.2f}"
        print(f"| {row['domain']} | {row['temperature']:g} | {row['rule']} | {given} | {tokens} |")
    if args.json:
        about = {"new": args.max_tokens, "seeds": args.seeds, "draft": args.num_speculative_tokens, "dtype": "float32"}
        write_json(args.json, {"what": "rules of acceptance", **describe(), **about, "rows": rows})


if __name__ == "__main__":
    main()
