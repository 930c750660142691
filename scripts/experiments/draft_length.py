"""Draft length 0 … 8 x temperature x domain: acceptance, tokens a round and decode speed of the embedded model.

    python -m scripts.experiments.draft_length

Acceptance is real.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, NamedTuple

from mtpjax import LLM, SamplingParams
from scripts.benchmarks.demo_prompts import prompts_by_domain
from scripts.experiments import experiment

PYTHON = (
    "def read_lines(path):\n    with open(path) as file:\n"
    "        return [line.strip() for line in file]\n\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items",
)


class Run(NamedTuple):
    """One run over all prompts of a domain, and how often the draft at each position was accepted."""

    seconds: float
    rounds: int
    tokens: int
    accepted: list[int]


def run_prompts(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Run:
    """Generate for one prompt after the other."""
    outputs = [llm.generate([prompt], params)[0] for prompt in prompts]
    metrics = [output.metrics for output in outputs]
    return Run(
        seconds=sum(m.decode_seconds for m in metrics),
        rounds=sum(m.num_steps for m in metrics),
        tokens=sum(len(output.token_ids) for output in outputs),
        accepted=[sum(m.num_accepted_tokens_per_pos[i] for m in metrics) for i in range(llm.num_speculative_tokens)],
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return a row for each domain, temperature and draft length.

    A story in chat ends by itself; other texts end at a length.
    """
    drafts, max_tokens, repeats = ((0, 2), 16, 1) if args.smoke else (tuple(range(9)), 96, 5)
    variants = {k: LLM(num_speculative_tokens=k, max_model_len=384, max_num_seqs=1, dtype="bfloat16") for k in drafts}
    tokenizer = variants[0].tokenizer
    assert tokenizer is not None
    domains = prompts_by_domain(variants[0], 1 if args.smoke else 4)
    domains["python"] = [tokenizer.encode(text) for text in PYTHON]
    rows: list[dict[str, Any]] = []
    for domain, prompts in domains.items():
        for temperature in (0.0, 0.7):
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=domain != "talk")
            measured: dict[int, list[Run]] = {k: [] for k in drafts}
            for repeat in range(repeats + 1):
                for k, llm in variants.items():
                    run = run_prompts(llm, prompts, params)
                    if repeat:  # the first one compiles
                        measured[k].append(run)
            for k, runs in measured.items():
                ratios = [
                    base.seconds / run.seconds * run.tokens / base.tokens
                    for run, base in zip(runs, measured[0], strict=True)
                ]
                row = {
                    "domain": domain,
                    "temperature": temperature,
                    "draft": k,
                    "seconds": [run.seconds for run in runs],
                    "tokens_per_round": runs[0].tokens / runs[0].rounds,
                    "accepted": [count / runs[0].rounds for count in runs[0].accepted],
                    "speed_ratio": statistics.median(ratios),
                }
                rows.append(row)
                figures = f"{row['tokens_per_round']:.2f} tokens a round, {row['speed_ratio']:.2f} x speed"
                print(f"{domain:7} T {temperature:g} draft {k}: {figures}", flush=True)
    return {"new": max_tokens, "dtype": "bfloat16", "acceptance": "real", "table": rows}


def plot(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for domain in dict.fromkeys(r["domain"] for r in result["table"]):
        for temperature, style in ((0.0, "o-"), (0.7, "s--")):
            rows = [r for r in result["table"] if r["domain"] == domain and r["temperature"] == temperature]
            drafts, label = [r["draft"] for r in rows], f"{domain}, T = {temperature:g}"
            for axis, key in ((left, "tokens_per_round"), (right, "speed_ratio")):
                axis.plot(drafts, [r[key] for r in rows], style, label=label)
    left.set_ylabel("tokens a round")
    right.set_ylabel("decode speed ÷ draft 0")
    right.axhline(1, color="grey", lw=0.8)
    for axis in (left, right):
        axis.set_xlabel("draft length (tokens)")
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"Embedded model on {result['device']}, batch 1, {result['dtype']}, real acceptance")


if __name__ == "__main__":
    experiment.run("draft_length", __doc__, measure, plot)
