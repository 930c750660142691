"""Properties of what XLA compiled: kernels and copies of a program, instructions and registers of a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scripts.ptx_emulator.hlo import HloInstruction, HloModule

# Opcodes that launch no kernel of their own.
_NO_KERNEL = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all while conditional call partition-id "
    "copy-done fusion-done async-done".split()
)


class CompiledProgram(HloModule):
    """Counts of the optimized HLO of a compiled program. `text`: of `jax.stages.Compiled.as_text`."""

    def buffer_writers(self) -> Iterator[HloInstruction]:
        """Yield the instructions that write a buffer of their own, those of all loops and branches included."""
        instructions = [inst for computation in self.computations.values() for inst in computation]
        fused = {inst.called("calls") for inst in instructions if inst.opcode == "fusion"}
        for name, computation in self.computations.items():
            if name not in fused:
                yield from (inst for inst in computation if inst.opcode not in _NO_KERNEL)

    def count_buffers(self, types: set[str]) -> Counter[str]:
        """Count the buffers of the given types that the program writes. A type: `u8[10,256]`, without leading ones."""
        counts: Counter[str] = Counter()
        for inst in self.buffer_writers():
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", inst.type):
                while dims.startswith("1,"):
                    dims = dims[2:]
                if f"{dtype}[{dims}]" in types:
                    counts[f"{dtype}[{dims}]"] += 1
        return counts

    def count_kernels(self, computation: str | None = None) -> tuple[int, list[tuple[int, int]]]:
        """Count the kernels (and device copies) that one run of a computation launches. None: the entry computation.

        Loops with a known trip count are multiplied out; of the branches of a conditional the longest counts.

        Returns:
            That count, and for each loop with an unknown trip count: its own kernels per iteration, and how often it is
            entered.
        """
        count, unknown_loops = 0, []
        for inst in self.computations[computation or self.entry]:
            count += inst.opcode not in _NO_KERNEL
            if inst.opcode == "while":
                body, inner_loops = self.count_kernels(inst.called("body"))
                condition, _ = self.count_kernels(inst.called("condition"))
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', inst.text)
                if trips:
                    count += int(trips[1]) * (body + condition)
                    unknown_loops += [(kernels, int(trips[1]) * entered) for kernels, entered in inner_loops]
                else:
                    unknown_loops += [(body + condition, 1), *inner_loops]
            elif inst.opcode == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", inst.text)
                pattern = r"%([\w.\-]+)" if listed else r"(?:true|false)_computation=%([\w.\-]+)"
                branches = re.findall(pattern, listed[1] if listed else inst.text)
                count += max(self.count_kernels(branch)[0] for branch in branches)
            elif inst.opcode == "call":
                called, inner_loops = self.count_kernels(inst.called("to_apply"))
                count, unknown_loops = count + called, unknown_loops + inner_loops
        return count, unknown_loops


_FLOAT_INSTRUCTION = re.compile(
    r"^\s+(?:@!?%p\d+ )?((?:fma|mul|add|sub|neg|abs|div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|max|min|cvt|mma|wgmma)[\w.]*"
    r"(?:f32|f16)[\w.]*)",
    re.MULTILINE,
)
_LOOP_OVERHEADS = {"unprefetched": r"ld\.global", "stored": r"st\.shared", "shuffled": r"shfl\.sync"}


def _kernels(dump: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield name and PTX of each kernel with one of the prefixes, from a folder that `--xla_dump_to` filled."""
    for file in dump.glob("*.ptx"):
        for entry in file.read_text().split(".visible .entry ")[1:]:
            name = entry[: entry.index("(")]
            if name.startswith(prefixes):
                yield name, entry


def float_instructions(dump: Path, prefixes: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the floating-point instructions of each kernel with one of the prefixes, in order.

    A kernel with the same instructions for one row and for five gives a row the same bits in both.
    """
    return {name: _FLOAT_INSTRUCTION.findall(ptx) for name, ptx in _kernels(dump, prefixes)}


def longest_loop(code: str, label: str, jump: str) -> str:
    """Return the longest range of code from a label to a jump back to it.

    `label` and `jump` are regular expressions; the first group of each is the name of the label.
    """
    labels = {match[1]: match.start() for match in re.finditer(label, code)}
    ranges = ((labels.get(match[1], match.end()), match.end()) for match in re.finditer(jump, code))
    begin, end = max(ranges, key=lambda bounds: bounds[1] - bounds[0], default=(0, 0))
    return code[begin:end]


def loop_overheads(dump: Path, prefixes: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Count, in the longest loop of each kernel with one of the prefixes, instructions that a good loop does without.

    Returns:
        By kernel: `unprefetched` loads, which wait for global memory; values `stored` to shared memory by threads
        (asynchronous copies need no such stores); and values `shuffled` between threads.
    """
    counts = {}
    for name, ptx in _kernels(dump, prefixes):
        loop = longest_loop(ptx, r"(\$L__BB\d+_\d+):", r"bra(?:\.uni)?\s+(\$\w+)")
        counts[name] = {kind: len(re.findall(pattern, loop)) for kind, pattern in _LOOP_OVERHEADS.items()}
    return counts


def cuda_tool(name: str) -> Path | None:
    """Return the path of one of NVIDIA's programs if pip installed it."""
    return next(Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/**/bin/{name}"), None)


def kernel_resources(dump: Path, prefixes: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Return what each kernel with one of the prefixes uses, from a folder that `--xla_dump_to` filled, and empty it.

    Returns:
        By kernel: `shared` bytes and `threads` of a block, `blocks`, `registers` and `spilled` bytes of a thread.
        `ptxas` (package nvidia-cuda-nvcc-cu12) counts the last two, which are left out if it is not installed.
    """
    resources: dict[str, dict[str, int]] = {}
    launch = re.compile(r" (\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+)[\d, ]+\]  shared_memory: (\d+) bytes")
    for file in dump.glob("*.thunk_sequence.txt"):
        for name, x, y, z, threads, shared in launch.findall(file.read_text()):
            if name.startswith(prefixes):
                blocks = int(x) * int(y) * int(z)
                resources[name] = {"shared": int(shared), "threads": int(threads), "blocks": blocks}
    ptxas = cuda_tool("ptxas")
    for file in dump.glob("*.ptx"):
        ptx = file.read_text()
        arch = re.search(r"\.target (\w+)", ptx)
        if ptxas and arch and resources.keys() & set(re.findall(r"\.entry (\w+)\(", ptx)):
            command = [str(ptxas), "-v", "-arch", arch[1], "-o", os.devnull, str(file)]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            for name, spilled, registers in re.findall(
                r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", report, re.DOTALL
            ):
                if name in resources:
                    resources[name] |= {"registers": int(registers), "spilled": int(spilled)}
    for file in dump.iterdir():
        file.unlink()
    return resources
