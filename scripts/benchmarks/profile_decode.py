"""Where a decoding round spends its time: operations of the compiled program by kind, from JAX's own profiler.

    python -m scripts.benchmarks.profile_decode [--model DIR] [--num-speculative-tokens 0 3] [--json FILE]

The times are those of a traced run, which is slower than an untraced one. They overlap where threads work side by side,
and the event of a loop contains those of its body. Compare shares, not sums. "ms a round" is untraced.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
from pathlib import Path
from typing import Any

import jax

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from scripts.benchmarks.results import describe, write_json
from scripts.benchmarks.trace_events import op_kind, read_op_times

PROGRAM = "jit_decode"


def profile(llm: LLM, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """Profile a greedy request: untraced milliseconds a round, and traced events a round by kind, longest first."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    llm.generate([prompt], params)  # compiles
    untraced = [llm.generate([prompt], params)[0].metrics for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            rounds = llm.generate([prompt], params)[0].metrics.num_steps
        op_times = read_op_times(Path(folder), PROGRAM)
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, (count, seconds) in op_times.items():
        kinds[op_kind(name)][0] += count / rounds
        kinds[op_kind(name)][1] += seconds / rounds * 1e6
    longest = sorted(kinds.items(), key=lambda item: -item[1][1])
    return {
        "rounds": rounds,
        "milliseconds_per_round": sorted(m.decode_seconds / m.num_steps * 1e3 for m in untraced)[1],
        "events_per_round": sum(count for count, _ in op_times.values()) / rounds,
        "kinds": [{"kind": k, "events": round(n, 1), "microseconds": round(t, 1)} for k, (n, t) in longest],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[0, 3], help="draft lengths")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--top", type=int, default=10, help="kinds of operations to show")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    text = json.loads((TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    profiles = {}
    for k in args.num_speculative_tokens:
        llm = LLM(args.model, num_speculative_tokens=k, dtype="float32", max_model_len=512, max_num_seqs=1)
        if llm.tokenizer is None:
            raise SystemExit(f"{args.model}: no tokenizer.json, so the prompt cannot be read")
        profiles[k] = profile(llm, llm.tokenizer.encode(text), args.max_tokens)
        milliseconds, events = profiles[k]["milliseconds_per_round"], profiles[k]["events_per_round"]
        print(f"draft {k}: {milliseconds:.2f} ms and {events:.0f} events a round")
        for row in profiles[k]["kinds"][: args.top]:
            print(f"  {row['microseconds']:8.1f} us in {row['events']:6.1f} x {row['kind']}")
    if args.json:
        short = {k: p | {"kinds": p["kinds"][: args.top]} for k, p in profiles.items()}
        write_json(args.json, {"what": "profile of a decoding round", **describe(), "drafts": short})


if __name__ == "__main__":
    main()
