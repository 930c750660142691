"""The project's table: tokens/s of prefill and decode and elapsed seconds by prompt length, MTP off and by draft
length.

    python -m scripts.benchmarks.bench_table                       (random weights, simulated acceptance)
    python -m scripts.benchmarks.bench_table --shape 35b-a3b --quantization iq4nl --interleave prompt
    python -m scripts.benchmarks.bench_table --model FOLDER_OR_GGUF --text FILE                (real acceptance)
    python -m scripts.benchmarks.bench_table --model tiny --text talk --prompt-tokens 128 512 --chunk 128 --out PREFIX

The random model is a Mixture-of-Experts with 50 M active parameters, if `--shape` names no other.

The variants take turns chunk by chunk while they read the prompt, with all their caches in memory (`--interleave
prompt` keeps one cache at a time), and run by run while they decode. The first run is a warm-up. Programs are compiled
before anything is timed.

Beside the draft lengths there are ablations of the prefill: every row an output row, the whole MTP layer on every row,
and both. Draft 0 is measured as the engine runs it, which leaves out most of the last layer because nothing reads its
rows, and as "whole", with every layer on every row: other engines call that MTP off. Draft length 3, the best one for
most texts, is also measured with an MTP head that reads only the last tokens of the prompt
(`LLM(mtp_prompt_tokens=64)`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints import TINY, open_checkpoint
from kernels_pallas.platform import platform
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.load import cache_dtype, load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.random_init import random_model
from mtpjax.presets import PRESETS, preset
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer
from scripts.benchmarks.random_models import MOE_50M_ACTIVE
from scripts.benchmarks.results import describe, memory_peak_mb, write_json
from scripts.benchmarks.roofline import CEILINGS, Ceilings, chunk_work, measure_ceilings, round_work
from scripts.benchmarks.table_output import write_table
from scripts.benchmarks.variants import MTP_OFF_WHOLE, Decoder, make_variants, measure, without_mtp

TALK = "talk"


def load(args: argparse.Namespace) -> tuple[LoadedModel, LoadedModel, Tokenizer | None, Any]:
    """Return the model with its MTP head, the model without it, the tokenizer (or None), and the dtype of the cache."""
    dtype = jnp.dtype(args.dtype)
    if args.model == "random":
        cfg = preset(args.shape) if args.shape else MOE_50M_ACTIVE
        model = random_model(cfg, quantization=args.quantization, dtype=dtype)
        return model, without_mtp(model), None, cache_dtype(dtype)
    source = open_checkpoint(TINY if args.model == "tiny" else args.model)
    model, trunk = (
        load_checkpoint(source, dtype=dtype, mtp=mtp, quantization=args.quantization) for mtp in (True, False)
    )
    if not model.cfg.mtp_layers:
        raise SystemExit(f"{args.model}: no MTP head; there is nothing to compare")
    tokenizer = load_tokenizer(source.tokenizer_file) if source.tokenizer_file else None
    return model, trunk, tokenizer, cache_dtype(dtype)


def read_text(name: str) -> str:
    """Read a UTF-8 file, or the held-out conversations of the embedded model."""
    if name != TALK:
        return Path(name).read_text(encoding="utf-8")
    from scripts.tiny_model.data import read_talk  # needs the packages that training needs

    return next(document.text for document in read_talk() if document.split == "held-out")


def prompt_ids(tokenizer: Tokenizer | None, text: Sequence[str], vocab_size: int, length: int) -> np.ndarray:
    """Return token ids `[1, length + 1]`: the start of the text, or random ids if there is none."""
    if not text:
        return np.random.default_rng(length).integers(0, vocab_size, (1, length + 1)).astype(np.int32)
    assert tokenizer is not None  # `main` has checked it
    ids = [i for name in text for i in tokenizer.encode(read_text(name))]
    if len(ids) <= length:
        raise SystemExit(f"--text has {len(ids)} tokens; {length + 1} are needed")
    return np.array([ids[: length + 1]], np.int32)


def floors(
    ceilings: Ceilings,
    model: LoadedModel,
    decoder: Decoder | None,
    context: int,
    args: argparse.Namespace,
    row: dict[str, Any],
) -> dict[str, float]:
    """Return the least seconds of prefill and decode that the device's bandwidth and matmul rate allow; see
    roofline.py.
    """
    size = jnp.dtype(args.dtype).itemsize
    ends = range(args.chunk, context + 1, args.chunk)
    chunks = [chunk_work(model.cfg, model.params, args.chunk, end, size) for end in ends]
    found = {"prefill_floor": sum(ceilings.floor(w.bytes, w.flops) for w in chunks)}
    if decoder:
        works = round_work(model.cfg, model.params, decoder.draft, 1, context, size).values()
        round_floor = sum(ceilings.floor(w.bytes, w.flops) for w in works)
        found["decode_floor"] = round_floor * args.max_tokens / row["tokens_per_round"]
    return found


def acceptance_rates(text: str) -> list[float]:
    """Parse comma-separated numbers."""
    return [float(number) for number in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="random", help="random (50 M active), tiny (embedded), or a checkpoint")
    add("--random", dest="model", action="store_const", const="random", help="random weights, the default")
    add("--shape", choices=list(PRESETS), help="shape of the random model (default: 50 M active parameters)")
    add("--quantization", help="int4, int8, iq4nl, fp8 or packed, as for mtpjax.LLM")
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 elsewhere")
    add(
        "--interleave",
        choices=["chunk", "prompt"],
        default="chunk",
        help="what a variant reads before the next one takes its turn (%(default)s)",
    )
    add(
        "--text",
        nargs="*",
        default=[],
        help=f"UTF-8 files that give the prompts, or {TALK}: held-out conversations of the embedded model's kind "
        "(default: random token ids)",
    )
    add("--prompt-tokens", type=int, nargs="+", default=[512, 2048, 8192], help="prompt lengths, multiples of --chunk")
    add("--num-speculative-tokens", type=int, nargs="+", default=[0, 2, 3, 4], help="draft lengths")
    add("--max-tokens", type=int, default=64, help="tokens to decode after each prompt")
    add("--chunk", type=int, default=512, help="rows of a prompt chunk")
    add("--runs", type=int, default=3)
    add("--synthetic-acceptance-length", type=float, help="simulated tokens a round, for every draft length")
    add("--acceptance", type=acceptance_rates, help="simulated: share of rounds that accept 1, 2, ... drafts")
    add("--roofline", action="store_true", help="measure the device's ceilings and show the share of them")
    add("--no-ablations", action="store_true", help="only the draft lengths, and MTP off with whole layers")
    add("--out", help="write PREFIX.json, .csv, .md and .png")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if platform() == "cpu" else "bfloat16")
    if args.shape and args.model != "random":
        parser.error(f"--shape is of random models, and --model is {args.model}; leave one out")
    args.simulate = args.model == "random" or bool(args.synthetic_acceptance_length or args.acceptance)
    drafts = args.num_speculative_tokens
    if 0 not in drafts or not all(0 <= k <= 8 for k in drafts):
        parser.error(
            f"--num-speculative-tokens is {drafts}; expected numbers from 0 to 8 with 0, the base of all ratios, "
            "among them"
        )
    if wrong := [length for length in args.prompt_tokens if length < 1 or length % args.chunk]:
        parser.error(f"--prompt-tokens has {wrong}; expected positive multiples of --chunk {args.chunk}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    model, trunk, tokenizer, dtype = load(args)
    ceilings = measure_ceilings(jnp.dtype(args.dtype), **CEILINGS[platform()]) if args.roofline else None
    if args.text and tokenizer is None:
        raise SystemExit(f"{args.model}: no tokenizer.json, so --text cannot be read")
    vocab_size = min(model.cfg.vocab_size, tokenizer.size) if tokenizer else model.cfg.vocab_size
    try:
        variants, decoders = make_variants(optimize_for_cpu(model), optimize_for_cpu(trunk), args, dtype, vocab_size)
    except ValueError as error:
        raise SystemExit(f"bench_table: {error}") from None
    rows = []
    for context in args.prompt_tokens:
        ids = prompt_ids(tokenizer, args.text, vocab_size, context)
        measured = measure(variants, decoders, ids, args.chunk, args.runs, args.interleave)
        for name, row in measured.items():
            least = floors(ceilings, model, decoders.get(name), context, args, row) if ceilings else {}
            rows.append({"prompt_tokens": context, "side": name, "new_tokens": args.max_tokens, **row, **least})
            base = measured[MTP_OFF_WHOLE]["prefill_seconds"]
            ratio = statistics.median(b / a for a, b in zip(row["prefill_seconds"], base, strict=True))
            speed = context / statistics.median(row["prefill_seconds"])
            print(f"{context:7} {name:28} prefill {speed:8.1f} tok/s, {ratio:.3f} x", flush=True)
    result = {
        "what": "table",
        **describe(),
        "model": args.shape or args.model,
        "dtype": args.dtype,
        "weights": args.quantization,
        "chunk": args.chunk,
        "acceptance": "simulated acceptance" if args.simulate else "real acceptance",
        "prompts": f"text ({' '.join(Path(name).name for name in args.text)})" if args.text else "random tokens",
        "memory_peak_mb": memory_peak_mb(),
        "temporary_mb": {v.name: v.temporary_mb for v in variants},
        "ceilings": asdict(ceilings) if ceilings else None,
        "rows": rows,
    }
    if args.out:
        write_json(args.out + ".json", result)
    write_table(result, args.out)
    return result


if __name__ == "__main__":
    main()
