"""Measure the embedded model on the held-out titles and write its model card.

    python scripts/tiny_report.py --books DIR --model checkpoints/tiny
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from checkpoints import open_checkpoint
from mtpjax.cache import BLOCK, new_cache
from mtpjax.loading import load_checkpoint
from mtpjax.model import place
from mtpjax.weights import LoadedModel

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_data as data
from train_tiny import BALANCE_WEIGHT, GAIN_SPREAD, MTP_WEIGHTS, Plan

DEPTH = 4  # drafts a round
PREFIXES = (64, 128, 192, 248)  # rows before the drafts; with them they fit in one block of attention
BATCH = 16


def window_loss(graph: Any, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Sum over the rows of -log p(next token), in nats, each window read from nothing."""
    model = nnx.merge(graph, params)
    batch, rows = tokens.shape[0], tokens.shape[1] - 1
    zeros = jnp.zeros(batch, jnp.int32)
    where = place(model.cfg, zeros, rows, zeros, slots=BLOCK, blocks=1)
    y, _ = model.trunk(tokens[:, :rows], new_cache(model.cfg, batch, BLOCK), where)
    logits = model.head(model.final_norm(y))
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def agreeing_drafts(graph: Any, params: Any, tokens: Int[Array, "B T"], prefix: int) -> Int[Array, " B"]:
    """How many of `DEPTH` greedy drafts after `prefix` rows the trunk would take, as in one round of decoding.

    The head reads the hidden state of the last row and the book's next token, then its own output and draft; the trunk
    reads the same token and drafts. A draft counts when it and all before it are the trunk's first choices.
    """
    model = nnx.merge(graph, params)
    cfg, batch = model.cfg, tokens.shape[0]
    zeros = jnp.zeros(batch, jnp.int32)
    at = partial(place, cfg, pad=zeros, slots=BLOCK, blocks=1)
    where = at(zeros, prefix)
    y, cache = model.trunk(tokens[:, :prefix], new_cache(cfg, batch, BLOCK), where)
    m, cache = model.mtp_step(model.final_norm(y), tokens[:, 1 : prefix + 1], cache, where)
    window = [tokens[:, prefix]]
    for depth in range(1, DEPTH + 1):
        window.append(jnp.argmax(model.mtp_head(m[:, -1:])[:, 0], axis=-1))
        m, cache = model.mtp_step(m[:, -1:], window[-1][:, None], cache, at(zeros + prefix - 1 + depth, 1))
    drafts = jnp.stack(window[1:], axis=1)
    y, _ = model.trunk(jnp.stack(window[:-1], axis=1), cache, at(zeros + prefix, DEPTH))
    right = drafts == jnp.argmax(model.head(model.final_norm(y)), axis=-1)
    return jnp.sum(jnp.cumprod(right, axis=1), axis=1)


def in_batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def measure(model: LoadedModel, tokenizer: Tokenizer, books: list[data.Book]) -> dict[str, Any]:
    """Loss and draft agreement on the held-out titles; windows of one block, each read from nothing."""
    held_out = [book for book in books if book.split == "held-out"]
    loss = jax.jit(partial(window_loss, model.graph))
    drafts = jax.jit(partial(agreeing_drafts, model.graph), static_argnames="prefix")
    tokens = data.pack(held_out, tokenizer)
    windows = data.windows(tokens, BLOCK + 1, BLOCK)
    nats = sum(float(loss(model.params, some)) for some in in_batches(windows)) / (len(windows) * BLOCK)
    taken = [drafts(model.params, s, prefix=p) for p in PREFIXES for s in in_batches(windows)]
    counts = np.concatenate([np.asarray(t) for t in taken])
    size = sum(len(book.text.encode()) for book in held_out)
    return {
        "held_out_tokens": len(windows) * BLOCK,
        "bytes_per_token": size / len(tokens),
        "nats_per_token": nats,
        "bits_per_byte": nats / math.log(2) * len(tokens) / size,
        "draft_rounds": len(counts),
        "accepted": [float(np.mean(counts >= depth)) for depth in range(1, DEPTH + 1)],
        "accepted_given_previous": [
            float(np.mean(counts[counts >= depth - 1] >= depth)) for depth in range(1, DEPTH + 1)
        ],
    }


def cost(spent: dict[str, Any] | None) -> str:
    """One paragraph from training.json."""
    if spent is None:
        return "An early snapshot: the training that made it was still running."
    passes, speed = spent["tokens"] / spent["training_tokens"], spent["tokens"] / spent["seconds"]
    before = cost(spent["start"]) + "\n\nFrom these weights on (`--start`), optimiser and rate anew: " if "start" in spent else ""
    whole = f" of {planned:,}" if (planned := spent.get("of_steps")) not in (None, spent["steps"]) else ""
    return before + (
        f"{spent['steps']:,}{whole} steps of {spent['batch']} windows of {BLOCK} tokens: {spent['tokens']:,} tokens, "
        f"{passes:.1f} passes over the text,\nin {spent['seconds'] / 60:.0f} minutes "
        f"on {spent['threads']} shared CPU cores "
        f"({speed:,.0f} tokens a second). AdamW, peak rate {spent['rate']:g},\ncosine, float32, "
        f"{spent['mtp_steps']} MTP steps, seed {spent['seed']}."
    )


def draft_table(figures: dict[str, Any]) -> str:
    lines = ["| draft | taken by the trunk | taken, given all before it were |", "|---|---|---|"]
    shares = zip(figures["accepted"], figures["accepted_given_previous"], strict=True)
    lines += [f"| {depth} | {taken:.1%} | {given:.1%} |" for depth, (taken, given) in enumerate(shares, 1)]
    return "\n".join(lines)


def card(model: LoadedModel, folder: Path, figures: dict[str, Any], books: list[data.Book]) -> str:
    """README.md of the model."""
    cfg = model.cfg
    training = folder / "training.json"
    spent = json.loads(training.read_text()) if training.is_file() else None
    steps = (spent or vars(Plan()))["mtp_steps"]
    further = ", ".join(map(str, MTP_WEIGHTS[1:steps]))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    megabytes = sum(file.stat().st_size for file in folder.iterdir() if file.name != "README.md") / 1e6
    held = " and ".join(f"*{name.split('_')[1].replace('-', ' ').title()}*" for name in data.HELD_OUT)
    names = "\n".join(f"* {b.file.stem.replace('_', ': ').replace('-', ' ')}" for b in books if b.split == "train")
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = "\n".join(f"* `{p['id']}`, {len(p['prompt'].split())} words" for p in prompts)
    nats, per_byte = figures["nats_per_token"], figures["bits_per_byte"]
    return f"""# The embedded tiny model

A Qwen3.5-MoE with its MTP head, small enough to live in the repository: {parameters:,} parameters, {megabytes:.1f} MB
with its tokenizer. It exists so that the demo and the tests run on real, trained weights. It writes children's-book
English without much sense; it knows no chat and no facts.

* Hidden {cfg.hidden_size}, {cfg.layers} layers ({cfg.linear_layers} Gated DeltaNet, {cfg.full_layers} gated attention)
  and one MTP layer; {cfg.experts} experts of {cfg.expert_size} units, {cfg.experts_per_token} a token, and a shared one
  of {cfg.shared_expert_size}; tied embeddings, {cfg.vocab_size} byte-level BPE tokens.
* BF16; the decay rates and the norm behind DeltaNet are float32.
* Trained on windows of {BLOCK} tokens: longer text is out of its experience.
* Stop tokens: `<|im_end|>` ({cfg.stop_tokens[0]}), never seen in training, and `<|endoftext|>`
  ({cfg.stop_tokens[1]}), which stands between titles.

## Data

Children's books in the Standard Ebooks editions: the texts are in the public domain in the United States, the editions
are dedicated to the public domain under CC0. The texts are not in this repository; `manifest.json` has the name, size
and SHA-256 of each.

Held out: {held}. The demo prompts in `prompts.jsonl` are taken from these two:

{lengths}

Trained on, tokenizer included:

{names}

## Training

    python scripts/train_tiny.py --books DIR --out DIR
    python scripts/tiny_report.py --books DIR --model DIR

{cost(spent)}

The loss is the trunk's, plus {MTP_WEIGHTS[0]} times that of the MTP head, plus {further} times
those of the head applied to its own output (each on half as many windows), plus {BALANCE_WEIGHT} times a load-balancing loss.
The target of the head is the trunk's own distribution, because a draft counts when it is the trunk's choice. How far a
run gets in its minutes depends on the machine; `--steps` makes a run independent of the clock.

The gains of the two norms that the MTP head reads from, `model.norm` and `mtp.norm`, start log-normal (deviation
{GAIN_SPREAD} of the logarithm) and not at one. Those of published checkpoints are far from uniform; with uniform ones nobody
could measure whether the head is fed before or after them, since it normalises what it reads.
`scripts/acceptance.py --pre-norm` shows the difference.

## Held-out figures

Of these weights, computed in float32, on windows of {BLOCK} tokens each read from nothing;
{figures["held_out_tokens"]:,} tokens of {figures["bytes_per_token"]:.2f} bytes on average:

**{nats:.3f} nats a token** (perplexity {math.exp(nats):.1f}), **{per_byte:.3f} bits a byte**.

Greedy drafts against the trunk's first choice, in {figures["draft_rounds"]:,} single rounds, each after
{", ".join(map(str, PREFIXES))} tokens of a window of book text and the next true token:

{draft_table(figures)}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the tiny model on the held-out books; write its README.md.")
    parser.add_argument("--books", type=Path, required=True, help="the folder it was trained from")
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    args = parser.parse_args(argv)
    books = data.read_books(args.books)
    source = open_checkpoint(args.model)
    model = load_checkpoint(source, dtype=jnp.float32)
    figures = measure(model, Tokenizer.from_file(str(args.model / "tokenizer.json")), books)
    print(json.dumps(figures, indent=1))
    (args.model / "README.md").write_text(card(model, args.model, figures, books), encoding="utf-8")


if __name__ == "__main__":
    main()
