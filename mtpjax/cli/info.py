"""Describe a checkpoint: what it is, its sizes, its quantisation, its MTP head, the memory it takes and the cards it
fits.

    mtpjax info [FILE_OR_FOLDER] [--context N] [--max-num-seqs N] [--draft-vocab-size N]

Only configs and tensor headers are read. Memory is computed, not measured: weights as a GPU holds them (matrices of a
quantised file stay packed, others are bfloat16) and the cache of the sequences. Programs need some hundred MiB more.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from checkpoints import (
    TINY,
    GgufFile,
    OrbaxDirectory,
    QuantizedDirectory,
    TensorSource,
    open_checkpoint,
)
from mtpjax.config import ModelConfig
from mtpjax.hf_config import config_from_hf
from mtpjax.loading.weight_map import check_source
from mtpjax.model import abstract_model
from mtpjax.model.cache import new_cache, padded_kv_length
from mtpjax.text.chat_template import find_chat_template

PROG = "mtpjax info"
# Memory of common cards in GiB, as the driver reports it.
CARDS = {
    "RTX 3060 12GB": 12.0,
    "RTX 4080 16GB": 16.0,
    "RTX 3090 / 4090 24GB": 24.0,
    "RTX 5090 32GB": 31.8,
    "A100 40GB": 39.6,
    "A100 / H100 80GB": 79.6,
    "H200 141GB": 139.8,
    "B200 180GB": 178.4,
}
HEADROOM = 1.0  # GiB that a card keeps for programs, temporaries and the driver


def describe_model(cfg: ModelConfig) -> str:
    """Return the architecture of a model in one line."""
    mlp = f"dense MLP of {cfg.mlp_size:,}"
    if cfg.num_experts:
        mlp = f"{cfg.num_experts} experts of {cfg.expert_size:,}, {cfg.experts_per_token} for a token, and a shared one"
    return (
        f"{cfg.num_layers} layers ({cfg.linear_layers} Gated DeltaNet, {cfg.full_layers} attention), hidden size "
        f"{cfg.hidden_size:,}, {mlp}, vocabulary {cfg.vocab_size:,}"
    )


def describe_format(source: TensorSource | OrbaxDirectory) -> str:
    """Return the format of a checkpoint in a few words."""
    if isinstance(source, GgufFile):
        return f"GGUF file ({source.metadata['general.architecture']})"
    if isinstance(source, OrbaxDirectory):
        return "Orbax folder"
    if isinstance(source, QuantizedDirectory):
        method = source.settings["quant_method"]
        return f"Hugging Face folder, quantised with {method}"
    return "Hugging Face folder"


def weight_types(source: TensorSource) -> Counter[str]:
    """Count the bytes of the stored weights by type. Weights of several types count as "A + B"."""
    sizes: Counter[str] = Counter()
    for name, info in source.tensors.items():
        type_name = info.dtype.name
        if isinstance(source, GgufFile):
            type_name = " + ".join(dict.fromkeys(tensor.type.name for tensor in source.stored[name].tensors))
        elif info.nbytes != math.prod(info.shape) * info.dtype.itemsize:
            type_name = "packed"
        sizes[type_name] += info.nbytes
    return sizes


def gpu_weight_bytes(source: TensorSource | OrbaxDirectory, cfg: ModelConfig) -> int:
    """Return the bytes of the weights in the memory of a GPU, in bfloat16 where they are not packed."""
    if isinstance(source, GgufFile | QuantizedDirectory):
        total = 0
        for info in source.tensors.values():
            is_packed = info.nbytes < math.prod(info.shape) * min(info.dtype.itemsize, 2)
            itemsize = 2 if len(info.shape) > 1 else 4
            total += info.nbytes if is_packed else math.prod(info.shape) * itemsize
        return total
    params = nnx.split(abstract_model(cfg, jnp.bfloat16))[1]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def num_parameters(cfg: ModelConfig) -> int:
    """Count the parameters of a model, its MTP head included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.split(abstract_model(cfg))[1]))


def cache_bytes(cfg: ModelConfig, context: int, max_num_seqs: int, num_speculative_tokens: int = 3) -> int:
    """Return the bytes of the bfloat16 cache of `max_num_seqs` sequences of `context` tokens."""
    kv_len = padded_kv_length(context, num_speculative_tokens + 1)
    cache = jax.eval_shape(lambda: new_cache(cfg, max_num_seqs, kv_len, dtype=jnp.bfloat16))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def format_bytes(size: float) -> str:
    """Return a size in GiB, or in MiB below 0.1 GiB, with three digits."""
    return f"{size / 2**30:,.3g} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:,.3g} MiB"


def draft_head_bytes(source: TensorSource | OrbaxDirectory, cfg: ModelConfig, draft_vocab_size: int) -> int:
    """Return the bytes that a draft head of that many rows takes on a GPU: they are copies of rows of the LM head."""
    row = 2 * cfg.hidden_size
    if isinstance(source, GgufFile | QuantizedDirectory):
        info = source.tensors["embed_tokens.weight" if cfg.tied_embeddings else "lm_head.weight"]
        row = min(row, info.nbytes // info.shape[0])
    return row * min(draft_vocab_size, cfg.vocab_size)


def describe(
    path: Path, context: int, max_num_seqs: int, draft_vocab_size: int | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the lines of the description as (title, text).

    Raises:
        checkpoints.CheckpointError, mtpjax.config.ConfigError: the checkpoint cannot be read.
    """
    source = open_checkpoint(path)
    yield "checkpoint", f"{path}: {describe_format(source)}"
    if isinstance(source, OrbaxDirectory):
        cfg = config_from_hf(source.config, source=str(source.path / "config.json"))
    else:
        cfg = check_source(source)
    yield "model", describe_model(cfg)
    count = num_parameters(cfg)
    yield "parameters", f"{count / 1e9:,.3g} billion" if count >= 1e9 else f"{count / 1e6:,.3g} million"
    if not isinstance(source, OrbaxDirectory):
        types = weight_types(source).most_common()
        yield "weights", ", ".join(f"{name} {format_bytes(size)}" for name, size in types)
    yield "MTP head", "yes: it drafts" if cfg.mtp_layers else "no: decoding without drafts"
    scaling, positions = cfg.rope_scaling, f"up to {cfg.max_position:,}"
    if scaling is not None:
        positions += f" ({scaling.kind} RoPE: {scaling.factor:g} times the original {scaling.original_max_position:,})"
    yield "positions", positions
    yield "tokenizer", describe_tokenizer(source)
    context = min(context, cfg.max_position)
    weights, cache = gpu_weight_bytes(source, cfg), cache_bytes(cfg, context, max_num_seqs)
    if draft_vocab_size is not None and cfg.mtp_layers:
        extra = draft_head_bytes(source, cfg, draft_vocab_size)
        rows = f"{draft_vocab_size:,} of {cfg.vocab_size:,} rows of the LM head"
        yield "draft head", f"{rows}: {format_bytes(extra)} more"
        weights += extra
    yield (
        "GPU memory",
        f"{format_bytes(weights)} of weights + {format_bytes(cache)} of cache for {max_num_seqs} x {context:,} tokens "
        f"= {format_bytes(weights + cache)}",
    )
    yield "CPU memory", f"{format_bytes(4 * count)} of weights in float32, {format_bytes(2 * count)} in bfloat16"
    fitting = [name for name, memory in CARDS.items() if (weights + cache) / 2**30 + HEADROOM <= memory]
    yield "fits", f"{', '.join(fitting)}" if fitting else f"none of {', '.join(CARDS)}; one device only"


def describe_tokenizer(source: TensorSource | OrbaxDirectory) -> str:
    """Return whether the checkpoint has a tokenizer and a chat template."""
    if isinstance(source, GgufFile):
        has_tokenizer = "tokenizer.ggml.tokens" in source.metadata
        has_template = "tokenizer.chat_template" in source.metadata
    else:
        has_tokenizer = source.tokenizer_file is not None
        has_template = find_chat_template(source.path) is not None
    tokenizer = "yes" if has_tokenizer else "no: prompts are token ids"
    return f"{tokenizer}; chat template: {'yes' if has_template else 'no'}"


def main(argv: list[str] | None = None) -> int:
    """Run `mtpjax info`. Returns 2 if the checkpoint cannot be read."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, nargs="?", default=TINY, help="file or folder (default: the embedded model)")
    parser.add_argument("--context", type=int, default=32_768, metavar="N", help="tokens of a sequence (default 32768)")
    parser.add_argument("--max-num-seqs", type=int, default=1, metavar="N", help="sequences at a time (default 1)")
    draft_vocab = "count the memory of a draft head for LLM(draft_vocab_size=N)"
    parser.add_argument("--draft-vocab-size", type=int, metavar="N", help=draft_vocab)
    args = parser.parse_args(argv)
    for name in ("context", "max_num_seqs", "draft_vocab_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    try:
        for title, text in describe(args.path, args.context, args.max_num_seqs, args.draft_vocab_size):
            print(f"{title:<12}{text}")
    except (ValueError, OSError) as error:  # CheckpointError and ConfigError are ValueErrors
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    return 0
