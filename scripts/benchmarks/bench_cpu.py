"""CPU speed against HF transformers: prefill and decode of one random MoE, sides alternating inside one run.

    python -m scripts.benchmarks.bench_cpu --runs 5 --json docs/benchmarks/cpu.json

Needs torch and transformers beside this package. Both sides have the same config (0.78 B parameters without the MTP head:
hidden 1024, 12 layers, 64 experts top-8 of 256, 32k vocabulary), random weights, batch 1, and two threads unless told.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from scripts.benchmarks.results import describe, ratio_table, write_json

CONFIG = ModelConfig(
    hidden_size=1024, num_layers=12, layer_pattern=(LINEAR, LINEAR, LINEAR, FULL), q_heads=8, kv_heads=2, head_dim=256,
    rotary_dim=64, rope_theta=1e7, linear_k_heads=8, linear_v_heads=16, linear_k_dim=128, linear_v_dim=128, conv_width=4,
    vocab_size=32768, num_experts=64, experts_per_token=8, expert_size=256, shared_expert_size=256, mtp_layers=1,
)  # fmt: skip

OURS_AND_THEIRS = ("mtpjax", "transformers")

Side = Callable[[list[int], int], tuple[float, float]]  # (prompt, new tokens) -> prefill seconds, decode seconds


def ours(max_len: int, dtype: str, draft: int = 0) -> Side:
    import jax.numpy as jnp

    from mtpjax import LLM, SamplingParams
    from mtpjax.loading.random_init import random_model

    model = random_model(CONFIG if draft else CONFIG.without_mtp(), dtype=getattr(jnp, dtype))
    llm = LLM(
        model,
        num_speculative_tokens=draft,
        dtype=dtype,
        max_model_len=max_len,
        max_num_seqs=1,
        prefill_buckets=(512, 2048),
    )

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        metrics = llm.generate([prompt], SamplingParams(max_tokens=new, ignore_eos=True))[0].metrics
        return metrics.prefill_seconds, metrics.decode_seconds

    return run


def transformers_side(dtype: str) -> Side:
    import torch
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(**config_to_hf(CONFIG.without_mtp()), dtype=dtype)
    model = Qwen3_5MoeForCausalLM(config).to(getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run(prompt: list[int], new: int) -> tuple[float, float]:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(new):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return middle - start, time.perf_counter() - middle

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5, help="measured runs of each side (median is quoted)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048], help="prompt lengths")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    figures: dict[str, dict[str, list[float]]] = {}
    for dtype in ("bfloat16", "float32"):  # one pair of models at a time: memory that lies idle may be taken away
        sides = {
            f"transformers {dtype}": transformers_side(dtype),
            f"mtpjax {dtype}": ours(max(args.prompts) + args.new + 8, dtype),
        }
        for length in args.prompts:
            prompt = np.random.default_rng(length).integers(0, CONFIG.vocab_size, length + 1).tolist()
            for run in range(args.runs + 1):  # the first of each is a warm-up
                for name, side in sides.items():
                    gc.collect()
                    gc.disable()  # over all that torch and jax hold, a collection takes a tenth of a second
                    prefill, decode = side(prompt, args.new)
                    gc.enable()
                    speeds = length / prefill, args.new / decode
                    if run:
                        figures.setdefault(f"prefill {length} tok/s", {}).setdefault(name, []).append(speeds[0])
                        figures.setdefault("decode tok/s", {}).setdefault(name, []).append(speeds[1])
                        print(f"  {length} {name:24s} prefill {speeds[0]:7.1f} decode {speeds[1]:6.1f}", flush=True)
        del sides, side
    base = {}
    for name, by_side in figures.items():
        best = {
            who: max(statistics.median(v) for k, v in by_side.items() if k.startswith(who)) for who in OURS_AND_THEIRS
        }
        base[name] = best["mtpjax"] / best["transformers"]
    print(ratio_table(figures))
    for name, ratio in base.items():
        print(f"{name}: mtpjax / transformers, each in its faster dtype = {ratio:.2f}")
    if args.json:
        write_json(args.json, {"what": "cpu speed", **describe(), "figures": figures, "ratio_in_faster_dtype": base})


if __name__ == "__main__":
    main()
