"""Everything worth proving on a CUDA GPU, a part a call, each under nine minutes; no network.

    python -m scripts.gpu.suite --part kernels|experts|prefill|decode|table|profile [--out FOLDER]
    python -m scripts.gpu.suite --smoke                    # all parts at a toy size, on any device

The model is a 35B-A3B with random IQ4_NL weights (`--shape`, `--weights`), so acceptance is simulated. Each part writes
FOLDER/gpu_PART.json with device, versions, commit, the measured copy bandwidth and matmul rate, and beside every figure
its share of the roofline that these two allow. What `--seconds` left no time for is listed as not measured. Needs jax,
flax, orbax, numpy, safetensors, tokenizers; matplotlib for the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.platform import platform
from mtpjax.decoding.acceptance import SimulatedAcceptance, exact_match
from mtpjax.decoding.output_rows import NO_ROWS
from mtpjax.loading.load import cache_dtype
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.random_init import random_model
from mtpjax.model.cache import padded_kv_length
from mtpjax.presets import PRESETS, preset
from scripts.benchmarks import bench_table
from scripts.benchmarks.jitted_steps import prefill
from scripts.benchmarks.published import ACCEPTANCE_LENGTHS
from scripts.benchmarks.random_models import MOE_50M_ACTIVE
from scripts.benchmarks.results import describe, memory_peak_mb, write_json
from scripts.benchmarks.roofline import CEILINGS, Ceilings, chunk_work, measure_ceilings, round_work
from scripts.benchmarks.trace_events import op_kind, read_op_times
from scripts.benchmarks.variants import Decoder, Variant, without_mtp
from scripts.gpu import experts as gpu_experts
from scripts.gpu import kernels as gpu_kernels

TOY = replace(
    MOE_50M_ACTIVE, num_layers=4, hidden_size=128, vocab_size=1024, num_experts=8, expert_size=64, shared_expert_size=64
)
HOLDERS = ("while", "call", "conditional")  # their time is that of what they hold, which is counted itself
PARTS = ("kernels", "experts", "prefill", "decode", "table", "profile")


class Suite:
    """What the parts share: the sizes, the model (made when first asked for), the ceilings, and the time."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.smoke, self.began = args, args.smoke, time.perf_counter()
        self.dtype = jnp.dtype("bfloat16") if platform() == "cuda" else jnp.dtype("float32")
        self.contexts = args.contexts or ((256, 512) if self.smoke else (1024, 8192, 32768, 131072))
        self.chunks = (64,) if self.smoke else (512, 2048)
        self.drafts = (0, 2) if self.smoke else (0, 1, 2, 3, 4)
        self.runs = 2 if self.smoke else 9
        sizes = {"megabytes": 32, "size": 256} if self.smoke else CEILINGS[platform()]
        self.ceilings: Ceilings = measure_ceilings(self.dtype, **sizes)
        self.skipped: list[str] = []
        self._model: LoadedModel | None = None

    def go_on(self, what: str) -> bool:
        """Whether there is time for one more measurement."""
        enough = time.perf_counter() - self.began < self.args.seconds
        if not enough:
            self.skipped.append(what)
        return enough

    def models(self) -> dict[bool, LoadedModel]:
        """With the MTP head, and without it (the same arrays)."""
        if self._model is None:
            cfg = TOY if self.smoke else preset(self.args.shape)
            self._model = random_model(cfg, quantization=self.args.weights, dtype=self.dtype)
        return {True: self._model, False: without_mtp(self._model)}

    def side(self, mtp: bool, chunk: int) -> Variant:
        model = self.models()[mtp]
        step, slots = partial(prefill, graph=model.graph, rows=NO_ROWS), padded_kv_length(max(self.contexts) + 64, 16)
        return Variant(f"MTP {'on' if mtp else 'off'}", model, step, chunk, slots, cache_dtype(self.dtype))

    def standing_at(self, side: Variant, length: int) -> None:
        """Begin with a cache that holds `length` tokens (of zeros: the time does not depend on them)."""
        side.begin()
        side.cache = side.cache.replace(length=jnp.full(1, length, jnp.int32))

    def ids(self, count: int) -> np.ndarray:
        return np.random.default_rng(count).integers(0, self.models()[True].cfg.vocab_size, (1, count)).astype(np.int32)


def kernels(suite: Suite) -> dict[str, Any]:
    rows = []
    for row in gpu_kernels.measure_all(suite.smoke, suite.ceilings, suite.go_on):
        rows.append(row)
        verdict = "right" if row["right"] else "WRONG"
        print(
            f"{row['case']:28} {verdict} (error {row['error']:.1e})  {statistics.median(row['seconds']) * 1e6:9.1f} "
            "us, "
            f"{row['of_roofline']:.2f} of the roofline ({row['limit']})",
            flush=True,
        )
    return {"rows": rows, "failed": [row["case"] for row in rows if not row["right"]]}


def experts(suite: Suite) -> dict[str, Any]:
    """Compare our expert kernels with `ragged_dot` and with dequantised products, for several numbers of rows."""
    rows = []
    for row in gpu_experts.measure_all(suite.smoke, suite.ceilings, suite.go_on):
        rows.append(row)
        if "impossible" in row:
            print(f"{row['rows']:5} rows {row['side']:10} impossible: {row['impossible']}", flush=True)
            continue
        print(
            f"{row['rows']:5} rows {row['side']:10} {'right' if row['right'] else 'WRONG'} (error {row['error']:.1e})  "
            f"{statistics.median(row['seconds']) * 1e6:9.1f} us a layer, {row['of_kernels_time']:.2f} x the kernels, "
            f"{row['of_roofline']:.2f} of the roofline ({row['limit']})",
            flush=True,
        )
    return {
        "rows": rows,
        "failed": [f"{row['side']} at {row['rows']} rows" for row in rows if not row.get("right", True)],
    }


def read_chunks(suite: Suite) -> dict[str, Any]:
    """Seconds of the prompt chunk that ends at each context, MTP on and off in turn."""
    rows = []
    for chunk in suite.chunks:
        ids = suite.ids(chunk + 1)
        sides = [suite.side(mtp, chunk) for mtp in (True, False)]
        for context in suite.contexts:
            if context < chunk or not suite.go_on(f"chunk {chunk} at {context}"):
                continue
            times: dict[str, list[float]] = {s.name: [] for s in sides}
            for run in range(suite.runs + 1):
                for side in sides[:: 1 if run % 2 else -1]:
                    suite.standing_at(side, context - chunk)
                    side.read(ids[:, :-1], ids[:, 1:])
                    side.cache = None
                    if run:
                        times[side.name].append(side.seconds)
            for side in sides:
                work = chunk_work(side.model.cfg, side.model.params, chunk, context, suite.dtype.itemsize)
                middle = statistics.median(times[side.name])
                ratio = statistics.median(b / a for a, b in zip(times[side.name], times["MTP off"], strict=True))
                rows.append(
                    {
                        "chunk": chunk,
                        "context": context,
                        "side": side.name,
                        "seconds": times[side.name],
                        "speed_ratio": ratio,
                        "of_roofline": suite.ceilings.floor(work.bytes, work.flops) / middle,
                        "limit": suite.ceilings.limit(work.bytes, work.flops),
                        "temporary_mb": side.temporary_mb,
                    }
                )
                print(
                    f"chunk {chunk:5} at {context:7} {side.name:7} {chunk / middle:9.1f} tok/s, {ratio:.3f} x off, "
                    f"{rows[-1]['of_roofline']:.2f} of the roofline ({rows[-1]['limit']})",
                    flush=True,
                )
    return {"rows": rows}


def decoder_at(suite: Suite, side: Variant, draft: int, context: int, new: int) -> Callable[[], dict[str, float]]:
    rule = SimulatedAcceptance.from_mean_length(ACCEPTANCE_LENGTHS[draft], draft) if draft else exact_match
    decoder = Decoder(side, draft, rule, new, side.model.cfg.vocab_size)

    def run(at: int = context) -> dict[str, float]:
        suite.standing_at(side, at)
        side.hidden = jnp.ones((1, side.model.cfg.hidden_size), decoder.dtype())
        found = decoder(1)
        side.cache = side.hidden = None
        return found

    return run


def rounds(suite: Suite) -> dict[str, Any]:
    """Measure a decoding round by draft length and context, alternating the drafts, with simulated acceptance."""
    new = 8 if suite.smoke else 64
    sides = {mtp: suite.side(mtp, min(suite.chunks)) for mtp in (True, False)}
    runs = {k: decoder_at(suite, sides[k > 0], k, 0, new) for k in suite.drafts}
    rows = []
    for context in suite.contexts:
        if not suite.go_on(f"decode at {context}"):
            continue
        found: dict[int, list[dict[str, float]]] = {k: [] for k in suite.drafts}
        for run in range(suite.runs + 1):
            for k, decode in runs.items():
                figures = decode(context)  # type: ignore[call-arg]
                if run:
                    found[k].append(figures)
        for k, each in found.items():
            times = [e["seconds"] for e in each]
            per_round = statistics.median(times) * each[0]["tokens_per_round"] / new
            parts = round_work(
                sides[True].model.cfg, sides[True].model.params, k, 1, context, suite.dtype.itemsize
            ).values()
            floor = sum(suite.ceilings.floor(w.bytes, w.flops) for w in parts)
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(each, found[0], strict=True))
            rows.append(
                {
                    "context": context,
                    "draft": k,
                    "seconds": times,
                    "new": new,
                    "tokens_per_round": each[0]["tokens_per_round"],
                    "speed_ratio": ratio,
                    "of_roofline": floor / per_round,
                }
            )
            print(
                f"at {context:7} draft {k}: {per_round * 1e3:8.3f} ms a round, {new / statistics.median(times):7.1f} "
                "tok/s, "
                f"{ratio:.2f} x draft 0, {floor / per_round:.2f} of the roofline (simulated acceptance)",
                flush=True,
            )
    return {"acceptance": "simulated acceptance", "rows": rows}


def table(suite: Suite) -> dict[str, Any]:
    """bench_table.py, one side after another."""
    if suite.smoke:
        sizes = [
            "--model",
            "tiny",
            "--prompt-tokens",
            "32",
            "--chunk",
            "16",
            "--num-speculative-tokens",
            "0",
            "2",
            "--max-tokens",
            "8",
            "--runs",
            "1",
        ]
    else:
        contexts = [str(c) for c in suite.contexts if c <= 32768 or suite.args.contexts]
        sizes = ["--shape", suite.args.shape, "--prompt-tokens", *contexts, "--chunk", "1024", "--runs", "2"]
    extra = ["--quantization", suite.args.weights, "--interleave", "prompt", "--no-ablations", "--roofline"]
    return bench_table.main([*sizes, *extra, "--out", str(suite.args.out / "gpu_table")])


def profile(suite: Suite) -> dict[str, Any]:
    """The ten most expensive kernels of a decoding round (the longest draft) and of a prompt chunk."""
    context, chunk, draft = suite.contexts[-2], max(suite.chunks), suite.drafts[-1]
    side = suite.side(True, chunk)
    decode = decoder_at(suite, side, draft, context, 8 if suite.smoke else 64)
    ids = suite.ids(chunk + 1)

    def read() -> None:
        suite.standing_at(side, context - chunk)
        side.read(ids[:, :-1], ids[:, 1:])
        side.cache = None

    found = {}
    for name, program, run in (("decode", "jit_decode", decode), ("prefill", "jit_prefill", read)):
        run()  # warm
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run()
            seen = {k: v for k, v in read_op_times(Path(folder), program).items() if op_kind(k) not in HOLDERS}
        total = sum(spent for _, spent in seen.values())
        longest = sorted(seen.items(), key=lambda item: -item[1][1])[:10]
        print(f"{name}: {sum(n for n, _ in seen.values())} kernels, {total * 1e3:.2f} ms")
        for kernel, (count, spent) in longest:
            print(f"  {spent * 1e3:9.3f} ms in {count:6} x {kernel}")
        rows = [{"kernel": k, "count": n, "seconds": t, "share": t / total} for k, (n, t) in longest]
        found[name] = {"kernels": sum(n for n, _ in seen.values()), "seconds": total, "longest": rows}
    return {"context": context, "chunk": chunk, "draft": draft, **found}


RUN = dict(zip(PARTS, (kernels, experts, read_chunks, rounds, table, profile), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--shape", choices=list(PRESETS), default="35b-a3b")
    parser.add_argument("--weights", default="iq4nl", choices=["int4", "int8", "iq4nl", "fp8"])
    parser.add_argument("--contexts", type=int, nargs="+", help="prompt tokens")
    parser.add_argument("--seconds", type=float, default=480, help="start nothing new in a part after so long")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the JSON files (%(default)s)")
    args = parser.parse_args()
    if platform() != "cuda" and not args.smoke:
        parser.error(f"the device is {jax.devices()[0].device_kind}, not a CUDA GPU; try --smoke")
    suite, failed = Suite(args), []
    for part in args.part:
        print(f"== {part}", flush=True)
        suite.began, suite.skipped = time.perf_counter(), []
        found = RUN[part](suite)
        about = {"what": f"GPU suite, {part}", "smoke": args.smoke, **describe(), "ceilings": asdict(suite.ceilings)}
        shape = {
            "shape": "toy" if args.smoke else args.shape,
            "weights": args.weights,
            "memory_peak_mb": memory_peak_mb(),
        }
        write_json(str(args.out / f"gpu_{part}.json"), {**found, **about, **shape, "not_measured": suite.skipped})
        failed += found.get("failed", [])
    if failed:
        print(f"WRONG results: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
