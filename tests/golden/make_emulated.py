"""Write `emulated/`: XLA's dump of a small program compiled for a GPU, with a loop, branches, copies and slices.

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
SIZE, SCAN_LENGTH = 40, 5
SUFFIXES = (
    ".ptx",
    ".thunk_sequence.txt",
    ".thunk_metadata.txt",
    "_gpu_after_optimizations.txt",
    "-assignment.txt",
    "-values.txt",
)


@jax.jit
def steps(x: Any, num_steps: Any, first: Any) -> tuple[Any, Any]:
    """Apply one of three functions `num_steps` times, beginning with `first`; then scan over `SCAN_LENGTH` of them."""
    branches = [lambda x: x * 2 + 1, lambda x: jnp.exp(-x * x) * jnp.sum(x), lambda x: -x]

    def loop_body(n: Any, x: Any) -> Any:
        return lax.switch(first + n, branches, x) / 2

    def scan_body(x: Any, n: Any) -> tuple[Any, Any]:
        return x / 2, lax.switch(first - n, branches, x[None])

    x = lax.while_loop(lambda c: c[0] < num_steps, lambda c: (c[0] + 1, loop_body(*c)), (jnp.int32(0), x))[1]
    return lax.scan(scan_body, x, jnp.arange(SCAN_LENGTH))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        target, scalar = CompileTarget(CARDS["rtx3090"], Path(folder)), jax.ShapeDtypeStruct((), jnp.int32)
        target.compile(steps, jax.ShapeDtypeStruct((SIZE,), jnp.float32), scalar, scalar)
        out = HERE / "emulated"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for file in Path(folder).iterdir():
            if file.name.endswith(SUFFIXES) and file.stat().st_size:
                text = file.read_text().replace(f"{HERE.parent.parent}/", "")  # no paths of the machine that made it
                (out / file.name).write_text(text)


if __name__ == "__main__":
    main()
