"""Decode speed by draft length on the embedded model, with real acceptance: the sides alternate inside one run.

    python -m scripts.benchmarks.bench_decode [--json FILE]

Prompts are the embedded excerpts of held-out books and requests for stories in chat (which the model ends itself), or windows
of `--text`. Seconds are of decoding alone, compilation excluded.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from scripts.benchmarks.demo_prompts import by_domain
from scripts.benchmarks.results import describe, write_json


def windows_of(llm: LLM, text: list[str], count: int, length: int) -> dict[str, list[list[int]]]:
    """`count` windows of `length` tokens, spread evenly over the texts."""
    assert llm.tokenizer is not None
    ids = [i for name in text for i in llm.tokenizer.encode(Path(name).read_text(encoding="utf-8"))]
    step = (len(ids) - length) // count
    return {"text": [ids[i * step : i * step + length] for i in range(count)]}


def run(llm: LLM, prompts: list[list[int]], batch: int, params: SamplingParams) -> dict[str, float]:
    """Decode tokens/s and tokens a round of a sequence, over batches of `batch` prompts."""
    seconds, tokens, rounds = 0.0, 0, 0
    for first in range(0, len(prompts), batch):
        outputs = llm.generate(prompts[first : first + batch], params)
        seconds += max(o.metrics.decode_seconds for o in outputs)
        tokens += sum(len(o.token_ids) for o in outputs)
        rounds += sum(o.metrics.num_steps for o in outputs)
    return {"tokens_per_second": tokens / seconds, "tokens_per_round": tokens / rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--text", nargs="*", default=[], help="UTF-8 files to cut prompts from")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt cut from --text")
    parser.add_argument("--new", type=int, default=160, help="tokens generated for each")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype, batch in itertools.product(args.dtype, args.batch):
        sides = {
            k: LLM(args.model, num_speculative_tokens=k, dtype=dtype, max_model_len=512, max_num_seqs=batch)
            for k in (0, *args.drafts)
        }
        domains = (
            windows_of(sides[0], args.text, args.prompts, args.prompt)
            if args.text
            else by_domain(sides[0], args.prompts)
        )
        for (domain, prompts), temperature in itertools.product(domains.items(), args.temperature):
            params = SamplingParams(max_tokens=args.new, temperature=temperature, ignore_eos=domain != "talk")
            found: dict[int, list[dict[str, float]]] = {k: [] for k in sides}
            for repeat in range(args.repeats + 1):
                for k, llm in sides.items():
                    figures = run(llm, prompts, batch, params)
                    if repeat:  # the first compiles
                        found[k].append(figures)
            for k, each in found.items():
                ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(each, found[0], strict=True)]
                row = {
                    "dtype": dtype, "batch": batch, "domain": domain, "temperature": temperature, "draft": k,
                    "tokens_per_second": statistics.median(e["tokens_per_second"] for e in each),
                    "tokens_per_round": each[0]["tokens_per_round"],
                    "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{dtype}  batch {batch}  {domain}  T {temperature:g}  draft {k}: {row['tokens_per_second']:8.1f} tokens/s, "
                    f"{row['tokens_per_round']:.2f} tokens a round, {row['ratio']:.2f} x draft 0 "
                    f"({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )
    if args.json:
        about = {"new": args.new, "prompts": args.prompts, "repeats": args.repeats, "acceptance": "real"}
        write_json(args.json, {"what": "decode by draft length", **describe(), **about, "rows": rows})


if __name__ == "__main__":
    main()
