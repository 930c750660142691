"""Host memory and seconds to load a random checkpoint of a given size, each step in a process of its own.

    python -m scripts.benchmarks.bench_load --gigabytes 1
    python -m scripts.benchmarks.bench_load --gigabytes 3.7 --gguf q8_0    # a file of 2 GB, kept packed

Peak resident memory is the operating system's own figure. The parameters themselves live in host memory on a CPU; what
counts is how far the peak lies above them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from scripts.benchmarks.results import describe, write_json


def config(gigabytes: float) -> ModelConfig:
    """A model of about this many bytes in BF16: the number of layers is what grows."""
    repeats = max(1, round(gigabytes * 1e9 / 2 / 82e6))
    return ModelConfig(
        hidden_size=1024, num_layers=4 * repeats, layer_pattern=(LINEAR, LINEAR, LINEAR, FULL), q_heads=8, kv_heads=2,
        head_dim=256, rotary_dim=64, rope_theta=1e7, linear_k_heads=8, linear_v_heads=16, linear_k_dim=128, linear_v_dim=128,
        conv_width=4, vocab_size=8192, num_experts=16, experts_per_token=4, expert_size=256, shared_expert_size=256,
    )  # fmt: skip


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make(path: Path, gigabytes: float, gguf: str | None) -> None:
    import jax.numpy as jnp

    from checkpoints import write_gguf, write_safetensors_directory
    from mtpjax.loading.export import export_tensors
    from mtpjax.loading.random_init import random_model

    model = random_model(config(gigabytes), dtype=jnp.bfloat16)
    if gguf:
        tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(model)]
        write_gguf(path, config_to_hf(model.cfg), tensors, gguf)
        return
    write_safetensors_directory(path, config_to_hf(model.cfg), export_tensors(model), max_shard_bytes=1 << 28)


def load(path: Path, form: str) -> None:
    """`form` is a dtype, or "packed" for a GGUF file."""
    import jax
    import jax.numpy as jnp

    from checkpoints import open_checkpoint
    from mtpjax.loading.load import load_checkpoint

    jax.block_until_ready(jnp.zeros(8) + 1)  # the runtime itself is not what is measured
    before = peak_mb()
    packed = form == "packed"
    start = time.perf_counter()
    source = open_checkpoint(path)
    opened = time.perf_counter() - start
    model = load_checkpoint(
        source, dtype=jnp.dtype("bfloat16" if packed else form), quantization="packed" if packed else None
    )
    leaves = jax.block_until_ready(jax.tree.leaves(model.params))
    seconds = time.perf_counter() - start
    size = [leaf.nbytes / 2**20 for leaf in leaves]
    print(json.dumps({
        "dtype": form, "seconds_to_open": opened, "seconds": seconds, "parameters_mb": sum(size), "largest_leaf_mb": max(size),
        "peak_above_start_mb": peak_mb() - before, "peak_above_parameters_mb": peak_mb() - before - sum(size),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--gguf", metavar="TYPE", help="a GGUF file with matrices of this type, kept packed")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--step", nargs=2, metavar=("STEP", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, path = args.step
        return make(Path(path), args.gigabytes, args.gguf) if step == "make" else load(Path(path), step)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.gguf" if args.gguf else "model")
        again = [sys.executable, __file__, "--gigabytes", str(args.gigabytes)]
        again += ["--gguf", args.gguf] if args.gguf else []
        again.append("--step")
        subprocess.run([*again, "make", str(path)], check=True)
        size = sum(f.stat().st_size for f in ([path] if args.gguf else path.iterdir())) / 2**20
        rows = [
            json.loads(subprocess.run([*again, dtype, str(path)], check=True, capture_output=True, text=True).stdout)
            for dtype in (("packed",) if args.gguf else ("bfloat16", "float32"))
        ]
    for row in rows:
        print(f"checkpoint {size:.0f} MB ({args.gguf or 'BF16'}), loaded as {row['dtype']}: {row['seconds']:.1f} s, parameters "
              f"{row['parameters_mb']:.0f} MB, largest leaf {row['largest_leaf_mb']:.0f} MB, peak above the parameters "
              f"{row['peak_above_parameters_mb']:.0f} MB")  # fmt: skip
    if args.json:
        write_json(args.json, {"what": "loading", **describe(), "checkpoint_mb": size, "loads": rows})


if __name__ == "__main__":
    main()
