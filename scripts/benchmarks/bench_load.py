"""Host memory and seconds to load a random checkpoint of a given size; every step runs in a process of its own.

    python -m scripts.benchmarks.bench_load --gigabytes 1
    python -m scripts.benchmarks.bench_load --gigabytes 3.7 --gguf q8_0    # a file of 2 GB, kept packed

Peak resident memory is the operating system's own figure. On a CPU the parameters themselves are in host memory, so the
figure to look at is how far the peak lies above them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mtpjax.config import ModelConfig
from mtpjax.hf_config import config_to_hf
from scripts.benchmarks.random_models import MOE_780M
from scripts.benchmarks.results import describe, write_json

SUPERBLOCK_PARAMETERS = 82e6  # of four layers


def config(gigabytes: float) -> ModelConfig:
    """Return a model of about this many bytes in BF16; only the number of layers depends on it."""
    num_superblocks = max(1, round(gigabytes * 1e9 / 2 / SUPERBLOCK_PARAMETERS))
    return replace(MOE_780M, num_layers=4 * num_superblocks, vocab_size=8192, num_experts=16, experts_per_token=4)


def peak_mb() -> float:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make(path: Path, gigabytes: float, gguf: str | None) -> None:
    """Write the checkpoint: a safetensors folder in BF16, or a GGUF file of the type `gguf`."""
    import jax.numpy as jnp

    from checkpoints import write_gguf, write_safetensors_directory
    from mtpjax.loading.export import export_tensors
    from mtpjax.loading.random_init import random_model

    model = random_model(config(gigabytes), dtype=jnp.dtype(jnp.bfloat16))
    if gguf:
        tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(model)]
        write_gguf(path, config_to_hf(model.cfg), tensors, gguf)
        return
    write_safetensors_directory(path, config_to_hf(model.cfg), export_tensors(model), max_shard_bytes=1 << 28)


def load(path: Path, form: str) -> None:
    """Load the checkpoint and print the figures as JSON. `form` is a dtype, or "packed" for a GGUF file."""
    import jax
    import jax.numpy as jnp

    from checkpoints import open_checkpoint
    from mtpjax.loading.load import load_checkpoint

    jax.block_until_ready(jnp.zeros(8) + 1)  # start the runtime, which is not to be measured
    before = peak_mb()
    packed = form == "packed"
    dtype = jnp.dtype("bfloat16" if packed else form)
    start = time.perf_counter()
    source = open_checkpoint(path)
    seconds_to_open = time.perf_counter() - start
    model = load_checkpoint(source, dtype=dtype, quantization="packed" if packed else None)
    leaves = jax.block_until_ready(jax.tree.leaves(model.params))
    seconds = time.perf_counter() - start
    sizes = [leaf.nbytes / 2**20 for leaf in leaves]
    figures = {
        "dtype": form,
        "seconds_to_open": seconds_to_open,
        "seconds": seconds,
        "parameters_mb": sum(sizes),
        "largest_leaf_mb": max(sizes),
        "peak_above_start_mb": peak_mb() - before,
        "peak_above_parameters_mb": peak_mb() - before - sum(sizes),
    }
    print(json.dumps(figures))


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
        command = [sys.executable, "-m", "scripts.benchmarks.bench_load", "--gigabytes", str(args.gigabytes)]
        command += ["--gguf", args.gguf] if args.gguf else []
        command.append("--step")
        subprocess.run([*command, "make", str(path)], check=True)
        size = sum(f.stat().st_size for f in ([path] if args.gguf else path.iterdir())) / 2**20
        rows = []
        for form in ("packed",) if args.gguf else ("bfloat16", "float32"):
            done = subprocess.run([*command, form, str(path)], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
    for row in rows:
        print(
            f"checkpoint {size:.0f} MB ({args.gguf or 'BF16'}), loaded as {row['dtype']}: {row['seconds']:.1f} s, "
            f"parameters {row['parameters_mb']:.0f} MB, largest leaf {row['largest_leaf_mb']:.0f} MB, "
            f"peak above the parameters {row['peak_above_parameters_mb']:.0f} MB"
        )
    if args.json:
        write_json(args.json, {"what": "loading", **describe(), "checkpoint_mb": size, "loads": rows})


if __name__ == "__main__":
    main()
