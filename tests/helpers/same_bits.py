"""Numbers of rows among which a row's product with a `TransposedWeight` has other bits, here or as an older processor
would choose.

`python -m tests.helpers.same_bits AVX2` prints them for a processor without AVX-512, one line a product. XLA's flag
`--xla_cpu_max_isa` limits only the code that XLA itself compiles. Products are YNNPACK's, which asks the processor once
and keeps the answer in a static variable: `pretend` overwrites it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from mmap import ACCESS_READ, mmap
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from kernels_pallas.matmul import linear
from kernels_pallas.weights.transposed import TransposedWeight

FEW_OUTPUTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
MORE_OUTPUTS = (200, 265, 768, 776)  # 265 and 776: the widths of the embedded model's routers and DeltaNet projections
ROWS = (2, 3, 4, 5, 7, 9, 13, 16, 31)
MANY_ROWS = (41, 52, 61, 81)
LIBRARY = "libjax_common.so"
# Instruction set -> the bits of `ynn::arch_flag` that a processor without anything newer has.
YNNPACK_FLAGS = {"AVX2": 0x7F, "AVX": 0x0F, "SSE4_2": 0x07}


class CannotPretend(Exception):
    """This machine or this jaxlib does not let itself be taken for an older processor."""


def rows_that_differ(outputs: int, inputs: int, dtype: str) -> list[int]:
    """Multiply the first rows of a matrix and all of it; return the numbers of rows whose products differ in a bit.

    The numbers are those for which `TransposedWeight` promises the same bits.
    """
    rng = np.random.default_rng(outputs)
    rows = (1,) * (dtype == "bfloat16") + ROWS + MANY_ROWS * (dtype == "bfloat16" or outputs <= 64)
    most = 100 if dtype == "bfloat16" or outputs <= 64 else 32
    x, w = (jnp.asarray(rng.normal(size=size), dtype) for size in ((most, inputs), (inputs, outputs)))
    products = jax.jit(lambda parts, w: [linear(part, TransposedWeight(w), out_dtype=jnp.float32) for part in parts])
    whole, *firsts = map(np.asarray, products([x, *(x[:n] for n in rows)], w))
    np.testing.assert_allclose(whole, np.asarray(x, np.float64) @ np.asarray(w, np.float64), rtol=1e-4, atol=1e-3)
    return [n for n, first in zip(rows, firsts, strict=True) if not np.array_equal(first, whole[:n])]


def all_that_differ() -> list[str]:
    """Return a line for each product whose rows differ."""
    products = [(outputs, 256, "float32") for outputs in FEW_OUTPUTS + MORE_OUTPUTS]
    products += [(outputs, 1024, "float32") for outputs in (4, 200)] + [(4, 256, "bfloat16")]
    found = [(*product, rows_that_differ(*product)) for product in products]
    return [
        f"{outputs} outputs, {inputs} inputs, {dtype}: {rows} rows" for outputs, inputs, dtype, rows in found if rows
    ]


def pretend(instructions: str) -> None:
    """Let YNNPACK choose its kernels, for the rest of this process, as on a processor of no newer `instructions`."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotPretend(f"the machine is {sys.platform} {platform.machine()}, not linux x86_64")
    path = Path(jaxlib.__file__).with_name(LIBRARY)
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as image:
        function, variable = (
            _address(image, name)
            for name in (b"_ZN3ynn24get_supported_arch_flagsEv", b"_ZZN3ynn24get_supported_arch_flagsEvE5flags")
        )
    maps = Path("/proc/self/maps").read_text().splitlines()
    start = min(int(line.split("-")[0], 16) for line in maps if line.endswith(LIBRARY))
    ask = ctypes.CFUNCTYPE(ctypes.c_uint64)(start + function)
    kept = ctypes.c_uint64.from_address(start + variable)
    own = ask()
    if kept.value != own:
        raise CannotPretend(f"{LIBRARY} does not keep the processor's instructions where they were expected")
    kept.value = own & YNNPACK_FLAGS[instructions]


def _address(image: mmap, name: bytes) -> int:
    """Return the address of a symbol in a 64-bit ELF image, relative to its start."""
    (sections,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    for at in range(sections, sections + size * count, size):
        _, kind, _, _, offset, length, strings = struct.unpack_from("<IIQQQQI", image, at)
        if kind == 2:  # SHT_SYMTAB: also the symbols that are not exported
            _, _, _, _, names, names_length = struct.unpack_from("<IIQQQQ", image, sections + size * strings)
            found = image.find(b"\0" + name + b"\0", names, names + names_length)
            words = np.frombuffer(image[offset : offset + length], "<u4").reshape(-1, 6)  # the name, ..., the address
            (match,) = np.nonzero(words[:, 0] == found + 1 - names)
            if found >= 0 and len(match):
                return int(words[match[0], 2]) | int(words[match[0], 3]) << 32
    raise CannotPretend(f"{LIBRARY} has no symbol {name.decode()}")


if __name__ == "__main__":
    try:
        pretend(sys.argv[1])
    except CannotPretend as reason:
        sys.exit(f"cannot pretend: {reason}")
    print("XLA_FLAGS", os.environ.get("XLA_FLAGS"), *all_that_differ(), sep="\n")
