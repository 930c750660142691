"""Compare the token ids of fixed requests with those of an earlier commit: `python -m tests.golden.texts`.

`texts.json` holds the token ids that commit 833b245 gave on an x86-64 CPU with AVX-512 (Python 3.11, jax 0.10.2): the
prompts of `make demo` (sampled and greedy), fifty sampled requests in a mixed batch, some of them again in bfloat16
without drafts and with int8 weights, and continuations of the six golden models with a hash of their logits. A change
that keeps behaviour keeps them all. The texts in bfloat16 and the hashes are of 2026-11-27, when sums over features got
a fixed order; all other texts are those of that commit. `--write FILE` writes the token ids of this commit instead.

On another processor the hashes of logits differ, and a token can differ where two logits lie within rounding (about one
token in 10^5). The command then says so; for this reason it is not part of the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import TINY, write_safetensors_directory
from mtpjax import LLM, SamplingParams
from tests.golden.weights import CASES, golden_config, golden_tensors

FILE = Path(__file__).with_name("texts.json")
GOLDEN = Path(__file__).parent
OPENINGS = (
    "The rabbit looked at her watch and",
    "Once upon a time there was a king who",
    "Tell me",
    "The sea was quiet that night, and the old sailor told the children how the island",
    "A",
)

Texts = dict[str, Any]


def demo_texts() -> Texts:
    """Generate for the prompts of `make demo`, as the checkpoint recommends and greedily."""
    llm = LLM(num_speculative_tokens=3, dtype="float32")
    lines = [json.loads(line) for line in (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [llm.chat_prompt(line["messages"]) if "messages" in line else line["prompt"] for line in lines]
    sampled = llm.generate(prompts, llm.get_default_sampling_params(max_tokens=128))
    greedy = llm.generate(prompts, SamplingParams(max_tokens=64))
    return {"demo": [o.token_ids for o in sampled], "demo_greedy": [o.token_ids for o in greedy]}


def mixed_requests() -> tuple[list[str], list[SamplingParams]]:
    """Return fifty prompts and sampling parameters that mix every option."""
    rng = np.random.default_rng(7)
    prompts, params = [], []
    for i in range(50):
        prompts.append(OPENINGS[i % 5] + (" " + OPENINGS[(i * 3 + 1) % 5]) * (i % 4))
        params.append(
            SamplingParams(
                max_tokens=int(rng.integers(5, 60)),
                temperature=[0.0, 0.7, 1.0][i % 3],
                seed=i,
                top_k=[0, 20, 5][i % 3 if i % 2 else 0],
                top_p=[1.0, 0.9][i % 2],
                min_p=[0.0, 0.05][(i // 2) % 2],
                presence_penalty=[0.0, 0.5][(i // 5) % 2],
                frequency_penalty=[0.0, 0.25][(i // 7) % 2],
                repetition_penalty=[1.0, 1.1][(i // 11) % 2],
            )
        )
    return prompts, params


def mixed_texts() -> Texts:
    """Generate for the mixed requests with drafts, then for some of them in bfloat16 without drafts and with int8
    weights.
    """
    prompts, params = mixed_requests()

    def run(count: int, **options: Any) -> list[list[int]]:
        llm = LLM(max_model_len=256, **{"dtype": "float32"} | options)
        return [o.token_ids for o in llm.generate(prompts[:count], params[:count])]

    return {
        "mixed": run(50, num_speculative_tokens=4, max_num_seqs=8),
        "mixed_bf16_nodraft": run(16, num_speculative_tokens=0, max_num_seqs=8, dtype="bfloat16"),
        "mixed_int8": run(12, num_speculative_tokens=2, max_num_seqs=4, quantization="int8"),
    }


def golden_texts(case: str) -> Texts:
    """Continue prompts of one golden model greedily, and hash its logits of one prompt."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case
        entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in golden_tensors(case).items()]
        write_safetensors_directory(path, golden_config(case), entries)
        llm = LLM(path, num_speculative_tokens=3, max_model_len=128, dtype="float32")
        tokens = [int(t) for t in np.load(GOLDEN / f"{case}.npz")["tokens"][:24]]
        prompts = [tokens, tokens[:7], tokens[3:11]]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
        digest = hashlib.sha256(llm.logits(tokens).tobytes()).hexdigest()
    return {f"golden_{case}": [o.token_ids for o in outputs], f"golden_{case}_logits": digest}


def main() -> int:
    """Run the requests and compare them with `texts.json`. Returns 1 where a token differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the token ids to this file and compare nothing")
    args = parser.parse_args()
    texts = demo_texts() | mixed_texts()
    for case in CASES:
        texts |= golden_texts(case)
    if args.write:
        args.write.write_text(json.dumps(texts) + "\n")
        return 0
    expected = json.loads(FILE.read_text())
    different = 0
    for name, want in expected.items():
        same = texts[name] == want
        if name.endswith("_logits"):
            print(f"{name}: {'the same bits' if same else 'other bits'}")
            continue
        wrong = [i for i, (a, b) in enumerate(zip(texts[name], want, strict=True)) if a != b]
        different += len(wrong)
        count = sum(map(len, want))
        print(f"{name}: {len(want)} texts, {count} tokens, {len(wrong)} texts differ {wrong or ''}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
