"""Runs one kernel: all threads of all its blocks at once, an instruction at a time, as arrays of one number a thread.

Where threads part at a branch, those at the earliest instruction run while the others wait, so that they meet again behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from scripts.ptx_emulator.memory import GUARD, Memory
from scripts.ptx_emulator.ptx import Address, EmulationError, Imm, Instruction, Kernel, Name, Operand, Reg, Vector

WARP = 32
AT_ONCE = 1 << 16  # threads: more take more memory, fewer more time
LIMIT = 50_000_000  # instructions of a kernel, before it counts as one that does not end

TYPES: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f16": np.float16,
    "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip

JUMPS = ("bra", "brx", "ret", "exit")
Mask = Any  # bool, one a thread; None: all of them
Step = Callable[["Lanes", Mask], None]
MAKERS: dict[str, Callable[[Instruction], Step]] = {}  # by the first word of the opcode


def opcode(*names: str) -> Callable[[Callable[[Instruction], Step]], Callable[[Instruction], Step]]:
    """Registers what turns an instruction into what runs it."""

    def register(make: Callable[[Instruction], Step]) -> Callable[[Instruction], Step]:
        MAKERS.update(dict.fromkeys(names, make))
        return make

    return register


def unsigned(dtype: Any) -> Any:
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


@dataclass
class Lanes:
    """The threads that run together: their registers and what they share.

    Attributes:
        count: threads, those included that only fill a warp up.
        block, thread: `[count]` number of a thread's block among these, and of the thread in it.
        number: `[count]` that of its block among all blocks of the kernel.
        registers: by name; a number for each thread, or a single one that all have.
        copies: those that have begun: threads, places, bytes, and of which of its groups each thread counts them.
        committed: groups of copies that each thread has closed.
        products: products of four warps that may still read: which four, places, bytes at each, and of which of its groups each
            four count them; `closed`: groups of products that each four have closed. (That results are not read too early, the
            assembler sees to.)
        tensor_memory: see `blackwell.py`, which alone uses it and what follows.
        unfinished: `[blocks, columns]` of it that products will write.
        started, ends: what is to be done when products end, for each block and, once they are committed to it, each barrier.
        met: barriers behind each block.
    """

    kernel: Kernel
    count: int
    block: Any
    thread: Any
    special: dict[str, Any]
    params: dict[str, Any]
    number: Any
    met: Any
    memory: Memory
    shared: Memory
    shared_bytes: int
    local: Memory
    registers: dict[str, Any] = field(default_factory=dict)
    copies: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    committed: Any = None
    products: list[tuple[Any, Any, int, Any]] = field(default_factory=list)
    closed: Any = None
    tensor_memory: Any = None
    unfinished: Any = None
    started: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    ends: dict[int, list[Callable[[], None]]] = field(default_factory=dict)

    def by(self, space: str) -> Any:
        """`[count]`: who accesses memory, as `Memory` has it."""
        if space == "shared":  # warps of a block, which meet at barriers
            return self.met[self.block] * (WARP + 1) + self.thread // WARP
        return self.number if space == "global" else None  # blocks do not meet

    def whole(self, value: Any) -> Any:
        """`[count]`"""
        return np.broadcast_to(value, (self.count,))

    def read(self, operand: Operand, dtype: Any) -> Any:
        """The value of an operand, its lowest bits where the register is wider."""
        dtype = np.dtype(dtype)
        if isinstance(operand, Reg):
            value = self.registers.get(operand.name)
            if value is None:
                raise EmulationError(f"{operand.name} is read before anything was written to it")
            if value.dtype.itemsize != dtype.itemsize:
                value = value.astype(unsigned(dtype))
            return value if dtype == value.dtype else value.view(dtype)
        if isinstance(operand, Imm):
            if dtype == np.bool_:
                return np.bool_(operand.value != 0)
            size = dtype.itemsize
            return np.array(int(operand.value) & ((1 << 8 * size) - 1), f"u{size}").view(dtype)[()]
        if isinstance(operand, Name):
            if operand.text in self.special:
                value = self.special[operand.text]
            elif operand.text in self.kernel.shared or operand.text in self.kernel.local:
                value = np.uint64((self.kernel.shared | self.kernel.local)[operand.text])
            else:
                raise EmulationError(f"'{operand.text}' is neither a register nor a symbol that is known")
            return value.astype(unsigned(dtype)).view(dtype)
        if isinstance(operand, Vector):  # the parts, the first one lowest
            each = np.dtype(f"u{dtype.itemsize // len(operand.parts)}")
            total = unsigned(dtype).type(0)
            for i, part in enumerate(operand.parts):
                total = total | self.read(part, each).astype(unsigned(dtype)) << unsigned(dtype).type(
                    8 * each.itemsize * i
                )
            return total.view(dtype)
        raise EmulationError(f"{operand} is no value")

    def write(self, operand: Operand, value: Any, mask: Mask) -> None:
        """`value` as an array or a numpy number of its own type; a wider register gets it with its sign, if it has one."""
        if isinstance(operand, Vector):
            each = np.dtype(f"u{value.dtype.itemsize // len(operand.parts)}")
            bits = value.view(unsigned(value.dtype))
            for i, part in enumerate(operand.parts):
                self.write(part, (bits >> bits.dtype.type(8 * each.itemsize * i)).astype(each), mask)
            return
        if operand == Name("_"):
            return
        assert isinstance(operand, Reg), operand
        if operand.bits > 1:
            kind = np.dtype(f"u{operand.bits // 8}")
            value = value.view(kind) if value.dtype.itemsize == kind.itemsize else value.astype(kind)
        if mask is not None:
            before = self.registers.get(operand.name)
            value = np.where(mask, value, value.dtype.type(0) if before is None else before)
        self.registers[operand.name] = value

    def address(self, operand: Operand) -> Any:
        assert isinstance(operand, Address)
        wide = not (isinstance(operand.base, Reg) and operand.base.bits == 32)
        base = self.read(operand.base, np.uint64 if wide else np.uint32).astype(np.uint64)
        return (base + np.uint64(operand.offset & (1 << 64) - 1)).view(np.int64)

    def places(self, space: str, operand: Operand, some: Any) -> Any:
        """Where in the memory of all these threads an address lies, for some of the threads (a mask, or numbers); all if None. A
        single number where it is the same for all."""
        address = self.address(operand)
        if space == "global":
            return address if some is None else self.whole(address)[some]
        if some is None:
            some = slice(None)
        memory, own, number = (self.shared, self.shared_bytes, self.block) if space == "shared" else (
            self.local, self.kernel.local_bytes, np.arange(self.count)
        )  # fmt: skip
        address, number = self.whole(address)[some], number[some]
        if address.size and (int(address.min()) < 0 or int(address.max()) >= own):
            owner = "block" if space == "shared" else "thread"
            raise EmulationError(
                f"address {int(address.max()):#x} of {space} memory, of which a {owner} has {own} bytes"
            )
        each = len(memory.bytes) // (self.blocks if space == "shared" else self.count)
        return address + number.astype(np.int64) * each

    @property
    def blocks(self) -> int:
        return int(self.block[-1]) + 1


def launch(
    kernel: Kernel, grid: Sequence[int], threads: int, shared_bytes: int, memory: Memory, params: Sequence[int]
) -> None:
    """One run of a kernel. `params`: addresses in `memory`; `shared_bytes`: what the launch asks for, in all."""
    if len(params) != len(kernel.params):
        raise EmulationError(f"{kernel.name} takes {len(kernel.params)} parameters, not {len(params)}")
    steps = _steps(kernel)
    blocks, each = int(np.prod(grid)), max(1, AT_ONCE // threads)
    for first in range(0, blocks, each):
        numbers = np.arange(first, min(first + each, blocks))
        _run(kernel, steps, _lanes(kernel, numbers, grid, threads, shared_bytes, memory, params))


def _lanes(
    kernel: Kernel,
    numbers: Any,
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    memory: Memory,
    params: Sequence[int],
) -> Lanes:
    filled = -(-threads // WARP) * WARP
    block, thread = np.repeat(np.arange(len(numbers)), filled), np.tile(np.arange(filled), len(numbers))
    x, y, z = numbers[block] % grid[0], numbers[block] // grid[0] % grid[1], numbers[block] // (grid[0] * grid[1])
    lane = (thread % WARP).astype(np.uint32)
    special: dict[str, Any] = {
        "%tid.x": thread.astype(np.uint32), "%tid.y": np.uint32(0), "%tid.z": np.uint32(0), "%ctaid.x": x.astype(np.uint32),
        "%ctaid.y": y.astype(np.uint32), "%ctaid.z": z.astype(np.uint32), "%ntid.x": np.uint32(threads), "%ntid.y": np.uint32(1),
        "%ntid.z": np.uint32(1), "%laneid": lane, "%lanemask_lt": (np.uint32(1) << lane) - np.uint32(1),
        **{f"%nctaid.{axis}": np.uint32(n) for axis, n in zip("xyz", grid, strict=True)},
    }  # fmt: skip
    size = max(shared_bytes, kernel.shared_bytes)
    room = -(-size // GUARD) * GUARD
    shared = Memory(room * len(numbers), "shared memory", memory.span and WARP + 1)
    shared.allowed[:] = shared.writable[:] = np.tile(np.arange(room) < size, len(numbers))
    local = Memory(-(-kernel.local_bytes // 16) * 16 * len(block), "local memory")
    local.allowed[:] = local.writable[:] = True
    values = {name: np.uint64(value) for name, value in zip(kernel.params, params, strict=True)}
    met, committed = np.zeros(len(numbers), np.int64), np.zeros(len(block), np.int64)
    return Lanes(
        kernel, len(block), block, thread, special, values, numbers[block], met, memory, shared, size, local, committed=committed,
        closed=np.zeros(-(-len(block) // (4 * WARP)), np.int64),
    )  # fmt: skip


@cache
def _steps(kernel: Kernel) -> list[list[tuple[Step, Instruction]]]:
    """Of each basic block."""
    unknown = [i.text for block in kernel.blocks for i in block.instructions if i.op not in MAKERS]
    if unknown:
        raise EmulationError(f"{kernel.name}: the instruction '{unknown[0]}' is not known here")
    return [[(MAKERS[i.op](i), i) for i in block.instructions] for block in kernel.blocks]


def _run(kernel: Kernel, steps: list[list[tuple[Step, Instruction]]], lanes: Lanes) -> None:
    end = len(steps)
    at = np.where(lanes.thread < lanes.special["%ntid.x"], 0, end)  # the basic block that a thread comes to next
    waits = np.zeros(lanes.count, bool)
    ran = 0
    while True:
        runs = np.where(waits, end, at)
        number = int(runs.min())
        if number == end:
            if not waits.any():
                return
            _meet(lanes, at, waits)
            continue
        mask = runs == number
        here = None if mask.all() else mask
        go_on = number + 1
        ran += len(steps[number])
        if ran > LIMIT:
            raise EmulationError(f"{kernel.name} does not end: {LIMIT} instructions")
        for step, i in steps[number]:
            active = here
            if i.guard is not None:
                holds = lanes.whole(lanes.read(i.guard, np.bool_)) == i.wanted
                active = holds if here is None else holds & here
            if i.op in JUMPS:
                goes = mask if active is None else active
                at[mask] = go_on
                at[goes] = end if i.op in ("ret", "exit") else _targets(lanes, i)[goes]
                break
            if i.words[:2] == ("bar", "sync"):
                waits |= mask
                at[mask] = go_on
                break
            if active is None or active.any():
                try:
                    with np.errstate(all="ignore"):
                        step(lanes, active)
                except EmulationError as error:
                    raise EmulationError(f"{kernel.name}: '{i.text}': {error}") from None
        else:
            at[mask] = go_on


def _targets(lanes: Lanes, i: Instruction) -> Any:
    """`[count]`: the basic block that each thread would branch to."""
    if i.op == "bra":
        return lanes.whole(lanes.kernel.labels[i.operands[0].text])  # type: ignore[union-attr]
    table = np.array([lanes.kernel.labels[label] for label in lanes.kernel.tables[i.operands[1].text]])  # type: ignore[union-attr]
    number = lanes.whole(lanes.read(i.operands[0], np.uint32))
    return table[np.minimum(number, len(table) - 1)]  # threads that do not branch may hold any number


def _meet(lanes: Lanes, at: Any, waits: Any) -> None:
    """The threads that wait go on; those of a block must wait at the same barrier."""
    for block in range(lanes.blocks):
        places = at[waits & (lanes.block == block)]
        if len(places) and (places != places[0]).any():
            raise EmulationError(f"{lanes.kernel.name}: threads of a block wait at different barriers")
        lanes.met[block] += len(places) > 0
    waits[:] = False


@opcode(*JUMPS, "bar", "fence", "griddepcontrol", "membar")
def _nothing(i: Instruction) -> Step:
    """Branches and barriers are done where blocks are run; the order of memory is that of the instructions."""
    if i.words[:2] == ("bar", "sync") and i.operands != (Imm(0),):
        raise EmulationError(f"of barriers only that of a whole block is known here, not '{i.text}'")
    return lambda lanes, mask: None
