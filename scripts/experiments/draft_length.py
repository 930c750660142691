"""Draft length 0...8 x temperature x domain: acceptance, tokens a round and decode speed of the embedded model, real acceptance.

python -m scripts.experiments.draft_length
"""

from __future__ import annotations

import statistics
from typing import Any

from mtpjax import LLM, SamplingParams
from scripts.benchmarks.demo_prompts import by_domain
from scripts.experiments import common

PYTHON = (
    "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items",
)


def experiment(smoke: bool) -> dict[str, Any]:
    """A row for each domain, temperature and draft length. A story in chat ends by itself; other text at a length."""
    drafts, new, repeats = ((0, 2), 16, 1) if smoke else (tuple(range(9)), 96, 5)
    sides = {k: LLM(num_speculative_tokens=k, max_model_len=384, max_num_seqs=1, dtype="bfloat16") for k in drafts}
    tokenizer = sides[0].tokenizer
    assert tokenizer is not None
    domains = by_domain(sides[0], 1 if smoke else 4) | {"python": [tokenizer.encode(text) for text in PYTHON]}
    rows = []
    for domain, prompts in domains.items():
        for temperature in (0.0, 0.7):
            found: dict[int, list[tuple[float, int, int, list[int]]]] = {k: [] for k in drafts}
            for repeat in range(repeats + 1):
                for k, llm in sides.items():
                    params = SamplingParams(max_tokens=new, temperature=temperature, ignore_eos=domain != "talk")
                    outputs = [llm.generate([p], params)[0] for p in prompts]
                    metrics = [output.metrics for output in outputs]
                    taken = [sum(m.num_accepted_tokens_per_pos[i] for m in metrics) for i in range(k)]
                    seconds, rounds = sum(m.decode_seconds for m in metrics), sum(m.num_steps for m in metrics)
                    if repeat:  # the first compiles
                        found[k].append((seconds, rounds, sum(len(output.token_ids) for output in outputs), taken))
            for k, runs in found.items():
                ratios = [b[0] / a[0] * a[2] / b[2] for a, b in zip(runs, found[0], strict=True)]
                rounds, tokens, taken = runs[0][1:]
                rows.append({
                    "domain": domain, "temperature": temperature, "draft": k, "seconds": [r[0] for r in runs],
                    "tokens_per_round": tokens / rounds, "accepted": [t / rounds for t in taken],
                    "speed_ratio": statistics.median(ratios),
                })  # fmt: skip
                about = f"{rows[-1]['tokens_per_round']:.2f} tokens a round, {rows[-1]['speed_ratio']:.2f} x speed"
                print(f"{domain:7} T {temperature:g} draft {k}: {about}", flush=True)
    return {"new": new, "dtype": "bfloat16", "acceptance": "real", "table": rows}


def plot(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for domain in dict.fromkeys(r["domain"] for r in result["table"]):
        for temperature, style in ((0.0, "o-"), (0.7, "s--")):
            mine = [r for r in result["table"] if r["domain"] == domain and r["temperature"] == temperature]
            for axis, key in ((left, "tokens_per_round"), (right, "speed_ratio")):
                axis.plot(
                    [r["draft"] for r in mine], [r[key] for r in mine], style, label=f"{domain}, T = {temperature:g}"
                )
    left.set_ylabel("tokens a round")
    right.set_ylabel("decode speed ÷ draft 0")
    right.axhline(1, color="grey", lw=0.8)
    for axis in (left, right):
        axis.set_xlabel("draft length (tokens)")
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"Embedded model on {result['device']}, batch 1, {result['dtype']}, real acceptance")


if __name__ == "__main__":
    common.run("draft_length", __doc__, experiment, plot)
