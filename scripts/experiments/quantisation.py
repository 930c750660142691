"""What quantising costs the embedded model: bytes, bits a byte of held-out text, acceptance and decode speed, type by type.

    python -m scripts.experiments.quantisation                 # bits a byte of the LICENSE file, which was not trained on
    python -m scripts.experiments.quantisation --books DIR     # of the held-out books

BF16, Q8_0, Q4_0 and IQ4_NL go through a GGUF file, int4 is quantised while the checkpoint is read; all stay packed in memory. On
a CPU a packed weight is unpacked for every product: that is the price of its bytes there, not a speed-up.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from checkpoints import TINY, open_checkpoint
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax import LLM, SamplingParams
from mtpjax.cli.convert import to_gguf
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model.cache import KV_BLOCK
from scripts.experiments import common
from scripts.tiny_model import data
from scripts.tiny_model.loss import window_loss
from scripts.tiny_model.report import acceptance, in_batches

GGUF = ("bf16", "q8_0", "q4_0", "iq4_nl")
TYPES = (*GGUF, "int4")
DRAFT = 3


def load(kind: str) -> tuple[LoadedModel, float]:
    """The embedded model with weights of a type, and the megabytes that its parameters take."""
    if kind in GGUF:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tiny.gguf"
            to_gguf(open_checkpoint(TINY), file, kind)
            model = load_checkpoint(open_checkpoint(file), dtype=jnp.float32, quantization="packed")
            return model, file.stat().st_size / 1e6
    model = load_checkpoint(open_checkpoint(TINY), dtype=jnp.float32, quantization=kind)
    return model, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e6


def unpacked(model: LoadedModel) -> LoadedModel:
    """The model with dequantised float32 weights."""

    def plain(leaf: Any) -> Any:
        return leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf

    return replace(model, params=jax.tree.map(plain, model.params, is_leaf=lambda x: isinstance(x, QuantizedTensor)))


def held_out(books: Path | None) -> tuple[str, int, np.ndarray]:
    """Name, bytes and windows `[N, KV_BLOCK + 1]` of the text that bits are counted on."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    if books:
        documents = [d for d in data.read_books(books) if d.split == "held-out"]
        text, tokens = "".join(d.text for d in documents), data.pack(documents, tokenizer)
    else:
        text = (common.ROOT / "LICENSE").read_text(encoding="utf-8")
        tokens = np.asarray(tokenizer.encode(text).ids, np.int32)
    windows = data.windows(tokens, KV_BLOCK + 1, KV_BLOCK)
    return (
        "held-out books" if books else "LICENSE",
        round(len(text.encode()) * len(windows) * KV_BLOCK / len(tokens)),
        windows,
    )


def experiment(smoke: bool, args: argparse.Namespace) -> dict[str, Any]:
    """A row for each type."""
    types, new, runs = (TYPES[:1] + TYPES[-1:], 8, 1) if smoke else (TYPES, 96, 5)
    name, size, windows = held_out(args.books)
    own = common.own_texts(2 if smoke else 160, KV_BLOCK)
    sides, rows = {}, {}
    loss = None
    for kind in types:
        model, megabytes = load(kind)
        plain = unpacked(model)  # the same values, faster on a CPU, and one program for all types
        loss = loss or jax.jit(partial(window_loss, model.graph))
        nats = sum(float(loss(plain.params, g)) for g in in_batches(windows))
        taken = acceptance(plain, own)
        rows[kind] = {"type": kind, "megabytes": megabytes, "bits_per_byte": nats / math.log(2) / size, **taken}
        sides[kind] = {k: LLM(model, num_speculative_tokens=k, max_model_len=384, max_num_seqs=1) for k in (0, DRAFT)}
        print(f"{kind:7} {megabytes:5.1f} MB  {rows[kind]['bits_per_byte']:.4f} bits a byte of {name}", flush=True)
    seconds: dict[tuple[str, int], list[float]] = {(t, k): [] for t in types for k in (0, DRAFT)}
    prompts = common.held_out_prompts()[: 1 if smoke else 3]
    for run in range(runs + 1):
        for (kind, k), times in seconds.items():
            outputs = [
                sides[kind][k].generate([p], SamplingParams(max_tokens=new, ignore_eos=True))[0] for p in prompts
            ]
            if run:  # the first compiles
                times.append(sum(o.metrics.decode_seconds for o in outputs))
    for kind, row in rows.items():
        for k in (0, DRAFT):
            ratios = [b / a for a, b in zip(seconds[kind, k], seconds["bf16", 0], strict=True)]
            row[f"speed_draft_{k}"] = statistics.median(ratios)
            row[f"seconds_draft_{k}"] = seconds[kind, k]
        speed = f"{row['speed_draft_0']:.2f} and {row[f'speed_draft_{DRAFT}']:.2f} x the speed of bf16 without drafts"
        print(f"{kind:7} {row['tokens_per_round']:.3f} tokens a round; {speed}", flush=True)
    return {"text": name, "draft": DRAFT, "acceptance": "real, greedy", "table": list(rows.values())}


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots(1, 3)
    table = result["table"]
    names = [r["type"] for r in table]
    bits = [r["bits_per_byte"] for r in table]
    axes[0].bar(names, bits)
    axes[0].set_ylim(min(bits) * 0.98, max(bits) * 1.01)
    axes[0].set_ylabel(f"bits a byte of {result['text']} (axis cut)")
    for row, height in zip(table, bits, strict=True):
        axes[0].annotate(f"{row['megabytes']:.1f} MB", (row["type"], height), ha="center", va="bottom", fontsize=8)
    for row in table:
        axes[1].plot(range(1, len(row["accepted"]) + 1), row["accepted"], "o-", label=row["type"])
    axes[1].set_xticks(range(1, len(table[0]["accepted"]) + 1))
    axes[1].set_xlabel("draft position")
    axes[1].set_ylabel("share of rounds that accept it and all before")
    axes[1].set_ylim(0, 1)
    axes[1].legend(fontsize=8)
    at = np.arange(len(table))
    for i, k in enumerate((0, result["draft"])):
        axes[2].bar(at + (i - 0.5) * 0.4, [r[f"speed_draft_{k}"] for r in table], 0.4, label=f"draft {k}")
    axes[2].set_xticks(at, names)
    axes[2].set_ylabel("decode speed ÷ bf16, draft 0")
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(f"Embedded model, weights packed in memory, {result['device']}, batch 1")


if __name__ == "__main__":
    common.run("quantisation", __doc__, experiment, plot, books="folder of the books the model was trained on")
