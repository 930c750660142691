"""Decode speed by draft length on the embedded model, with real acceptance: the draft lengths take turns in a run.

    python -m scripts.benchmarks.bench_decode [--json FILE]

Prompts are the embedded excerpts of held-out books and requests for stories in chat, which the model ends itself, or
windows of `--text`. The seconds are those of decoding alone, without compilation.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from scripts.benchmarks.demo_prompts import prompts_by_domain
from scripts.benchmarks.results import describe, write_json


def text_windows(llm: LLM, files: list[str], count: int, length: int) -> dict[str, list[list[int]]]:
    """Return `count` windows of `length` tokens, spread evenly over the texts, as the domain "text"."""
    assert llm.tokenizer is not None
    ids = [i for name in files for i in llm.tokenizer.encode(Path(name).read_text(encoding="utf-8"))]
    step = (len(ids) - length) // count
    return {"text": [ids[i * step : i * step + length] for i in range(count)]}


def run(llm: LLM, prompts: list[list[int]], batch: int, params: SamplingParams) -> dict[str, float]:
    """Return the decode tokens/s and the tokens a round of a sequence, over batches of `batch` prompts."""
    seconds, tokens, rounds = 0.0, 0, 0
    for first in range(0, len(prompts), batch):
        outputs = llm.generate(prompts[first : first + batch], params)
        seconds += max(o.metrics.decode_seconds for o in outputs)
        tokens += sum(len(o.token_ids) for o in outputs)
        rounds += sum(o.metrics.num_steps for o in outputs)
    return {"tokens_per_second": tokens / seconds, "tokens_per_round": tokens / rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--model", default=str(TINY))
    add("--text", nargs="*", default=[], help="UTF-8 files to cut prompts from")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    add("--num-speculative-tokens", type=int, nargs="+", default=[1, 2, 3, 4, 6], help="draft lengths; 0 is the base")
    add("--max-num-seqs", type=int, nargs="+", default=[1, 4], help="sequences that are generated at the same time")
    add("--num-prompts", type=int, default=4, help="prompts of each domain")
    add("--prompt-tokens", type=int, default=64, help="tokens of a prompt that is cut from --text")
    add("--max-tokens", type=int, default=160, help="tokens to generate for each prompt")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.7])
    add("--repeats", type=int, default=5)
    add("--json", help="write the figures to this file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype, batch in itertools.product(args.dtype, args.max_num_seqs):
        variants = {
            k: LLM(args.model, num_speculative_tokens=k, dtype=dtype, max_model_len=512, max_num_seqs=batch)
            for k in (0, *args.num_speculative_tokens)
        }
        domains = (
            text_windows(variants[0], args.text, args.num_prompts, args.prompt_tokens)
            if args.text
            else prompts_by_domain(variants[0], args.num_prompts)
        )
        for (domain, prompts), temperature in itertools.product(domains.items(), args.temperature):
            params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature, ignore_eos=domain != "talk")
            measured: dict[int, list[dict[str, float]]] = {k: [] for k in variants}
            for repeat in range(args.repeats + 1):
                for k, llm in variants.items():
                    figures = run(llm, prompts, batch, params)
                    if repeat:  # the first one compiles
                        measured[k].append(figures)
            for k, runs in measured.items():
                ratios = [
                    a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs, measured[0], strict=True)
                ]
                row = {
                    "dtype": dtype,
                    "batch": batch,
                    "domain": domain,
                    "temperature": temperature,
                    "draft": k,
                    "tokens_per_second": statistics.median(r["tokens_per_second"] for r in runs),
                    "tokens_per_round": runs[0]["tokens_per_round"],
                    "ratio": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                }
                rows.append(row)
                print(
                    f"{dtype}  batch {batch}  {domain}  T {temperature:g}  draft {k}: "
                    f"{row['tokens_per_second']:8.1f} tokens/s, {row['tokens_per_round']:.2f} tokens a round, "
                    f"{row['ratio']:.2f} x draft 0 ({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )
    if args.json:
        about = {"new": args.max_tokens, "prompts": args.num_prompts, "repeats": args.repeats, "acceptance": "real"}
        write_json(args.json, {"what": "decode by draft length", **describe(), **about, "rows": rows})


if __name__ == "__main__":
    main()
