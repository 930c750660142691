"""CPU speed of packed weights: one random MoE in BF16, int8 and IQ4_NL, the three taking turns in one run.

    python -m scripts.benchmarks.bench_packed [--runs 5] [--json docs/benchmarks/packed_cpu.json]

The model is that of bench_cpu.py (0.78 B parameters: hidden 1024, 12 layers, 64 experts of which 8 are chosen, 32k
vocabulary). It is written to a temporary folder (1.6 GB) and loaded in each form.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import open_checkpoint, write_safetensors_directory
from mtpjax import LLM, SamplingParams
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.random_init import random_model
from scripts.benchmarks.random_models import MOE_780M
from scripts.benchmarks.results import describe, ratio_table, write_json

QUANTIZATIONS = {"bf16": None, "int8": "int8", "iq4nl": "iq4nl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5, help="measured runs of each form; medians are reported")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens to decode")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    cfg, bfloat16 = MOE_780M.without_mtp(), jnp.dtype(jnp.bfloat16)
    variants: dict[str, LLM] = {}
    gigabytes = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_safetensors_directory(path, config_to_hf(cfg), export_tensors(random_model(cfg, dtype=bfloat16)))
        for name, quantization in QUANTIZATIONS.items():
            model = load_checkpoint(open_checkpoint(path), dtype=bfloat16, mtp=False, quantization=quantization)
            gigabytes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e9
            variants[name] = LLM(
                model,
                num_speculative_tokens=0,
                dtype="bfloat16",
                max_model_len=args.prompt_tokens + args.max_tokens + 8,
                max_num_seqs=1,
                prefill_buckets=(args.prompt_tokens,),
            )
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, args.prompt_tokens + 1).tolist()
    figures: dict[str, dict[str, list[float]]] = {"prefill tok/s": {}, "decode tok/s": {}}
    for run in range(args.runs + 1):
        for name, llm in variants.items():
            metrics = llm.generate([prompt], SamplingParams(max_tokens=args.max_tokens, ignore_eos=True))[0].metrics
            if run:  # the first one compiles
                figures["prefill tok/s"].setdefault(name, []).append(args.prompt_tokens / metrics.prefill_seconds)
                figures["decode tok/s"].setdefault(name, []).append(args.max_tokens / metrics.decode_seconds)
    print(", ".join(f"{name}: {size:.2f} GB" for name, size in gigabytes.items()))
    print(ratio_table(figures))
    if args.json:
        about = {"what": "packed weights on a CPU", **describe()}
        write_json(args.json, about | {"gigabytes": gigabytes, "figures": figures})


if __name__ == "__main__":
    main()
