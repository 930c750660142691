"""Requests with parameters of all kinds, answered in many ways that must not change them.

    python -m tests.helpers.mixed_requests [--requests 300] [--json FILE]

The reference answers each request alone, without drafts and without shared beginnings. Every other way answers all of
them together: with other slots, draft lengths and orders, with and without shared beginnings. Texts, token ids, seeds,
finish and stop reasons must be the same, and log-probabilities to `TOLERANCE`: in float32 on a CPU logits depend on the
number of rows in the last bits. The exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from checkpoints import TINY
from mtpjax import LLM, RequestOutput, SamplingParams, StructuredOutputs

MAX_MODEL_LEN = 384
TOLERANCE = 1e-4  # of log-probabilities
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
STRUCTURES: tuple[dict[str, Any], ...] = (
    {"json": SCHEMA},
    {"regex": r"[a-z ]{5,30}\."},
    {"choice": ["yes", "no", "perhaps not"]},
)
Job = tuple[list[int], SamplingParams]


def mixed_jobs(llm: LLM, number: int, seed: int = 0) -> list[Job]:
    """Return prompts, many with a common beginning, and parameters; each draws some features at random."""
    rng = np.random.default_rng(seed)
    assert llm.tokenizer is not None
    prompts = [json.loads(line)["prompt"] for line in (TINY / "prompts.jsonl").read_text("utf-8").splitlines()]
    ids = [llm.tokenizer.encode(prompt) for prompt in prompts]
    common = [np.concatenate([rng.permutation(one) for one in ids])[:length].tolist() for length in (70, 150, 200)]
    common.append(common[1][:100] + common[2][:60])

    def some(probability: float) -> bool:
        return bool(rng.random() < probability)

    jobs = []
    for _ in range(number):
        prompt = list(ids[rng.integers(len(ids))][: rng.integers(1, 60)])
        if some(0.5):
            prompt = common[rng.integers(len(common))] + prompt[: rng.integers(1, 20)]
        options: dict[str, Any] = {"max_tokens": int(rng.integers(1, 40)), "seed": int(rng.integers(2**31))}
        if some(0.6):
            options["temperature"] = float(rng.choice([0.3, 0.8, 1.5]))
        if some(0.3):
            options |= {"top_k": int(rng.integers(2, 40)), "top_p": 0.9}
        if some(0.15):
            options |= {"presence_penalty": 0.5, "repetition_penalty": 1.2}
        if some(0.2):
            options["stop"] = [[" the", "."], ["a"], ["e t", "ing "]][rng.integers(3)]
            options["include_stop_str_in_output"] = some(0.5)
        if some(0.15):
            options["min_tokens"] = int(rng.integers(0, options["max_tokens"] + 1))
        if some(0.15):
            options["logit_bias"] = {int(t): float(rng.normal() * 5) for t in rng.integers(0, 500, 4)}
        if some(0.1):
            options["bad_words"] = ["the", "and then", "a"]
        if some(0.3):
            options["logprobs"] = int(rng.integers(0, 6))
        if some(0.1):
            options["prompt_logprobs"] = 2
        if some(0.1):
            options["n"] = 2
            options.setdefault("temperature", 0.7)
        if some(0.2):
            options["num_speculative_tokens"] = int(rng.integers(0, 2))
        if some(0.15):
            options["structured_outputs"] = StructuredOutputs(**STRUCTURES[rng.integers(len(STRUCTURES))])
        elif some(0.1):
            options["allowed_token_ids"] = sorted(set(rng.integers(0, llm.cfg.vocab_size, 200).tolist()))
        jobs.append((prompt, SamplingParams(**options)))
    return jobs


class Outcome(NamedTuple):
    """Everything of an answer that may not depend on how it was made.

    Attributes:
        texts: index, seed, text, token ids, finish and stop reason of each sample.
        logprobs: of the chosen tokens and of the tokens of the prompt.
    """

    texts: list[tuple[Any, ...]]
    logprobs: list[float]

    def distance(self, other: Outcome) -> float:
        """Return the largest difference of log-probabilities; infinite if anything else differs."""
        if self.texts != other.texts or len(self.logprobs) != len(other.logprobs):
            return float("inf")
        return float(np.max(np.abs(np.subtract(self.logprobs, other.logprobs)), initial=0))


def outcome(output: RequestOutput) -> Outcome:
    """Return what must be the same, however an answer was made."""
    texts = [(o.index, o.seed, o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in output.outputs]
    pairs = [pair for o in output.outputs for pair in zip(o.token_ids, o.logprobs or (), strict=o.logprobs is not None)]
    prompt = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False)
    pairs += [(token, found) for token, found in prompt if found is not None]
    return Outcome(texts, [found[token].logprob for token, found in pairs])


def answer(llm: LLM, jobs: Sequence[Job], order: Sequence[int]) -> list[Outcome]:
    """Answer the jobs together, in this order. Returns their outcomes in the order of `jobs`."""
    outputs = llm.generate([jobs[i][0] for i in order], [jobs[i][1] for i in order])
    found = {i: outcome(output) for i, output in zip(order, outputs, strict=True)}
    return [found[i] for i in range(len(jobs))]


def load(**arguments: Any) -> LLM:
    """Load the embedded model in float32."""
    return LLM(dtype="float32", max_model_len=MAX_MODEL_LEN, **arguments)


def without_depth(jobs: Sequence[Job]) -> list[Job]:
    """The same jobs for an engine that does not draft."""
    return [(prompt, replace(params, num_speculative_tokens=None)) for prompt, params in jobs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    alone = load(num_speculative_tokens=0, max_num_seqs=1, enable_prefix_caching=False)
    jobs = mixed_jobs(alone, args.requests)
    start = time.perf_counter()
    plain = without_depth(jobs)
    want = [outcome(alone.generate([prompt], params)[0]) for prompt, params in plain]
    reasons = Counter(str(text[4]) for one in want for text in one.texts)
    print(f"{len(jobs)} requests alone: {time.perf_counter() - start:.0f} s, {dict(reasons)}", flush=True)
    rng, different, rows = np.random.default_rng(1), 0, []
    for drafts, slots, prefixes in WAYS:
        start = time.perf_counter()
        llm = load(num_speculative_tokens=drafts, max_num_seqs=slots, enable_prefix_caching=prefixes)
        got = answer(llm, plain if drafts == 0 else jobs, rng.permutation(len(jobs)).tolist())
        distances = [a.distance(b) for a, b in zip(got, want, strict=True)]
        wrong = [i for i, distance in enumerate(distances) if distance > TOLERANCE]
        different += len(wrong)
        row = {
            "drafts": drafts,
            "slots": slots,
            "prefixes": prefixes,
            "different": len(wrong),
            "largest_difference_of_logprobs": max(d for d in distances if d <= TOLERANCE),
            "programs": llm.engine.num_programs,
            "prompt_tokens_read": llm.engine.num_prompt_tokens,
            "seconds": round(time.perf_counter() - start, 1),
        }
        rows.append(row)
        print(row, wrong[:5], flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as stream:
            json.dump({"requests": len(jobs), "finish_reasons": reasons, "ways": rows}, stream, indent=1)
    return int(different > 0)


WAYS: tuple[tuple[int | str, int, bool], ...] = (
    (1, 1, True),
    (2, 4, True),
    (3, 16, False),
    (3, 16, True),
    (4, 32, True),
    (5, 4, False),
    (6, 16, True),
    (7, 32, False),
    (8, 16, True),
    ("auto", 16, True),
    (0, 32, True),
)


if __name__ == "__main__":
    sys.exit(main())
