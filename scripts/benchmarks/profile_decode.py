"""Where a decoding round spends its time: events of the compiled program, by kind, from JAX's own profiler.

    python -m scripts.benchmarks.profile_decode [--model DIR] [--drafts 0 3] [--json FILE]

Event times are of a traced run, which is slower than an untraced one, and overlap where threads work side by side; a
loop's event contains those of its body. Compare shares, not sums; "ms a round" is untraced.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from scripts.benchmarks.results import describe, write_json

PROGRAM = "jit_decode"


def events(folder: Path, program: str = PROGRAM) -> dict[str, tuple[int, float]]:
    """Of each operation of the programs so named, in the newest trace under `folder`: how many events, and seconds."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    newest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                about = dict(event.stats)
                if "hlo_op" in about and str(about.get("hlo_module", "")).startswith(program):
                    found[str(about["hlo_op"])].append(event.duration_ns * 1e-9)
    return {name: (len(times), sum(times)) for name, times in found.items()}


def kind(operation: str) -> str:
    """The operation without its number: `dot.12` -> `dot`."""
    return re.sub(r"[.\d]+.*$", "", operation)


def profile(llm: LLM, prompt: list[int], new: int) -> dict[str, Any]:
    """One request, greedy: untraced milliseconds a round, and the traced events a round by kind, longest first."""
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    llm.generate([prompt], params)  # compiles
    plain = [llm.generate([prompt], params)[0].metrics for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            rounds = llm.generate([prompt], params)[0].metrics.num_steps
        seen = events(Path(folder))
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, (count, seconds) in seen.items():
        kinds[kind(name)][0] += count / rounds
        kinds[kind(name)][1] += seconds / rounds * 1e6
    longest = sorted(kinds.items(), key=lambda item: -item[1][1])
    return {
        "rounds": rounds,
        "milliseconds_per_round": sorted(m.decode_seconds / m.num_steps * 1e3 for m in plain)[1],
        "events_per_round": sum(count for count, _ in seen.values()) / rounds,
        "kinds": [{"kind": k, "events": round(n, 1), "microseconds": round(t, 1)} for k, (n, t) in longest],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--top", type=int, default=10, help="kinds shown")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    text = json.loads((TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    found = {}
    for k in args.drafts:
        llm = LLM(args.model, num_speculative_tokens=k, dtype="float32", max_model_len=512, max_num_seqs=1)
        if llm.tokenizer is None:
            raise SystemExit(f"{args.model}: no tokenizer.json, so the prompt cannot be read")
        found[k] = profile(llm, llm.tokenizer.encode(text), args.new)
        print(
            f"draft {k}: {found[k]['milliseconds_per_round']:.2f} ms and {found[k]['events_per_round']:.0f} events a round"
        )
        for row in found[k]["kinds"][: args.top]:
            print(f"  {row['microseconds']:8.1f} us in {row['events']:6.1f} x {row['kind']}")
    if args.json:
        short = {k: f | {"kinds": f["kinds"][: args.top]} for k, f in found.items()}
        write_json(args.json, {"what": "profile of a decoding round", **describe(), "drafts": short})


if __name__ == "__main__":
    main()
