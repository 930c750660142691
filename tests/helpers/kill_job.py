"""A batch job with every feature, killed at many moments and resumed: its output must be that of a job left alone.

    python -m tests.helpers.kill_job [--moments 20] [--lines 60]

Each round kills `mtpjax generate` with SIGKILL after a random time, and resumes it until it ends by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from checkpoints import TINY

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"n": 2, "temperature": 0.9},
    {"stop": [" the", "."], "include_stop_str_in_output": True},
    {"logprobs": 3, "prompt_logprobs": 1},
    {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
    {"structured_outputs": {"regex": "[a-z ]{8,20}\\."}, "temperature": 1.0},
    {"logit_bias": {"10": 2.5}, "min_tokens": 5},
    {"bad_words": ["the", "and"], "presence_penalty": 0.5},
    {"num_speculative_tokens": 0, "temperature": 0.8},
)
OPTIONS = ("--num-speculative-tokens", "3", "--max-tokens", "40", "--max-model-len", "384", "--max-num-seqs", "6")


def write_lines(file: Path, number: int) -> None:
    """Write lines of all kinds; every second prompt has a long common beginning."""
    prompts = [json.loads(line)["prompt"] for line in (TINY / "prompts.jsonl").read_text("utf-8").splitlines()]
    common = " ".join(prompts)[:700]
    rows = []
    for i in range(number):
        prompt = prompts[i % len(prompts)][: 20 + 3 * i % 60]
        rows.append({"id": i, "prompt": f"{common} {prompt}" if i % 2 else prompt, **KINDS[i % len(KINDS)]})
    rows[number // 2]["temperature"] = "hot"  # an error row
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def clockless(file: Path) -> list[dict[str, Any]]:
    """Read the answers, without what depends on the clock and on how the prompts were shared."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "metrics"} for row in rows]


def run(folder: Path, output: str, *options: str, kill_after: float | None = None) -> int:
    """Run the job; returns its exit status, -9 if it was killed."""
    paths = ["--input", str(folder / "in.jsonl"), "--output", str(folder / output)]
    command = [sys.executable, "-m", "mtpjax.cli.main", "generate", *paths, *OPTIONS]
    process = subprocess.Popen(
        [*command, "--prefix-cache", str(folder / "prefixes"), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"MTPJAX_PROGRAM_CACHE": str(folder / "programs")},
    )
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


def check(folder: Path, moments: int, lines: int, seed: int = 0) -> list[str]:
    """Kill and resume the job `moments` times. Returns what went wrong."""
    write_lines(folder / "in.jsonl", lines)
    run(folder, "first.jsonl")  # compiles
    start = time.monotonic()
    assert run(folder, "want.jsonl") == 1, "one line has an error"
    seconds, want = time.monotonic() - start, clockless(folder / "want.jsonl")
    print(f"the job alone takes {seconds:.1f} s", flush=True)
    rng, problems, done, output = random.Random(seed), [], 0, 0
    while done < moments:
        name, output, resume = f"out{output}.jsonl", output + 1, False
        while True:
            after = rng.uniform(0.3, 1.0) * seconds if done < moments else None
            rc = run(folder, name, *(["--resume"] if resume else []), kill_after=after)
            if rc != -signal.SIGKILL:
                break
            part = folder / f"{name}.part"
            done, resume = done + 1, part.exists()
            if (folder / name).exists() and not resume:
                print(f"killed {done}: the output was complete already", flush=True)
                rc = 1
                break
            print(f"killed {done}: {part.read_bytes().count(10) if resume else 'no'} lines are there", flush=True)
        if rc != 1:
            problems.append(f"{name}: exit status {rc}")
        elif clockless(folder / name) != want:
            problems.append(f"{name}: another output")
        left = [file.name for file in folder.iterdir() if file.name.startswith(f"{name}.")]
        problems += [f"{one} is left behind" for one in left]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--lines", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems = check(Path(folder), args.moments, args.lines)
    print("\n".join(problems) or f"{args.moments} times killed: the same output each time")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
