"""What the MTP head is fed: hidden states after or before the norms, paired rightly or one off, with or without the prompt.

    python -m scripts.experiments.hidden_state

Single rounds of four greedy drafts at two places of texts that the embedded model wrote itself (T = 0.7) behind the
embedded excerpts of held-out books; a draft counts while all before it are the trunk's own choices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from checkpoints import TINY, open_checkpoint
from mtpjax.loading.load import load_checkpoint
from mtpjax.model.cache import KV_BLOCK
from scripts.benchmarks.draft_rounds import DEPTH, count_agreeing
from scripts.experiments import common
from scripts.experiments.pre_norm import pre_norm

POST = "post-norm, as trained"
VARIANTS: dict[str, dict[str, Any]] = {
    POST: {},
    "pre-norm": {},
    "pairing one off": {"shift": 1},
    "no prompt": {"seen": 1},
    "4 prompt rows": {"seen": 4},
    "16 prompt rows": {"seen": 16},
    "64 prompt rows": {"seen": 64},
}


def experiment(smoke: bool) -> dict[str, Any]:
    """A row for each variant: share of rounds that accept draft 1...4, tokens a round."""
    texts, prefixes = (2, (128,)) if smoke else (256, (128, 248))
    names = list(VARIANTS)[:: 3 if smoke else 1]
    windows = common.own_texts(texts, KV_BLOCK)
    model = load_checkpoint(open_checkpoint(TINY), dtype=np.dtype("float32"))
    rows = []
    for name in names:
        fed = pre_norm(model) if name == "pre-norm" else model
        counts = count_agreeing(fed.graph, fed.params, windows, prefixes, 32, **VARIANTS[name])
        accepted = [float(np.mean(counts >= d)) for d in range(1, DEPTH + 1)]
        error = float(counts.std(ddof=1) / len(counts) ** 0.5)
        rows.append({
            "fed": name, "rounds": len(counts), "accepted": accepted, "tokens_per_round": 1 + float(counts.mean()),
            "standard_error": error,
        })  # fmt: skip
        each = ", ".join(f"{x:.3f}" for x in accepted)
        print(f"{name:22} accepted {each}; {rows[-1]['tokens_per_round']:.3f} ± {error:.3f} tokens a round", flush=True)
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
    table = result["table"][::-1]
    right.barh(
        [r["fed"] for r in table], [r["tokens_per_round"] for r in table], xerr=[r["standard_error"] for r in table]
    )
    right.axvline(1, color="grey", lw=0.8)
    right.set_xlabel(f"tokens a round, {DEPTH} drafts (bar: standard error)")
    right.grid(axis="x", alpha=0.3)
    figure.suptitle(f"What the MTP head is fed: embedded model, {result['table'][0]['rounds']} rounds each, greedy")


if __name__ == "__main__":
    common.run("hidden_state", __doc__, experiment, plot)
