"""Acceptance of a checkpoint's MTP head per position, greedy, through the real loop, on whole held-out texts.

    python -m scripts.benchmarks.acceptance --text FILE [FILE ...] --num-speculative-tokens 4
    python -m scripts.benchmarks.acceptance --text FILE --pre-norm

The texts are cut into prompts of `--prompt-tokens` tokens. Each one is continued by `--max-tokens` tokens of the
model's own greedy choice. `--pre-norm` also measures an ablation: the head reads hidden states before the norms.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from checkpoints import TINY, open_checkpoint
from mtpjax import LLM, RequestOutput, SamplingParams
from mtpjax.loading.load import load_checkpoint
from mtpjax.text.tokenizer import Tokenizer
from scripts.benchmarks.pre_norm_model import pre_norm
from scripts.benchmarks.results import describe, write_json


def cut_prompts(tokenizer: Tokenizer, files: list[str], prompt_tokens: int, limit: int) -> list[list[int]]:
    """Return at most `limit` pieces of `prompt_tokens` tokens of each text, evenly spread."""
    prompts: list[list[int]] = []
    for name in files:
        ids = tokenizer.encode(Path(name).read_text(encoding="utf-8"))
        starts = range(0, len(ids) - prompt_tokens, prompt_tokens)
        pieces = [ids[start : start + prompt_tokens] for start in starts]
        prompts += pieces[:: max(1, len(pieces) // limit)][:limit]
    return prompts


def measure(llm: LLM, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Return the figures of greedy texts; see `figures_of`."""
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    return figures_of(outputs, llm.num_speculative_tokens)


def figures_of(outputs: list[RequestOutput], num_speculative_tokens: int) -> dict[str, Any]:
    """Return the rounds, the tokens a round, and the acceptance of each draft position.

    "accepted" are shares of all rounds, "accepted_given_earlier" of the rounds that accepted every draft before.
    """
    rounds = sum(o.metrics.num_steps for o in outputs)
    accepted = [sum(o.metrics.num_accepted_tokens_per_pos[i] for o in outputs) for i in range(num_speculative_tokens)]
    accepted_before = [rounds, *accepted[:-1]]
    return {
        "prompts": len(outputs),
        "rounds": rounds,
        "tokens_per_round": sum(len(o.token_ids) for o in outputs) / rounds,
        "accepted": [count / rounds for count in accepted],
        "accepted_given_earlier": [
            count / max(before, 1) for count, before in zip(accepted, accepted_before, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--text", nargs="+", required=True, help="UTF-8 texts, held out from training")
    add("--model", default=str(TINY))
    add("--num-speculative-tokens", type=int, default=4)
    add("--prompt-tokens", type=int, default=128, help="tokens of a prompt")
    add("--max-tokens", type=int, default=64, help="tokens to generate for each prompt")
    add("--limit", type=int, default=64, help="prompts of a text, evenly spread")
    add("--pre-norm", action="store_true", help="also measure the head on hidden states before the norms")
    add("--json", help="write the figures to this file")
    args = parser.parse_args()

    options = {
        "num_speculative_tokens": args.num_speculative_tokens,
        "max_model_len": args.prompt_tokens + args.max_tokens,
    }
    llm = LLM(args.model, dtype="float32", **options)
    if llm.tokenizer is None:
        raise SystemExit(f"{args.model}: no tokenizer.json, so text cannot be read")
    prompts = cut_prompts(llm.tokenizer, args.text, args.prompt_tokens, args.limit)
    variants = {"post-norm": llm}
    if args.pre_norm:
        model = load_checkpoint(open_checkpoint(args.model), dtype=jnp.dtype(jnp.float32))
        variants["pre-norm"] = LLM(pre_norm(model), **options)
    figures = {name: measure(variant, prompts, args.max_tokens) for name, variant in variants.items()}
    for name, row in figures.items():
        accepted, given = (
            ", ".join(f"{share:.3f}" for share in row[key]) for key in ("accepted", "accepted_given_earlier")
        )
        head = f"{name}: {row['rounds']} rounds, {row['tokens_per_round']:.3f} tokens a round"
        print(f"{head}; accepted {accepted}; given all earlier {given}")
    if args.json:
        about = {"what": "acceptance", **describe(), "draft": args.num_speculative_tokens}
        write_json(args.json, about | {"figures": figures})


if __name__ == "__main__":
    main()
