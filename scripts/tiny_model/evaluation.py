"""Figures of the embedded model on held-out text: loss, acceptance of drafts, and a compressor for comparison."""

from __future__ import annotations

import json
import lzma
import math
from functools import partial
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model.cache import KV_BLOCK
from scripts.benchmarks.draft_rounds import DEPTH, count_accepted
from scripts.tiny_model import data
from scripts.tiny_model.loss import window_loss

BATCH = 16


def in_batches(windows: np.ndarray) -> list[np.ndarray]:
    """Cut windows `[N, T]` into batches of at most `BATCH`."""
    return [windows[i : i + BATCH] for i in range(0, len(windows), BATCH)]


def acceptance(model: LoadedModel, windows: np.ndarray) -> dict[str, Any]:
    """Return the shares of single rounds in which the trunk accepts drafts 1 … `DEPTH`.

    "accepted" are shares of all rounds, "accepted_given_previous" of the rounds that accepted every draft before.
    """
    counts = count_accepted(model.graph, model.params, windows, batch=BATCH)
    depths = range(1, DEPTH + 1)
    return {
        "draft_rounds": len(counts),
        "accepted": [float(np.mean(counts >= d)) for d in depths],
        "accepted_given_previous": [float(np.mean(counts[counts >= d - 1] >= d)) for d in depths],
        "tokens_per_round": 1 + float(counts.mean()),
    }


def xz_bits(held_out: bytes, training: bytes) -> tuple[float, float]:
    """Return the bits a byte that `xz -9e` spends on the held-out text: alone, and after the training text."""

    def size(text: bytes) -> int:
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))

    after = size(training + held_out) - size(training)
    return 8 * size(held_out) / len(held_out), 8 * after / len(held_out)


def evaluate(model: LoadedModel, tokenizer: Tokenizer, documents: list[data.Document]) -> dict[str, Any]:
    """Return loss, `xz` and acceptance on the held-out text of each domain, and print them.

    The text is cut into windows of one block of attention, each read from an empty cache. Bytes are those of the text
    without special tokens; the nats are those of all tokens, special ones included.
    """
    loss = jax.jit(partial(window_loss, model.graph))
    figures = {}
    for domain in data.LICENCES:
        held_out = [d for d in documents if d.domain == domain and d.split == "held-out"]
        training = [d for d in documents if d.domain == domain and d.split == "train"]
        held_out_text, training_text = (
            data.without_special("".join(d.text for d in split)).encode() for split in (held_out, training)
        )
        tokens = data.pack(held_out, tokenizer)
        windows = data.windows(tokens, KV_BLOCK + 1, KV_BLOCK)
        nats = sum(float(loss(model.params, batch)) for batch in in_batches(windows)) / (len(windows) * KV_BLOCK)
        alone, after = xz_bits(held_out_text, training_text)
        figures[domain] = {
            "tokens": len(windows) * KV_BLOCK,
            "bytes_per_token": len(held_out_text) / len(tokens),
            "nats_per_token": nats,
            "bits_per_byte": nats / math.log(2) * len(tokens) / len(held_out_text),
            "xz_bits_per_byte": alone,
            "xz_after_training_text_bits_per_byte": after,
            **acceptance(model, windows),
        }
        print(domain, json.dumps(figures[domain], indent=1), flush=True)
    return figures
