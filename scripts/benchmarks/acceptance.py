"""Acceptance of a checkpoint's MTP head per position, greedy, through the real loop, on whole held-out text.

    python -m scripts.benchmarks.acceptance --text FILE [FILE ...] --draft 4
    python -m scripts.benchmarks.acceptance --text FILE --pre-norm      # the head fed with hidden states before the norms (ablation)

The text is cut into prompts of `--prompt` tokens; each is continued by `--new` tokens of the model's own greedy choice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints import TINY, open_checkpoint
from mtpjax import LLM, SamplingParams
from scripts.benchmarks.results import describe, write_json


def measure(llm: LLM, prompts: list[list[int]], new: int) -> dict[str, object]:
    """Rounds, tokens a round, and acceptance per position: of all rounds, and of those that accepted all before."""
    outputs = llm.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
    rounds = sum(o.metrics.num_steps for o in outputs)
    taken = [sum(o.metrics.num_accepted_tokens_per_pos[i] for o in outputs) for i in range(llm.num_speculative_tokens)]
    before = [rounds, *taken[:-1]]
    return {
        "prompts": len(prompts),
        "rounds": rounds,
        "tokens_per_round": sum(len(o.token_ids) for o in outputs) / rounds,
        "accepted": [t / rounds for t in taken],
        "accepted_given_earlier": [t / max(b, 1) for t, b in zip(taken, before, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", nargs="+", required=True, help="UTF-8 text files, held out from training")
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--draft", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated for each")
    parser.add_argument("--limit", type=int, default=64, help="prompts of a file, evenly spread")
    parser.add_argument(
        "--pre-norm", action="store_true", help="also measure the head on hidden states before the norms"
    )
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    llm = LLM(args.model, num_speculative_tokens=args.draft, dtype="float32", max_model_len=args.prompt + args.new)
    if llm.tokenizer is None:
        raise SystemExit(f"{args.model}: no tokenizer.json, so text cannot be read")
    prompts = []
    for name in args.text:
        ids = llm.tokenizer.encode(Path(name).read_text(encoding="utf-8"))
        cuts = [ids[i : i + args.prompt] for i in range(0, len(ids) - args.prompt, args.prompt)]
        prompts += cuts[:: max(1, len(cuts) // args.limit)][: args.limit]
    variants = {"post-norm": llm}
    if args.pre_norm:
        from mtpjax.loading.load import load_checkpoint
        from scripts.experiments.pre_norm import pre_norm

        loaded = load_checkpoint(open_checkpoint(args.model), dtype=llm.engine.runner.compute_dtype)
        variants["pre-norm"] = LLM(
            pre_norm(loaded), num_speculative_tokens=args.draft, max_model_len=args.prompt + args.new
        )
    figures = {name: measure(variant, prompts, args.new) for name, variant in variants.items()}
    for name, row in figures.items():
        each = ", ".join(f"{x:.3f}" for x in row["accepted"])  # type: ignore[attr-defined]
        given = ", ".join(f"{x:.3f}" for x in row["accepted_given_earlier"])  # type: ignore[attr-defined]
        head = f"{name}: {row['rounds']} rounds, {row['tokens_per_round']:.3f} tokens a round"
        print(f"{head}; accepted {each}; given all earlier {given}")
    if args.json:
        write_json(args.json, {"what": "acceptance", **describe(), "draft": args.draft, "figures": figures})


if __name__ == "__main__":
    main()
