"""Inputs of the MTP head: hidden states after or before the norms, paired rightly or one off, with or without the
prompt.

    python -m scripts.experiments.hidden_state

Single rounds of four greedy drafts at two places of texts that the embedded model wrote itself (T = 0.7) after the
embedded excerpts of held-out books. A draft counts if it and all drafts before it are the trunk's own choices.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from checkpoints import TINY, open_checkpoint
from mtpjax.loading.load import load_checkpoint
from mtpjax.model.cache import KV_BLOCK
from scripts.benchmarks.draft_rounds import DEPTH, count_accepted
from scripts.benchmarks.pre_norm_model import pre_norm
from scripts.experiments import experiment

PRE_NORM = "pre-norm"
# Options of `count_accepted` by the name of the variant.
VARIANTS: dict[str, dict[str, int]] = {
    "post-norm, as trained": {},
    PRE_NORM: {},
    "pairing one off": {"shift": 1},
    "no prompt": {"mtp_prompt_tokens": 1},
    "4 prompt rows": {"mtp_prompt_tokens": 4},
    "16 prompt rows": {"mtp_prompt_tokens": 16},
    "64 prompt rows": {"mtp_prompt_tokens": 64},
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return a row for each variant: the share of rounds that accept drafts 1 … 4, and the tokens a round."""
    num_texts, prefixes = (2, (128,)) if args.smoke else (256, (128, 248))
    names = list(VARIANTS)[:: 3 if args.smoke else 1]
    windows = experiment.generated_texts(num_texts, KV_BLOCK)
    model = load_checkpoint(open_checkpoint(TINY), dtype=np.dtype("float32"))
    rows: list[dict[str, Any]] = []
    for name in names:
        variant = pre_norm(model) if name == PRE_NORM else model
        counts = count_accepted(variant.graph, variant.params, windows, prefixes, 32, **VARIANTS[name])
        accepted = [float(np.mean(counts >= d)) for d in range(1, DEPTH + 1)]
        tokens_per_round, error = 1 + float(counts.mean()), float(counts.std(ddof=1) / len(counts) ** 0.5)
        row = {
            "fed": name,
            "rounds": len(counts),
            "accepted": accepted,
            "tokens_per_round": tokens_per_round,
            "standard_error": error,
        }
        rows.append(row)
        shares = ", ".join(f"{x:.3f}" for x in accepted)
        print(f"{name:22} accepted {shares}; {tokens_per_round:.3f} ± {error:.3f} tokens a round", flush=True)
    return {"acceptance": "real, greedy", "table": rows}


def plot(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for row in result["table"]:
        left.plot(range(1, DEPTH + 1), row["accepted"], "o-", label=row["fed"])
    left.set_xlabel("draft position")
    left.set_ylabel("share of rounds that accept it and all before")
    left.set_xticks(range(1, DEPTH + 1))
    left.set_ylim(0, 1)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    rows = result["table"][::-1]
    errors = [r["standard_error"] for r in rows]
    right.barh([r["fed"] for r in rows], [r["tokens_per_round"] for r in rows], xerr=errors)
    right.axvline(1, color="grey", lw=0.8)
    right.set_xlabel(f"tokens a round, {DEPTH} drafts (bar: standard error)")
    right.grid(axis="x", alpha=0.3)
    figure.suptitle(f"What the MTP head is fed: embedded model, {result['table'][0]['rounds']} rounds each, greedy")


if __name__ == "__main__":
    experiment.run("hidden_state", __doc__, measure, plot)
