"""The table of this project: prefill tok/s, decode tok/s and elapsed seconds by prompt length, with MTP off and by draft length.

    python -m scripts.benchmarks.bench_table                                     # random 50 M-active MoE, simulated acceptance
    python -m scripts.benchmarks.bench_table --shape 35b-a3b --weights iq4nl --turns prompt --contexts 1024 8192 32768
    python -m scripts.benchmarks.bench_table --model FOLDER_OR_GGUF --text FILE  # real acceptance
    python -m scripts.benchmarks.bench_table --model tiny --text talk --contexts 128 512 1024 --chunk 128 --out /tmp/table

Sides take turns chunk by chunk while the prompt is read (all their caches stand side by side; `--turns prompt` keeps one at a
time) and run by run while decoding; the first run is a warm-up; programs are
compiled before anything is timed. Beside the drafts stand ablations of the prefill: every row an output row, the whole MTP layer
on every row, and both. Draft 0 is measured as it runs (nothing reads the trunk's last rows, so most of the
last layer is left out) and, as "whole", with every layer on every row: what other engines call MTP off. The best draft length
for most texts, 3, is measured with a head that reads the last tokens of the prompt only as well (`LLM(mtp_prompt_tokens=64)`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints import TINY, open_checkpoint
from kernels_pallas.platform import compile_options, platform
from mtpjax.decoding.acceptance import exact_match, simulated_acceptance
from mtpjax.decoding.output_rows import NO_ROWS, OutputRows
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams
from mtpjax.decoding.speculative import DecodeState
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.load import cache_dtype, load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.random_init import random_model
from mtpjax.model.cache import new_cache, padded_kv_length
from mtpjax.presets import PRESETS, preset
from mtpjax.text.tokenizer import load_tokenizer
from scripts.benchmarks.bench_prefill import CONFIG
from scripts.benchmarks.count_flops import whole_layer
from scripts.benchmarks.jitted_steps import decode, forward_hidden, prefill
from scripts.benchmarks.results import describe, memory_peak_mb, write_json
from scripts.benchmarks.roofline import CEILINGS, Ceilings, chunk_work, measure_ceilings, round_work
from scripts.benchmarks.table_output import write_table

# Mean acceptance length by draft, not thinking, of Qwen3.5-397B-A17B's own head on SPEED-Bench's coding prompts, vLLM
# (SemiAnalysisAI/InferenceX, golden_al_distribution): what simulated runs use unless told.
GOLDEN_LENGTH = {1: 1.92, 2: 2.70, 3: 3.33, 4: 3.83, 5: 4.20, 6: 4.48, 7: 4.73, 8: 4.71}
MAX_STEPS_PER_CALL = 16
SEEN_DRAFT, SEEN = 3, 64
TALK = "talk"


class Side:
    """One column: how prompts are read, and, for a draft length, how text is decoded."""

    def __init__(
        self,
        name: str,
        model: LoadedModel,
        step: Any,
        chunk: int,
        slots: int,
        dtype: Any,
        like: Side | None = None,
        seen: int | None = None,
    ):
        """
        Args:
            like: a side whose program this one shares; all draft lengths read prompts alike.
            seen: how many of the last prompt tokens the MTP head reads, at most `chunk`; all unless told.
        """
        self.name, self.model, self.chunk, self.seen = name, model, chunk, seen
        self.inputs = 1 if step.func is forward_hidden else 2  # following tokens are for the MTP head
        if like:
            self.new, self.step, self.inner = like.new, like.step, like.inner
        else:
            self.new = jax.jit(partial(new_cache, model.cfg, 1, slots, dtype=dtype))
            ids, pad, cache = np.zeros((1, chunk), np.int32), np.zeros(1, np.int32), jax.eval_shape(self.new)

            def compiled(**more: Any) -> Any:
                lowered = step.func.lower(model.params, *[ids] * self.inputs, pad, cache, **step.keywords, **more)
                return lowered.compile(**compile_options())

            self.step = compiled() if seen is None else compiled(mtp_rows=seen)
            self.inner = self.step if seen is None else compiled(mtp_rows=0)
        memory = self.step.memory_analysis()
        self.temporary_mb = memory.temp_size_in_bytes / 2**20 if memory else None

    def begin(self, length: int = 0) -> None:
        """An empty cache for a prompt of `length` tokens."""
        cache = self.new()
        if self.seen is not None:
            cache = cache.replace(mtp_start_pos=jax.device_put(np.full(1, length - self.seen, np.int32)))
        self.cache, self.seconds = jax.block_until_ready(cache), 0.0

    def read(self, tokens: np.ndarray, following: np.ndarray, last: bool = True) -> None:
        """One chunk; `last`: that of the prompt."""
        start = time.perf_counter()
        step = self.step if last else self.inner
        out = step(self.model.params, *(tokens, following)[: self.inputs], np.zeros(1, np.int32), self.cache)
        self.hidden, self.cache = jax.block_until_ready(out)[-2:]
        self.seconds += time.perf_counter() - start


class Decoder:
    """Decoding behind a prompt that a side has read."""

    def __init__(self, side: Side, draft: int, accept: Any, new: int, vocab: int):
        self.side, self.draft, self.accept, self.new, self.vocab = side, draft, accept, new, vocab
        self.program: Any = None

    def __call__(self, token: int) -> dict[str, float]:
        side, ints = self.side, np.zeros(1, np.int32)
        asked = BatchSamplingParams(
            np.array([self.new], np.int32), np.zeros(1, np.float32), np.zeros(1, np.uint32), np.full((1, MAX_STOP_TOKENS), -1, np.int32)
        )  # fmt: skip
        hidden = side.hidden if side.model.cfg.mtp_layers else np.zeros((1, side.model.cfg.hidden_size), self.dtype())
        state = DecodeState(
            side.cache, hidden, np.array([token], np.int32), ints, np.zeros(1, bool), np.zeros(1, bool), ints,
            np.zeros((1, self.draft), np.int32),
        )  # fmt: skip
        static = {
            "graph": side.model.graph,
            "num_speculative_tokens": self.draft,
            "max_steps": MAX_STEPS_PER_CALL,
            "vocab_size": self.vocab,
            "acceptance": self.accept,
        }
        if self.program is None:
            self.program = decode.lower(side.model.params, state, asked, **static).compile(**compile_options())
        state = jax.block_until_ready(jax.device_put(state))
        start = time.perf_counter()
        while not bool(state.finished[0]):
            state, _, _ = self.program(side.model.params, state, asked)
        seconds = time.perf_counter() - start
        rounds = int(state.num_steps[0])
        accepted = (np.asarray(state.num_accepted_per_pos[0]) / rounds).tolist()
        return {"seconds": seconds, "tokens_per_round": self.new / rounds, "accepted": accepted}  # type: ignore[dict-item]

    def dtype(self) -> Any:
        return nnx.merge(self.side.model.graph, self.side.model.params).compute_dtype


def sides_of(
    model: LoadedModel, plain: LoadedModel, args: argparse.Namespace, dtype: Any, vocab: int
) -> tuple[list[Side], dict]:
    """The columns, and the decoders of those that decode."""
    slots = padded_kv_length(max(args.contexts) + args.new + 1, max(args.drafts) + 1)
    sides, decoders = [], {}
    for k in args.drafts:
        which = model if k else plain
        like = next((s for s in sides if k and s.model is model), None)
        side = Side(
            f"draft {k}", which, partial(prefill, graph=which.graph, rows=NO_ROWS), args.chunk, slots, dtype, like
        )
        sides.append(side)
        rule = (
            simulated_acceptance(args.synthetic_acceptance_length or GOLDEN_LENGTH.get(k), args.acceptance, k)
            if args.simulate
            else None
        )
        decoders[side.name] = Decoder(side, k, rule or exact_match, args.new, vocab)
        if k == SEEN_DRAFT:
            step, seen = partial(prefill, graph=model.graph, rows=NO_ROWS), min(SEEN, args.chunk)
            sides.append(Side(f"{side.name}, last {seen} tokens", model, step, args.chunk, slots, dtype, seen=seen))
            decoders[sides[-1].name] = Decoder(sides[-1], k, rule or exact_match, args.new, vocab)
    sides.append(Side("draft 0, whole", plain, partial(forward_hidden, graph=plain.graph), args.chunk, slots, dtype))
    if not args.no_ablations:
        whole = {"graph": model.graph, "rows": OutputRows.none()}
        every = {"graph": model.graph, "rows": OutputRows.all()}
        sides += [
            Side("rows = all", model, partial(prefill, graph=model.graph, rows=OutputRows.all()), args.chunk, slots, dtype),
            Side("whole MTP layer", model, partial(whole_layer, **whole), args.chunk, slots, dtype),
            Side("whole MTP layer, rows = all", model, partial(whole_layer, **every), args.chunk, slots, dtype),
        ]  # fmt: skip
    return sides, decoders


def measure(
    sides: Sequence[Side], decoders: dict[str, Decoder], ids: np.ndarray, chunk: int, runs: int, turns: str
) -> dict[str, dict]:
    """Prefill and decode seconds of each side in each run over one prompt; run 0 reads the last two chunks and is dropped."""
    found: dict[str, dict] = {s.name: {"prefill_seconds": [], "decode_seconds": []} for s in sides}
    length = ids.shape[1] - 1
    for run in range(runs + 1):
        rotated = [*sides[run % len(sides) :], *sides[: run % len(sides)]]
        for together in [rotated] if turns == "chunk" else [[side] for side in rotated]:
            for side in together:
                side.begin(length)
            for number, at in enumerate(range(0, length, chunk)[0 if run else -2 :]):
                turn = number % len(together)
                for side in [*together[turn:], *together[:turn]]:
                    side.read(ids[:, at : at + chunk], ids[:, at + 1 : at + chunk + 1], at + chunk == length)
            for side in together:
                row = found[side.name]
                decoded = decoders[side.name](int(ids[0, -1])) if side.name in decoders else None
                if run:
                    row["prefill_seconds"].append(side.seconds)
                    if decoded:
                        row["decode_seconds"].append(decoded["seconds"])
                        row |= {"tokens_per_round": decoded["tokens_per_round"], "accepted": decoded["accepted"]}
                side.cache = side.hidden = None
    return found


def load(args: argparse.Namespace) -> tuple[LoadedModel, LoadedModel, Any, Any]:
    """(with MTP head, without, tokenizer or None, cache dtype)."""
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[args.dtype]
    if args.model == "random":
        cfg = preset(args.shape) if args.shape else CONFIG
        model = random_model(cfg, quantization=args.weights, dtype=dtype)
        return model, without_mtp(model), None, cache_dtype(dtype)
    source = open_checkpoint(TINY if args.model == "tiny" else args.model)
    models = [load_checkpoint(source, dtype=dtype, mtp=mtp, quantization=args.weights) for mtp in (True, False)]
    if not models[0].cfg.mtp_layers:
        raise SystemExit(f"{args.model}: no MTP head; there is nothing to compare")
    return models[0], models[1], source.tokenizer_file and load_tokenizer(source.tokenizer_file), cache_dtype(dtype)


def without_mtp(model: LoadedModel) -> LoadedModel:
    """The trunk alone; the same arrays."""
    merged = nnx.merge(model.graph, model.params)
    merged.mtp, merged.cfg = None, model.cfg.without_mtp()
    graph, params = nnx.split(merged)
    return LoadedModel(merged.cfg, graph, params)


def read_text(name: str) -> str:
    """A UTF-8 file, or the held-out conversations of the embedded model."""
    if name != TALK:
        return Path(name).read_text(encoding="utf-8")
    from scripts.tiny_model.data import read_talk  # needs what training needs

    return next(document.text for document in read_talk() if document.split == "held-out")


def prompt_ids(tokenizer: Any, text: Sequence[str], vocab: int, length: int) -> np.ndarray:
    """`[1, length + 1]`: the start of the text, or random ids where there is no tokenizer."""
    if not text:
        return np.random.default_rng(length).integers(0, vocab, (1, length + 1)).astype(np.int32)
    ids = [i for name in text for i in tokenizer.encode(read_text(name))]
    if len(ids) <= length:
        raise SystemExit(f"--text has {len(ids)} tokens; {length + 1} are needed")
    return np.array([ids[: length + 1]], np.int32)


def floors_of(
    ceilings: Ceilings, model: LoadedModel, decoder: Decoder | None, context: int, args: argparse.Namespace, row: dict
) -> dict[str, float]:
    """Seconds of reading and decoding that the device's copy bandwidth and matmul rate allow; see roofline.py."""
    size = jnp.dtype(args.dtype).itemsize
    ends = range(args.chunk, context + 1, args.chunk)
    read = [chunk_work(model.cfg, model.params, args.chunk, end, size) for end in ends]
    found = {"prefill_floor": sum(ceilings.floor(w.bytes, w.flops) for w in read)}
    if decoder:
        parts = round_work(model.cfg, model.params, decoder.draft, 1, context, size).values()
        a_round = sum(ceilings.floor(w.bytes, w.flops) for w in parts)
        found["decode_floor"] = a_round * args.new / row["tokens_per_round"]
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="random (50 M active), tiny (embedded), or a checkpoint")
    parser.add_argument(
        "--random", dest="model", action="store_const", const="random", help="random weights, the default"
    )
    parser.add_argument(
        "--shape", choices=list(PRESETS), help="shape of the random model; 50 M active parameters unless told"
    )
    parser.add_argument("--weights", help="int4, int8, iq4nl, fp8 or packed, as for mtpjax.LLM")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU and bfloat16 elsewhere unless told"
    )
    parser.add_argument(
        "--turns", choices=["chunk", "prompt"], default="chunk", help="what a side does before the next one"
    )
    parser.add_argument(
        "--text", nargs="*", default=[],
        help=f"UTF-8 files that give the prompts, or {TALK}: held-out conversations of the embedded model's kind; "
        "random token ids unless told",
    )  # fmt: skip
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[512, 2048, 8192], help="prompt tokens, multiples of --chunk"
    )
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 2, 3, 4])
    parser.add_argument("--new", type=int, default=64, help="tokens decoded behind each prompt")
    parser.add_argument("--chunk", type=int, default=512, help="rows of a prompt chunk")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--synthetic-acceptance-length", type=float, help="simulated tokens a round, for every draft length"
    )
    parser.add_argument(
        "--acceptance",
        type=lambda s: [float(x) for x in s.split(",")],
        help="simulated: share of rounds that accept 1, 2, ... drafts",
    )
    parser.add_argument(
        "--roofline", action="store_true", help="measure the device's ceilings; a column says how near we are"
    )
    parser.add_argument("--no-ablations", action="store_true", help="the drafts, and MTP off with whole layers, alone")
    parser.add_argument("--out", help="write PREFIX.json, .csv, .md and .png")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if platform() == "cpu" else "bfloat16")
    if args.shape and args.model != "random":
        parser.error(f"--shape is of random models, and --model is {args.model}; leave one out")
    args.simulate = args.model == "random" or bool(args.synthetic_acceptance_length or args.acceptance)
    if 0 not in args.drafts or not all(0 <= k <= 8 for k in args.drafts):
        parser.error(
            f"--drafts is {args.drafts}; expected numbers from 0 to 8 with 0, the base of all ratios, among them"
        )
    if wrong := [c for c in args.contexts if c < 1 or c % args.chunk]:
        parser.error(f"--contexts has {wrong}; expected positive multiples of --chunk {args.chunk}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    model, plain, tokenizer, dtype = load(args)
    ceilings = measure_ceilings(jnp.dtype(args.dtype), **CEILINGS[platform()]) if args.roofline else None
    if args.text and tokenizer is None:
        raise SystemExit(f"{args.model}: no tokenizer.json, so --text cannot be read")
    vocab = min(model.cfg.vocab_size, tokenizer.size) if tokenizer else model.cfg.vocab_size
    try:
        sides, decoders = sides_of(optimize_for_cpu(model), optimize_for_cpu(plain), args, dtype, vocab)
    except ValueError as error:
        raise SystemExit(f"bench_table.py: {error}") from None
    rows = []
    for context in args.contexts:
        ids = prompt_ids(tokenizer, args.text, vocab, context)
        found = measure(sides, decoders, ids, args.chunk, args.runs, args.turns)
        for name, row in found.items():
            floors = floors_of(ceilings, model, decoders.get(name), context, args, row) if ceilings else {}
            rows.append({"prompt_tokens": context, "side": name, "new_tokens": args.new, **row, **floors})
            base = found["draft 0, whole"]["prefill_seconds"]
            ratio = statistics.median(b / a for a, b in zip(row["prefill_seconds"], base, strict=True))
            speed = context / statistics.median(row["prefill_seconds"])
            print(f"{context:7} {name:28} prefill {speed:8.1f} tok/s, {ratio:.3f} x", flush=True)
    result = {
        "what": "table", **describe(), "model": args.shape or args.model, "dtype": args.dtype, "weights": args.weights,
        "chunk": args.chunk, "acceptance": "simulated acceptance" if args.simulate else "real acceptance",
        "prompts": f"text ({' '.join(Path(name).name for name in args.text)})" if args.text else "random tokens",
        "memory_peak_mb": memory_peak_mb(), "temporary_mb": {s.name: s.temporary_mb for s in sides},
        "ceilings": ceilings and asdict(ceilings), "rows": rows,
    }  # fmt: skip
    if args.out:
        write_json(args.out + ".json", result)
    write_table(result, args.out)
    return result


if __name__ == "__main__":
    main()
