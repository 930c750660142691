"""CPU speed compared with HF transformers: prefill and decode of one random MoE, the two programs taking turns in a
run.

    python -m scripts.benchmarks.bench_cpu --runs 5 --json docs/benchmarks/cpu.json

It needs torch and transformers beside this package. Both programs have the same config (0.78 B parameters without the
MTP
head: hidden 1024, 12 layers, 64 experts of which 8 are chosen, 32k vocabulary), random weights, batch 1, and by default
two threads.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

from mtpjax.hf_config import config_to_hf
from scripts.benchmarks.random_models import MOE_780M
from scripts.benchmarks.results import describe, ratio_table, write_json

PROGRAMS = ("mtpjax", "transformers")

Variant = Callable[[list[int], int], tuple[float, float]]  # (prompt, new tokens) -> prefill seconds, decode seconds


def mtpjax_variant(max_model_len: int, dtype: str) -> Variant:
    """Return this program, without the MTP head."""
    import jax.numpy as jnp

    from mtpjax import LLM, SamplingParams
    from mtpjax.loading.random_init import random_model

    llm = LLM(
        random_model(MOE_780M.without_mtp(), dtype=jnp.dtype(dtype)),
        num_speculative_tokens=0,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=1,
        prefill_buckets=(512, 2048),
    )

    def run(prompt: list[int], max_tokens: int) -> tuple[float, float]:
        metrics = llm.generate([prompt], SamplingParams(max_tokens=max_tokens, ignore_eos=True))[0].metrics
        return metrics.prefill_seconds, metrics.decode_seconds

    return run


def transformers_variant(dtype: str) -> Variant:
    """Return HF transformers with a loop of greedy tokens."""
    import torch
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(**config_to_hf(MOE_780M.without_mtp()), dtype=dtype)
    model = Qwen3_5MoeForCausalLM(config).to(getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run(prompt: list[int], max_tokens: int) -> tuple[float, float]:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(max_tokens):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return middle - start, time.perf_counter() - middle

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5, help="measured runs of each program; medians are reported")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 2048], help="prompt lengths")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    figures: dict[str, dict[str, list[float]]] = {}
    for dtype in ("bfloat16", "float32"):  # one pair of models at a time: the system may swap out memory that lies idle
        variants = {
            f"transformers {dtype}": transformers_variant(dtype),
            f"mtpjax {dtype}": mtpjax_variant(max(args.prompt_tokens) + args.max_tokens + 8, dtype),
        }
        for length in args.prompt_tokens:
            prompt = np.random.default_rng(length).integers(0, MOE_780M.vocab_size, length + 1).tolist()
            for run in range(args.runs + 1):  # the first is a warm-up
                for name, variant in variants.items():
                    gc.collect()
                    gc.disable()  # with all the objects of torch and jax, a collection takes a tenth of a second
                    prefill, decode = variant(prompt, args.max_tokens)
                    gc.enable()
                    speeds = length / prefill, args.max_tokens / decode
                    if run:
                        figures.setdefault(f"prefill {length} tok/s", {}).setdefault(name, []).append(speeds[0])
                        figures.setdefault("decode tok/s", {}).setdefault(name, []).append(speeds[1])
                        print(f"  {length} {name:24s} prefill {speeds[0]:7.1f} decode {speeds[1]:6.1f}", flush=True)
        del variants, variant
    ratios = {}
    for figure, runs in figures.items():
        best = {
            program: max(statistics.median(values) for name, values in runs.items() if name.startswith(program))
            for program in PROGRAMS
        }
        ratios[figure] = best["mtpjax"] / best["transformers"]
    print(ratio_table(figures))
    for figure, ratio in ratios.items():
        print(f"{figure}: mtpjax / transformers, each in its faster dtype = {ratio:.2f}")
    if args.json:
        write_json(args.json, {"what": "cpu speed", **describe(), "figures": figures, "ratio_in_faster_dtype": ratios})


if __name__ == "__main__":
    main()
