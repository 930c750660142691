"""Cost of quantising the embedded model: bytes, bits a byte of held-out text, acceptance and decode speed by type.

    python -m scripts.experiments.quantization                 # bits a byte of the LICENSE file, which was not trained
    on python -m scripts.experiments.quantization --books DIR     # of the held-out books

BF16, Q8_0, Q4_0 and IQ4_NL go through a GGUF file; int4 is quantised while the checkpoint is read. All stay packed in
memory. On a CPU a packed weight is unpacked for every product, so fewer bytes make it slower there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
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
from scripts.experiments import experiment
from scripts.tiny_model import data
from scripts.tiny_model.evaluation import acceptance, in_batches
from scripts.tiny_model.loss import window_loss

GGUF_TYPES = ("bf16", "q8_0", "q4_0", "iq4_nl")
TYPES = (*GGUF_TYPES, "int4")
DRAFT = 3


def load(weight_type: str) -> tuple[LoadedModel, float]:
    """Return the embedded model with weights of a type, and the megabytes of the file or of the parameters."""
    float32 = jnp.dtype(jnp.float32)
    if weight_type in GGUF_TYPES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tiny.gguf"
            to_gguf(open_checkpoint(TINY), file, weight_type)
            model = load_checkpoint(open_checkpoint(file), dtype=float32, quantization="packed")
            return model, file.stat().st_size / 1e6
    model = load_checkpoint(open_checkpoint(TINY), dtype=float32, quantization=weight_type)
    return model, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e6


def dequantized(model: LoadedModel) -> LoadedModel:
    """Return the model with its weights dequantised to float32."""

    def is_quantized(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedTensor)

    def to_array(leaf: Any) -> Any:
        return leaf.dequantize() if is_quantized(leaf) else leaf

    return replace(model, params=jax.tree.map(to_array, model.params, is_leaf=is_quantized))


def held_out(books: Path | None) -> tuple[str, int, np.ndarray]:
    """Return the name, the bytes and the windows `[N, KV_BLOCK + 1]` of the text that bits are counted on."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    if books:
        documents = [d for d in data.read_books(books) if d.split == "held-out"]
        text, tokens = "".join(d.text for d in documents), data.pack(documents, tokenizer)
    else:
        text = (experiment.ROOT / "LICENSE").read_text(encoding="utf-8")
        tokens = np.asarray(tokenizer.encode(text).ids, np.int32)
    windows = data.windows(tokens, KV_BLOCK + 1, KV_BLOCK)
    num_bytes = round(len(text.encode()) * len(windows) * KV_BLOCK / len(tokens))
    return "held-out books" if books else "LICENSE", num_bytes, windows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return a row for each type."""
    types, max_tokens, runs = (TYPES[:1] + TYPES[-1:], 8, 1) if args.smoke else (TYPES, 96, 5)
    name, num_bytes, windows = held_out(args.books)
    texts = experiment.generated_texts(2 if args.smoke else 160, KV_BLOCK)
    variants: dict[str, dict[int, LLM]] = {}
    rows: dict[str, dict[str, Any]] = {}
    loss: Callable[..., Any] | None = None
    for weight_type in types:
        model, megabytes = load(weight_type)
        plain = dequantized(model)  # the same values, but faster on a CPU, and one program for all types
        loss = loss or jax.jit(partial(window_loss, model.graph))
        nats = sum(float(loss(plain.params, batch)) for batch in in_batches(windows))
        bits_per_byte = nats / math.log(2) / num_bytes
        rows[weight_type] = {"type": weight_type, "megabytes": megabytes, "bits_per_byte": bits_per_byte}
        rows[weight_type] |= acceptance(plain, texts)
        variants[weight_type] = {
            k: LLM(model, num_speculative_tokens=k, max_model_len=384, max_num_seqs=1) for k in (0, DRAFT)
        }
        print(f"{weight_type:7} {megabytes:5.1f} MB  {bits_per_byte:.4f} bits a byte of {name}", flush=True)
    seconds: dict[tuple[str, int], list[float]] = {(t, k): [] for t in types for k in (0, DRAFT)}
    prompts = experiment.held_out_prompts()[: 1 if args.smoke else 3]
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    for run in range(runs + 1):
        for (weight_type, k), times in seconds.items():
            outputs = [variants[weight_type][k].generate([prompt], params)[0] for prompt in prompts]
            if run:  # the first one compiles
                times.append(sum(o.metrics.decode_seconds for o in outputs))
    for weight_type, row in rows.items():
        for k in (0, DRAFT):
            ratios = [base / own for own, base in zip(seconds[weight_type, k], seconds["bf16", 0], strict=True)]
            row[f"speed_draft_{k}"] = statistics.median(ratios)
            row[f"seconds_draft_{k}"] = seconds[weight_type, k]
        speed = f"{row['speed_draft_0']:.2f} and {row[f'speed_draft_{DRAFT}']:.2f} x the speed of bf16 without drafts"
        print(f"{weight_type:7} {row['tokens_per_round']:.3f} tokens a round; {speed}", flush=True)
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
    # The name of the published files.
    experiment.run("quantisation", __doc__, measure, plot, books="folder of the books the model was trained on")
