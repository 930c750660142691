"""Hand-written PTX, run by the emulator."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.ptx_emulator.program import run_kernel
from scripts.ptx_emulator.ptx import parse_kernels
from scripts.ptx_emulator.xla_dump import Buffer, Launch

KERNEL = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({params})
.reqntid {threads}, 1, 1
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<80>;
    .reg .f32 %f<8>;
    .reg .b64 %rd<16>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
{loads}
{body}
    ret;
}}
"""


def run_ptx(body: str, arrays: Sequence[Any], threads: int = 32, blocks: int = 1, shared: int = 0) -> list[Any]:
    """Run `body` and return the arrays.

    Args:
        body: instructions. Registers %rd0, %rd1, ... hold the addresses of the arrays; %r0 holds the index of the
            thread in its block, %r3 the index among all threads.
        arrays: the kernel may write the last one and read all of them.
        threads: threads of a block.
        shared: bytes of shared memory of a block.
    """
    names = [f"k_param_{n}" for n in range(len(arrays))]
    params = ", ".join(f".param .u64 .ptr .align 16 {name}" for name in names)
    loads = "\n".join(f"    ld.param.b64 %rd{n}, [{name}];" for n, name in enumerate(names))
    kernel = parse_kernels(KERNEL.format(params=params, threads=threads, loads=loads, body=body))["k"]
    allocations = {n: np.ascontiguousarray(a).reshape(-1).view(np.uint8).copy() for n, a in enumerate(arrays)}
    buffers = [Buffer(n, 0, len(allocations[n])) for n in allocations]
    run_kernel(kernel, Launch("k", (blocks, 1, 1), threads, shared, buffers, buffers[-1:]), allocations)
    return [allocations[n].view(a.dtype).reshape(a.shape) for n, a in enumerate(arrays)]


def each_thread(text: str, inputs: Sequence[Any], dtype: Any, kinds: str = "") -> Any:
    """Return what an instruction computes from each element of the inputs.

    Args:
        text: with operands $0 (the result), $1, $2, ...
        inputs: arrays of one shape.
        dtype: of the result.
        kinds: of the registers, the result's first, as in inline assembly: "r" (32 bits, the default for all),
            "f" (float32), "h" (16 bits) or "l" (64 bits).
    """
    kinds = kinds or "r" * (len(inputs) + 1)
    size, result = inputs[0].size, np.zeros(inputs[0].shape, dtype)
    width = {"r": 4, "f": 4, "h": 2, "l": 8}
    prefix = {"r": "%r1", "f": "%f", "h": "%h", "l": "%rd1"}
    registers = [f"{prefix[kind]}{n}" for n, kind in enumerate(kinds)]
    lines = [f"setp.ge.s32 %p1, %r3, {size}; @%p1 ret;"]
    for n, kind in enumerate(kinds[1:]):
        lines.append(f"mul.wide.s32 %rd9, %r3, {width[kind]}; add.s64 %rd9, %rd9, %rd{n};")
        lines.append(f"ld.global.b{8 * width[kind]} {registers[n + 1]}, [%rd9];")
    lines.append(re.sub(r"\$(\d)", lambda operand: registers[int(operand[1])], text))
    lines.append(f"mul.wide.s32 %rd9, %r3, {width[kinds[0]]}; add.s64 %rd9, %rd9, %rd{len(inputs)};")
    lines.append(f"st.global.b{8 * width[kinds[0]]} [%rd9], {registers[0]};")
    return run_ptx("\n".join(lines), [*inputs, result], threads=128, blocks=-(-size // 128))[-1]
