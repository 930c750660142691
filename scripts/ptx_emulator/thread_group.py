"""State of the threads that run together, and the registry of the handlers that execute instructions on it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .memory import GUARD_BYTES, Memory
from .ptx import Address, EmulationError, Imm, Kernel, Name, Operand, PtxInstruction, Reg, Vector

WARP_SIZE = 32

Mask = Any  # bool, one a thread; None: all threads
Executor = Callable[["ThreadGroup", Mask], None]
Handler = Callable[[PtxInstruction], Executor]
HANDLERS: dict[str, Handler] = {}  # by opcode


def handles(*opcodes: str) -> Callable[[Handler], Handler]:
    """Register a handler, which turns an instruction into the function that executes it."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register


def unsigned(dtype: Any) -> Any:
    """Return the unsigned integer dtype of the same size."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


class PendingCopy(NamedTuple):  # an asynchronous copy that has begun
    threads: Any
    addresses: Any  # of shared memory
    data: Any
    commit_group: Any


class PendingProduct(NamedTuple):  # an asynchronous product that may still read shared memory
    warpgroups: Any
    addresses: Any
    size: int  # bytes at each address
    commit_group: Any


class ThreadGroup:
    """The threads of several blocks, which run together, one instruction at a time.

    Args:
        block_ids: indices in the grid; `grid`: blocks along x, y and z; `threads`: threads of a block, along x.
        shared_bytes: shared memory of a block that the launch asks for, in total.
        global_memory: memory of the whole grid; `params`: an address in it for each parameter of the kernel.
    Attributes:
        num_threads: includes the inactive threads that fill up the last warp of a block.
        block, thread: `[num_threads]`, index of a thread's block in this group, and of the thread in its block.
        block_id: `[num_threads]`, index of a thread's block in the grid.
        barrier_epoch: `[num_blocks]`, barriers that each block has passed.
        registers: by name; an array with a value for each thread, or one scalar that all threads share.
        copy_groups: `[num_threads]`, groups of copies that each thread has committed.
        product_groups: `[num_warpgroups]`, groups of products that each warpgroup has committed. Only their reads of
            shared memory are tracked: the assembler makes sure that no thread uses a result too early.
        tensor_memory: `[num_blocks, 128, 512]` uint32; this and the next three attributes belong to `tcgen05.py`.
        awaits_product: `[num_blocks, 512]`, columns of tensor memory that unfinished products write.
        on_product_end: callbacks for the end of each block's products, until they are committed to a barrier.
        on_barrier: callbacks for the completion of each barrier, by its address.
    """

    def __init__(
        self,
        kernel: Kernel,
        block_ids: Any,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        global_memory: Memory,
        params: Sequence[int],
    ):
        block_threads, self.num_blocks = -(-threads // WARP_SIZE) * WARP_SIZE, len(block_ids)
        self.kernel, self.num_threads = kernel, block_threads * self.num_blocks
        self.block = np.repeat(np.arange(self.num_blocks), block_threads)
        self.thread = np.tile(np.arange(block_threads), self.num_blocks)
        self.block_id = block_ids[self.block]
        self.registers: dict[str, Any] = {}
        self.params = {name: np.uint64(value) for name, value in zip(kernel.params, params, strict=True)}
        lane = (self.thread % WARP_SIZE).astype(np.uint32)
        special: dict[str, Any] = {"%laneid": lane, "%lanemask_lt": (np.uint32(1) << lane) - np.uint32(1)}
        block_id = self.block_id
        for axis, size, num_threads in zip("xyz", grid, (threads, 1, 1), strict=True):
            special[f"%tid.{axis}"] = self.thread.astype(np.uint32) if axis == "x" else np.uint32(0)
            special[f"%ntid.{axis}"] = np.uint32(num_threads)
            special[f"%ctaid.{axis}"] = (block_id % size).astype(np.uint32)
            special[f"%nctaid.{axis}"] = np.uint32(size)
            block_id = block_id // size
        self.special_registers = special

        self.global_memory, self.shared_bytes = global_memory, max(shared_bytes, kernel.shared_bytes)
        stride = -(-self.shared_bytes // GUARD_BYTES) * GUARD_BYTES
        num_owners = global_memory.num_owners and WARP_SIZE + 1
        self.shared_memory = Memory(stride * self.num_blocks, "shared memory", num_owners)
        used = np.tile(np.arange(stride) < self.shared_bytes, self.num_blocks)
        self.shared_memory.readable[:] = self.shared_memory.writable[:] = used
        self.local_memory = Memory(-(-kernel.local_bytes // 16) * 16 * self.num_threads, "local memory")
        self.local_memory.readable[:] = self.local_memory.writable[:] = True

        self.barrier_epoch = np.zeros(self.num_blocks, np.int64)
        self.copy_groups = np.zeros(self.num_threads, np.int64)
        self.product_groups = np.zeros(-(-self.num_threads // (4 * WARP_SIZE)), np.int64)
        self.pending_copies: list[PendingCopy] = []
        self.pending_products: list[PendingProduct] = []
        self.tensor_memory: Any = None
        self.awaits_product: Any = None
        self.on_product_end: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self.on_barrier: dict[int, list[Callable[[], None]]] = defaultdict(list)

    def memory(self, space: str) -> Memory:
        return {"global": self.global_memory, "shared": self.shared_memory, "local": self.local_memory}[space]

    def owner(self, space: str) -> Any:
        """Return `[num_threads]`, the owner number of each thread's accesses, as `Memory` defines it."""
        if space == "shared":  # the owners are the warps of a block, which wait for one another at barriers
            return self.barrier_epoch[self.block] * (WARP_SIZE + 1) + self.thread // WARP_SIZE
        return self.block_id if space == "global" else None  # blocks never wait for one another

    def active(self, mask: Mask) -> Any:
        """Return the numbers of the threads in a mask."""
        return np.arange(self.num_threads) if mask is None else np.flatnonzero(mask)

    def broadcast(self, value: Any) -> Any:
        return np.broadcast_to(value, (self.num_threads,))

    def read(self, operand: Operand, dtype: Any) -> Any:
        """Return the value of an operand, a scalar if all threads share it. Of a wider register, read the low bits."""
        dtype = np.dtype(dtype)
        bits = unsigned(dtype)
        if isinstance(operand, Reg):
            value = self.registers.get(operand.name)
            if value is None:
                raise EmulationError(f"{operand.name} is read before anything was written to it")
            if value.dtype.itemsize != dtype.itemsize:
                value = value.astype(bits)
            return value if dtype == value.dtype else value.view(dtype)
        if isinstance(operand, Imm):
            if dtype == np.bool_:
                return np.bool_(operand.value != 0)
            return np.array(operand.value & ((1 << 8 * dtype.itemsize) - 1), bits).view(dtype)[()]
        if isinstance(operand, Name):
            symbols = self.kernel.shared | self.kernel.local
            if operand.text in self.special_registers:
                value = self.special_registers[operand.text]
            elif operand.text in symbols:
                value = np.uint64(symbols[operand.text])
            else:
                raise EmulationError(f"'{operand.text}' is neither a register nor a known symbol")
            return value.astype(bits).view(dtype)
        if isinstance(operand, Vector):  # the first element holds the lowest bits
            element_bits = 8 * dtype.itemsize // len(operand.elements)
            total = bits.type(0)
            for i, element in enumerate(operand.elements):
                value = self.read(element, np.dtype(f"u{element_bits // 8}")).astype(bits)
                total = total | value << bits.type(element_bits * i)
            return total.view(dtype)
        raise EmulationError(f"{operand} has no value")

    def read_all(self, operand: Operand, dtype: Any) -> Any:
        """Return `[num_threads]`, the value of an operand for each thread."""
        return self.broadcast(self.read(operand, dtype))

    def write(self, operand: Operand, value: Any, mask: Mask) -> None:
        """Write an array or scalar of the operation's own dtype; a wider register gets it sign- or zero-extended."""
        if isinstance(operand, Vector):
            element_bits = 8 * value.dtype.itemsize // len(operand.elements)
            bits = value.view(unsigned(value.dtype))
            for i, element in enumerate(operand.elements):
                self.write(element, (bits >> bits.dtype.type(element_bits * i)).astype(f"u{element_bits // 8}"), mask)
            return
        if operand == Name("_"):
            return
        assert isinstance(operand, Reg), operand
        if operand.bits > 1:
            dtype = np.dtype(f"u{operand.bits // 8}")
            value = value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)
        if mask is not None:
            before = self.registers.get(operand.name)
            value = np.where(mask, value, value.dtype.type(0) if before is None else before)
        self.registers[operand.name] = value

    def address(self, operand: Operand) -> Any:
        """Return the int64 address that an operand names in its own state space."""
        assert isinstance(operand, Address)
        narrow = isinstance(operand.base, Reg) and operand.base.bits == 32
        base = self.read(operand.base, np.uint32 if narrow else np.uint64).astype(np.uint64)
        return (base + np.uint64(operand.offset & (1 << 64) - 1)).view(np.int64)

    def memory_index(self, space: str, operand: Operand, threads: Any) -> Any:
        """Return int64 indices into `memory(space)`, which holds the state space of every block or thread in turn.

        `threads`: a mask or thread numbers; None: all. The result is a scalar if the address is the same for all.
        """
        address = self.address(operand)
        if space == "global":
            return address if threads is None else self.broadcast(address)[threads]
        if threads is None:
            threads = slice(None)
        if space == "shared":
            part, size, index, count = "block", self.shared_bytes, self.block, self.num_blocks
        else:
            part, size, index, count = "thread", self.kernel.local_bytes, np.arange(self.num_threads), self.num_threads
        address, index = self.broadcast(address)[threads], index[threads]
        if address.size and (int(address.min()) < 0 or int(address.max()) >= size):
            highest = int(address.max())
            raise EmulationError(f"address {highest:#x} of {space} memory, of which a {part} has {size} bytes")
        return address + index.astype(np.int64) * (len(self.memory(space).bytes) // count)
