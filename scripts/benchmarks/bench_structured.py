"""Structured outputs beside none: tokens per second and acceptance of the same prompts, taking turns.

    python -m scripts.benchmarks.bench_structured [--rounds 5] [--slots 8] [--tokens 64] [--json FILE]

The embedded model writes texts of one length: an expression of so many characters, none, and an expression that allows
all of them, which has the cost of the mask and nothing else. Compilation is not counted, nor that of automata, whose
seconds are shown apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from mtpjax import LLM, SamplingParams, StructuredOutputs
from scripts.benchmarks.demo_prompts import STORIES
from scripts.benchmarks.results import describe, write_json

KINDS: dict[str, StructuredOutputs | None] = {
    "none": None,
    "allows every text": StructuredOutputs(regex=r"[\x01-\x{10ffff}]*"),
    "words and spaces": StructuredOutputs(regex=r"([A-Za-z]{1,12}[ ,.\n]){400}"),
    "json": StructuredOutputs(json={"type": "array", "items": {"type": "string", "minLength": 400}, "minItems": 1}),
}


def run(llm: LLM, structured_outputs: StructuredOutputs | None, num_texts: int, num_tokens: int) -> dict[str, float]:
    """Return tokens per second of decoding and the mean acceptance length of some texts."""
    params = SamplingParams(max_tokens=num_tokens, structured_outputs=structured_outputs)
    decode_seconds = llm.engine.decode_seconds
    prompts = [llm.chat_prompt([{"role": "user", "content": STORIES[i % len(STORIES)]}]) for i in range(num_texts)]
    outputs = llm.generate(prompts, params)
    seconds = llm.engine.decode_seconds - decode_seconds
    steps = sum(o.metrics.num_steps for o in outputs)
    return {
        "tokens_per_second": sum(len(o.token_ids) for o in outputs) / seconds,
        "milliseconds_per_step": 1000 * seconds / max(o.metrics.num_steps for o in outputs),
        "tokens_per_step": sum(len(o.token_ids) for o in outputs) / steps,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json")
    args = parser.parse_args()
    llm = LLM(max_model_len=512, max_num_seqs=args.slots)
    compile_seconds = {}
    for name, kind in KINDS.items():
        start = llm.engine.seconds_without_compile(), time.perf_counter()
        llm.encode("a", SamplingParams(structured_outputs=kind))
        compile_seconds[name] = time.perf_counter() - start[1]
        run(llm, kind, args.slots, args.tokens)  # compiles the program
    rounds: list[dict[str, dict[str, float]]] = [
        {name: run(llm, kind, args.slots, args.tokens) for name, kind in KINDS.items()} for _ in range(args.rounds)
    ]
    results: dict[str, Any] = {}
    print(f"{'':20} {'tokens/s':>10} {'ms/step':>9} {'tokens/step':>12} {'step / none':>12} {'automaton s':>12}")
    for name in KINDS:
        median = {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]}
        ratio = statistics.median(r[name]["milliseconds_per_step"] / r["none"]["milliseconds_per_step"] for r in rounds)
        results[name] = median | {"step_ratio": ratio, "automaton_seconds": compile_seconds[name]}
        print(
            f"{name:20} {median['tokens_per_second']:10.1f} {median['milliseconds_per_step']:9.2f} "
            f"{median['tokens_per_step']:12.2f} {ratio:12.3f} {compile_seconds[name]:12.2f}"
        )
    if args.json:
        write_json(args.json, {"machine": describe(), "results": results})


if __name__ == "__main__":
    main()
