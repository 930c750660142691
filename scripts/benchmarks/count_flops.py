"""Floating-point operations of one prompt chunk, without and with the MTP head. Nothing is allocated or run.

    python -m scripts.benchmarks.count_flops [--model 35b-a3b ...] [--chunk 2048] [--context 8192]
                                             [--mtp-prompt-tokens 64 ...]

Variants: `off` has no MTP head. `sync` computes the head's keys and values and nothing else of it
(`mtpjax.decoding.steps.prefill`). `layer` runs the whole MTP layer on every row, and the LM head on the output rows of
trunk and head.

Output rows of the chunk: none (inner chunks), last, all, or first. The last layer of the trunk leaves out the rows in
front of the first one that is an output row or that the MTP head reads. With `first` it runs on all rows in every
variant, so the ratio to `off` is the head's own share.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtpjax.config import ConfigError, ModelConfig
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.hf_config import config_from_hf
from mtpjax.model import abstract_model, make_positions
from mtpjax.model.cache import Cache, new_cache, padded_kv_length
from mtpjax.presets import PRESETS, preset
from scripts.benchmarks.flops import Flops, count_flops
from scripts.benchmarks.jitted_steps import prefill
from scripts.benchmarks.while_trip_counts import while_trip_counts

FIRST = OutputRows.at(0)
ROWS = {"none": OutputRows.none(), "last": OutputRows.last(), "all": OutputRows.all()}
VARIANTS = ("off", "sync", "layer")
DTYPE = jnp.dtype(jnp.bfloat16)


@partial(jax.jit, static_argnames=("graph", "rows"))
def whole_layer(
    params: Any, tokens: Array, following: Array, pad: Array, cache: Cache, *, graph: Any, rows: OutputRows
) -> tuple[Array, Array, Array, Cache]:
    """Run the whole MTP layer on every row of the chunk, for comparison; arguments as `mtpjax.decoding.steps.prefill`.

    Returns:
        the logits and the draft logits of the output rows, the head's hidden states of all rows, the cache.
    """
    model = nnx.merge(graph, params)
    positions = make_positions(model.cfg, cache.length, tokens.shape[1], pad, kv_len=cache.kv_len)
    out, cache = model.trunk(tokens, cache, positions)
    hidden = model.final_norm(out)
    drafted, cache = model.mtp_step(hidden, following, cache, positions)
    cache = cache.replace(length=cache.length + tokens.shape[1] - pad)
    return model.head(rows.take(hidden)), model.head(rows.take(drafted)), drafted, cache


@lru_cache(maxsize=4)
def _abstract_params(cfg: ModelConfig) -> tuple[Any, Any]:
    return nnx.split(abstract_model(cfg, DTYPE))


@lru_cache(maxsize=4)  # the chunks of a prompt have few programs
def trace(
    cfg: ModelConfig, variant: str, rows: OutputRows, *, chunk: int, kv_len: int, mtp_rows: int | None = None
) -> Any:
    """Return the program of one chunk of one sequence (`jax.stages.Traced`).

    Args:
        kv_len: positions of the cache.
        mtp_rows: see `mtpjax.decoding.steps.prefill`.
    """
    cfg = cfg.without_mtp() if variant == "off" else cfg
    graph, params = _abstract_params(cfg)
    cache = jax.eval_shape(lambda: new_cache(cfg, 1, kv_len, dtype=DTYPE))
    ids, pad = jax.ShapeDtypeStruct((1, chunk), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    if variant == "layer":
        return whole_layer.trace(params, ids, ids, pad, cache, graph=graph, rows=rows)
    return prefill.trace(params, ids, ids, pad, cache, graph=graph, rows=rows, mtp_rows=mtp_rows)


def flops(
    cfg: ModelConfig,
    variant: str,
    rows: OutputRows,
    *,
    chunk: int,
    context: int,
    mtp_rows: int | None = None,
    max_len: int = 0,
) -> Flops:
    """Count the operations of one chunk that ends at `context` committed tokens.

    The cache holds `max_len` tokens, or `context` if these are more.
    """
    kv_len = padded_kv_length(max(context, max_len), 1)
    program = trace(cfg, variant, rows, chunk=chunk, kv_len=kv_len, mtp_rows=mtp_rows).jaxpr
    num_output_rows = max(rows.num_trailing_rows(chunk), mtp_rows or 0 if variant == "sync" else 0)
    trip_counts = while_trip_counts(cfg, rows=chunk, context=context, num_output_rows=num_output_rows)
    return count_flops(program, trip_counts)


def prompt_flops(cfg: ModelConfig, *, prompt: int, chunk: int, mtp_prompt_tokens: int | None) -> tuple[float, float]:
    """Count the operations of reading a whole prompt in chunks: (without the head, with it).

    The head reads the last `mtp_prompt_tokens` tokens, or all for None. No row is an output row, as in the engine.
    """
    off = on = 0.0
    for end in range(chunk, prompt + 1, chunk):
        mtp_rows = None if mtp_prompt_tokens is None else max(0, min(mtp_prompt_tokens - (prompt - end), chunk))
        count = partial(flops, cfg, rows=OutputRows.none(), chunk=chunk, context=end, max_len=prompt)
        off += count("off").total
        on += count("sync", mtp_rows=mtp_rows).total
    return off, on


def table(cfg: ModelConfig, *, chunk: int, context: int) -> list[tuple[str, str, float, float, float]]:
    """Return for each case (rows, variant, operations, ratio to `off` of the same rows, ratio to `off` of `first`)."""
    lines, base = [], flops(cfg, "off", FIRST, chunk=chunk, context=context).total
    for name, rows in {**ROWS, "first": FIRST}.items():
        off = 0.0
        for variant in VARIANTS:
            total = flops(cfg, variant, rows, chunk=chunk, context=context).total
            off = off or total
            lines.append((name, variant, total, total / off, total / base))
    return lines


def config(name: str) -> ModelConfig:
    """Return the config of a published size by name, or that of a checkpoint folder."""
    file = Path(name) / "config.json"
    return config_from_hf(json.loads(file.read_text()), source=str(file)) if file.is_file() else preset(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["35b-a3b"], help=f"{', '.join(PRESETS)}, or checkpoint folders")
    parser.add_argument("--chunk", type=int, default=2048, help="rows of the prompt chunk (%(default)s)")
    parser.add_argument("--context", type=int, default=8192, help="tokens read when the chunk ends (%(default)s)")
    parser.add_argument(
        "--mtp-prompt-tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="also: a whole prompt of --context tokens, of which the head reads all or the last N",
    )
    args = parser.parse_args()
    if not 1 <= args.chunk <= args.context:
        parser.error(f"--chunk is {args.chunk}; expected 1 ... --context = {args.context}")
    print(
        "| model | output rows | MTP | Tflop a chunk | / off, same rows | / off, first row |\n|---|---|---|---|---|---|"
    )
    for name in args.model:
        try:
            cfg = config(name)
        except ConfigError as error:
            parser.error(str(error))
        if not cfg.mtp_layers:
            parser.error(f"{name} has no MTP head; there is nothing to compare")
        for rows, variant, total, same_rows, first_row in table(cfg, chunk=args.chunk, context=args.context):
            print(f"| {name} | {rows} | {variant} | {total / 1e12:.4g} | {same_rows:.4f} | {first_row:.4f} |")
        for read in (None, *args.mtp_prompt_tokens) if args.mtp_prompt_tokens else ():
            off, on = prompt_flops(cfg, prompt=args.context, chunk=args.chunk, mtp_prompt_tokens=read)
            tokens = "all" if read is None else f"the last {read}"
            print(f"{name}, a prompt of {args.context} tokens, the head reads {tokens}: {on / off:.4f} of MTP off")


if __name__ == "__main__":
    main()
