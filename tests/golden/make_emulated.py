"""Makes `emulated/`: what XLA writes about a small program that it compiles for a GPU, with a loop, branches, copies and slices.

.venv-cuda/bin/python -m tests.golden.make_emulated           (after `make check-cuda`)
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from scripts.gpu.cuda_target import CARDS, CompileTarget

HERE = Path(__file__).resolve().parent
SIZE, MOST = 40, 5
KEPT = (
    ".ptx",
    ".thunk_sequence.txt",
    ".thunk_metadata.txt",
    "_gpu_after_optimizations.txt",
    "-assignment.txt",
    "-values.txt",
)


@jax.jit
def steps(x: Any, turns: Any, first: Any) -> tuple[Any, Any]:
    """One of three functions `turns` times, beginning with `first`; then `MOST` times, all of whose results are kept."""
    branches = [lambda x: x * 2 + 1, lambda x: jnp.exp(-x * x) * jnp.sum(x), lambda x: -x]

    def turn(n: Any, x: Any) -> Any:
        return lax.switch(first + n, branches, x) / 2

    def kept(x: Any, n: Any) -> tuple[Any, Any]:
        return x / 2, lax.switch(first - n, branches, x[None])

    x = lax.while_loop(lambda c: c[0] < turns, lambda c: (c[0] + 1, turn(*c)), (jnp.int32(0), x))[1]
    return lax.scan(kept, x, jnp.arange(MOST))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        target, number = CompileTarget(CARDS["rtx3090"], Path(folder)), jax.ShapeDtypeStruct((), jnp.int32)
        target.compile(steps, jax.ShapeDtypeStruct((SIZE,), jnp.float32), number, number)
        out = HERE / "emulated"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for file in Path(folder).iterdir():
            if file.name.endswith(KEPT) and file.stat().st_size:
                shutil.copy(file, out / file.name)


if __name__ == "__main__":
    main()
