"""Compiling for an NVIDIA GPU on a machine that has none, and reading what came out.

XLA's CUDA plugin compiles down to machine code for a described device: Triton kernels, fusions, buffers. What it cannot
do here is run, time or tune anything. Needs `jax[cuda12-local]`; make the `Target` before jax is first used.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from kernels_pallas.platform import compile_options, override_platform

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU as XLA describes it. `kind` is the name that jax looks up; it does not know the RTX 3090, whose compute
    capability and memory hierarchy are those of an A10."""

    kind: str
    capability: tuple[int, int]
    cores: int
    shared_kib: int  # of a multiprocessor
    threads: int  # of a multiprocessor
    memory_gib: float
    gb_per_second: int
    l2_mib: int
    ghz: float
    fpus: int = 128

    def config(self) -> str:
        """A `GpuTargetConfig` text proto."""
        major, minor = self.capability
        return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
            shared_memory_per_core: {self.shared_kib * 1024} shared_memory_per_block_optin: {(self.shared_kib - 1) * 1024}
            threads_per_core_limit: {self.threads} core_count: {self.cores} fpus_per_core: {self.fpus}
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            memory_bandwidth: {self.gb_per_second}000000000 l2_cache_size: {self.l2_mib * 2**20}
            clock_rate_ghz: {self.ghz} device_memory_size: {int(self.memory_gib * GIB)}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.kind}" """


CARDS = {
    "rtx3090": Card("NVIDIA A10", (8, 6), 82, 100, 1536, 23.6, 936, 6, 1.695),
    "a100": Card("NVIDIA A100-SXM4-40GB", (8, 0), 108, 164, 2048, 39.4, 1555, 40, 1.41, 64),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 100, 1536, 23.5, 1008, 72, 2.52),
    "h200": Card("NVIDIA H200", (9, 0), 132, 228, 2048, 139.8, 4800, 50, 1.98),
    "b200": Card("NVIDIA B200", (10, 0), 148, 228, 2048, 178.4, 8000, 126, 1.97),
}


# Without the second flag jax 0.11 does not leave the PTX there; the third writes all constants out.
DUMP_FLAGS = "--xla_dump_to={} --xla_dump_emitter_re=ptx --xla_dump_large_constants=true"


class Target:
    """A described card that programs can be compiled for. `dump`: a folder that gets all that XLA writes about each."""

    def __init__(self, card: Card, dump: Path | None = None):
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin would ask the driver, which is not there
        flags = [os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0"]
        os.environ["XLA_FLAGS"] = " ".join(flags + ([DUMP_FLAGS.format(dump)] if dump else []))
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=card.config())
        self.mesh = topologies.make_mesh(topology, (1,), ("x",))
        self.card = card

    def compile(self, fn: Any, *shapes: Any, **static: Any) -> Any:
        """`jax.stages.ModelRunner` of a jitted function for arguments of these shapes."""
        put = NamedSharding(self.mesh, PartitionSpec())
        args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=put), shapes)
        with override_platform("cuda", self.card.capability), use_abstract_mesh(self.mesh.abstract_mesh):
            return fn.lower(*args, **static).compile(**compile_options())


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of arguments, results, temporaries, and of results that take the place of arguments."""
    found = compiled.memory_analysis()
    return {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}


# The program after all of XLA's passes: computations of instructions.

_HEADER = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^ +(?:ROOT )?%[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_NO_KERNEL = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all while conditional call partition-id "
    "copy-done fusion-done async-done".split()
)


@dataclass(frozen=True)
class Instruction:
    result: str  # dtype[dims]{layout}, or a tuple of these
    op: str
    text: str


class Program:
    """The optimised HLO of a compiled program."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        name = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[1]
                self.computations[name] = []
                if line.startswith("ENTRY"):
                    self.entry = name
            elif name and (found := _LINE.match(line)):
                self.computations[name].append(Instruction(found[1], found[2], line))
        self.fused = {n for i in self.all() if i.op == "fusion" for n in re.findall(r"calls=%([\w.\-]+)", i.text)}

    def all(self) -> Iterator[Instruction]:
        for instructions in self.computations.values():
            yield from instructions

    def made(self) -> Iterator[Instruction]:
        """Instructions that write a buffer of their own, in whatever loop or branch."""
        for name, instructions in self.computations.items():
            if name not in self.fused:
                yield from (i for i in instructions if i.op not in _NO_KERNEL)

    def copies(self, shapes: set[str]) -> Counter[str]:
        """Buffers of one of these types (`u8[10,256]`; leading axes of size 1 do not count) that the program makes."""
        found: Counter[str] = Counter()
        for i in self.made():
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", i.result):
                while dims.startswith("1,"):
                    dims = dims[2:]
                if f"{dtype}[{dims}]" in shapes:
                    found[f"{dtype}[{dims}]"] += 1
        return found

    def loops(self, name: str | None = None) -> tuple[int, list[tuple[int, int]]]:
        """Kernels (and device copies) that one run of a computation launches, loops with a known number of turns
        multiplied out; and for each loop without: (its own kernels a turn, how often it is entered). Of the branches of
        a conditional the longest counts."""
        own, dynamic = 0, []
        for i in self.computations[name or self.entry]:
            if i.op not in _NO_KERNEL:
                own += 1
            called = dict(re.findall(r"(condition|body|to_apply)=%([\w.\-]+)", i.text))
            if i.op == "while":
                inner, unknown = self.loops(called["body"])
                test, _ = self.loops(called["condition"])
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.text)
                if turns:
                    times = int(turns[1])
                    own += times * (inner + test)
                    dynamic += [(kernels, times * entered) for kernels, entered in unknown]
                else:
                    dynamic += [(inner + test, 1), *unknown]
            elif i.op == "conditional":
                branches = re.findall(r"%([\w.\-]+)", re.search(r"branch_computations=\{([^}]*)\}", i.text)[1]) if (
                    "branch_computations" in i.text
                ) else re.findall(r"(?:true|false)_computation=%([\w.\-]+)", i.text)  # fmt: skip
                own += max(self.loops(branch)[0] for branch in branches)
            elif i.op == "call":
                inner, unknown = self.loops(called["to_apply"])
                own, dynamic = own + inner, dynamic + unknown
        return own, dynamic


# The machine code


_FLOATS = re.compile(
    r"^\s+(?:@!?%p\d+ )?((?:fma|mul|add|sub|neg|abs|div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|max|min|cvt|mma|wgmma)[\w.]*"
    r"(?:f32|f16)[\w.]*)",
    re.MULTILINE,
)


def _entries(dump: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and PTX of each kernel whose name starts so, from a folder that `--xla_dump_to` filled."""
    for file in dump.glob("*.ptx"):
        for entry in file.read_text().split(".visible .entry ")[1:]:
            name = entry[: entry.index("(")]
            if name.startswith(prefixes):
                yield name, entry


def float_instructions(dump: Path, prefixes: tuple[str, ...]) -> dict[str, list[str]]:
    """The floating-point instructions of each kernel of `_entries`, in their order. Where they are the same for one row as for
    five, so are a row's bits."""
    return {name: _FLOATS.findall(entry) for name, entry in _entries(dump, prefixes)}


def longest_loop(code: str, label: str, jump: str) -> str:
    """The longest stretch of code from a label to a jump back to it; both are expressions whose first group is the label."""
    labels = {found[1]: found.start() for found in re.finditer(label, code)}
    jumps = ((labels.get(found[1], found.end()), found.end()) for found in re.finditer(jump, code))
    begin, end = max(jumps, key=lambda jump: jump[1] - jump[0], default=(0, 0))
    return code[begin:end]


_DETOURS = {"unprefetched": r"ld\.global", "stored": r"st\.shared", "shuffled": r"shfl\.sync"}


def detours(dump: Path, prefixes: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """In the longest loop of each kernel of `_entries`: loads that wait for memory where they stand, stores to shared memory by
    threads (copies go there without them), and shuffles."""
    found = {}
    for name, entry in _entries(dump, prefixes):
        loop = longest_loop(entry, r"(\$L__BB\d+_\d+):", r"bra(?:\.uni)?\s+(\$\w+)")
        found[name] = {what: len(re.findall(text, loop)) for what, text in _DETOURS.items()}
    return found


def cuda_tool(name: str) -> Path | None:
    """One of NVIDIA's programs that pip installed, if it did."""
    return next(Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/**/bin/{name}"), None)


def kernel_resources(dump: Path, prefixes: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """What each kernel whose name starts so takes, from a folder that `--xla_dump_to` filled (it is emptied): registers
    a thread, spilled bytes a thread, bytes of shared memory of a block, threads of a block, blocks.

    `ptxas` (package nvidia-cuda-nvcc-cu12) counts the registers; without it they are left out.
    """
    found: dict[str, dict[str, int]] = {}
    launch = re.compile(r" (\S+) grid: \[([\d, ]+)\] threads: \[(\d+)[\d, ]+\]  shared_memory: (\d+) bytes")
    for file in dump.glob("*.thunk_sequence.txt"):
        for name, grid, threads, shared in launch.findall(file.read_text()):
            blocks = [int(n) for n in grid.split(",")]
            found[name] = {"shared": int(shared), "threads": int(threads), "blocks": blocks[0] * blocks[1] * blocks[2]}
    found = {name: use for name, use in found.items() if name.startswith(prefixes)}
    ptxas = cuda_tool("ptxas")
    for file in dump.glob("*.ptx"):
        ptx = file.read_text()
        mine = [name for name in re.findall(r"\.entry (\w+)\(", ptx) if name in found]
        if ptxas and mine:
            arch = re.search(r"\.target (\w+)", ptx)[1]  # type: ignore[index]
            command = [str(ptxas), "-v", "-arch", arch, "-o", os.devnull, str(file)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            for name, spilled, registers in re.findall(
                r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", said, re.DOTALL
            ):
                if name in found:
                    found[name] |= {"registers": int(registers), "spilled": int(spilled)}
    for file in dump.iterdir():
        file.unlink()
    return found
