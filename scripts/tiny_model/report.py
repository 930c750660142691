"""Measure the embedded model on what was held out, domain by domain, and write its model card.

    python -m scripts.tiny_model.report --books DIR --model checkpoints/tiny [--without DIR --with DIR]

`--with` and `--without` are two further runs, equal but for `--mtp-steps`, whose acceptance the card compares; without them
it keeps the comparison of the report.json that is there.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from checkpoints import open_checkpoint
from mtpjax import LLM
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model.cache import KV_BLOCK
from scripts.benchmarks.draft_rounds import DEPTH, count_agreeing
from scripts.tiny_model import data
from scripts.tiny_model.card import card
from scripts.tiny_model.loss import window_loss
from scripts.tiny_model.samples import looping, samples

BATCH = 16


def in_batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def acceptance(model: LoadedModel, windows: np.ndarray) -> dict[str, Any]:
    """Shares of single rounds in which the trunk takes draft 1..`DEPTH`: of all, and of those that took all before."""
    counts = count_agreeing(model.graph, model.params, windows, batch=BATCH)
    depths = range(1, DEPTH + 1)
    return {
        "draft_rounds": len(counts),
        "accepted": [float(np.mean(counts >= d)) for d in depths],
        "accepted_given_previous": [float(np.mean(counts[counts >= d - 1] >= d)) for d in depths],
        "tokens_per_round": 1 + float(counts.mean()),
    }


def xz_bits(held_out: bytes, training: bytes) -> tuple[float, float]:
    """Bits a byte that `xz -9e` spends on the held-out text: alone, and after having read the training text."""

    def size(text: bytes) -> int:
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))

    after = size(training + held_out) - size(training)
    return 8 * size(held_out) / len(held_out), 8 * after / len(held_out)


def measure(model: LoadedModel, tokenizer: Tokenizer, documents: list[data.Document]) -> dict[str, Any]:
    """Per domain: loss, `xz` and draft agreement on what was held out; windows of one block, each read from nothing.

    Bytes are those of the text without special tokens; the nats are of all tokens, special ones too.
    """
    loss = jax.jit(partial(window_loss, model.graph))
    figures = {}
    for domain in data.LICENCES:
        held_out = [d for d in documents if d.domain == domain and d.split == "held-out"]
        training = [d for d in documents if d.domain == domain and d.split == "train"]
        text, before = (data.without_special("".join(d.text for d in some)).encode() for some in (held_out, training))
        tokens = data.pack(held_out, tokenizer)
        windows = data.windows(tokens, KV_BLOCK + 1, KV_BLOCK)
        nats = sum(float(loss(model.params, some)) for some in in_batches(windows)) / (len(windows) * KV_BLOCK)
        alone, after = xz_bits(text, before)
        figures[domain] = {
            "tokens": len(windows) * KV_BLOCK,
            "bytes_per_token": len(text) / len(tokens),
            "nats_per_token": nats,
            "bits_per_byte": nats / math.log(2) * len(tokens) / len(text),
            "xz_bits_per_byte": alone,
            "xz_after_training_text_bits_per_byte": after,
            **acceptance(model, windows),
        }
        print(domain, json.dumps(figures[domain], indent=1), flush=True)
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--books", type=Path, required=True, help="the folder it was trained from")
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--with", dest="several", type=Path, help="a run with the same --mtp-steps as --model")
    parser.add_argument("--without", dest="single", type=Path, help="the same run with --mtp-steps 1")
    args = parser.parse_args(argv)
    if (args.several is None) != (args.single is None):
        parser.error("--with and --without belong together: give both or neither.")
    documents = data.read_all(args.books)

    def loaded(folder: Path) -> LoadedModel:
        return load_checkpoint(open_checkpoint(folder), dtype=jnp.float32)

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = loaded(args.model)
    report: dict[str, Any] = {"domains": measure(model, tokenizer, documents)}
    llm = LLM(args.model, num_speculative_tokens=3, dtype="float32", max_model_len=512, max_num_seqs=20)
    report |= {"loops": looping(llm, tokenizer, documents), "samples": samples(llm, args.model)}
    if args.several:
        held_out = [d for d in documents if d.domain == "books" and d.split == "held-out"]
        windows = data.windows(data.pack(held_out, tokenizer), KV_BLOCK + 1, KV_BLOCK)
        report["mtp_steps"] = [
            {"training": json.loads((f / "training.json").read_text()), **acceptance(loaded(f), windows)}
            for f in (args.single, args.several)
        ]
    elif (old := args.model / "report.json").is_file() and "mtp_steps" in (kept := json.loads(old.read_text())):
        report["mtp_steps"] = kept["mtp_steps"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    text = card(model.cfg, parameters, args.model, report, documents)
    (args.model / "README.md").write_text(text, encoding="utf-8")
    (args.model / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
