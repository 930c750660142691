"""Matrix products of one warp (`mma`) or one warpgroup, four warps (`wgmma`), and matrix loads and stores.

NVIDIA does not document how the hardware orders and rounds the sums of a product. Here the sum over K of one
instruction is rounded once and then added to the accumulator in float32, so that an element has the same bits in
instructions of every shape (see `multiply`). That is the emulator's choice: no card was asked.
"""

import re
from typing import Any

import ml_dtypes
import numpy as np

from .ptx import EmulationError, Imm, Operand, PtxInstruction, Reg, Vector, immediate, registers_of, unsupported
from .thread_group import WARP_SIZE, Executor, Mask, PendingProduct, ThreadGroup, handles

WARPGROUP_SIZE = 4 * WARP_SIZE
LANE = np.arange(WARP_SIZE)
GROUP_ID, THREAD_IN_GROUP = (
    LANE // 4,
    LANE % 4,
)  # PTX ISA, "Matrix Fragments for mma.m16n8k16": groupID, threadID_in_group
SWIZZLE_BYTES = np.array([16, 128, 64, 32])  # by bits 62 to 63 of a matrix descriptor
SIGNIFICANT_BITS = {"bf16": 8, "f16": 11, "tf32": 11}
DOUBLE_BITS = 53


def active_units(mask: Mask, size: int = WARP_SIZE) -> Any:
    """Return which warps (or units of another size) run; a slice if all do. A unit must run as a whole."""
    if mask is None:
        return slice(None)
    units = mask.reshape(-1, size)
    if (units.any(1) != units.all(1)).any():
        raise EmulationError("only some threads of a warp take part")
    return units[:, 0]


def unpack_values(words: Any, kind: str) -> Any:
    """Convert uint32 `[...]` to float32: `[..., 2]` for a pair of bf16 or f16, `[..., 1]` for tf32."""
    if kind == "tf32":  # 10 bits of mantissa; the hardware ignores the bits below
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    half = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[kind]
    return np.stack([(words >> np.uint32(s)).astype(np.uint16).view(half).astype(np.float32) for s in (0, 16)], axis=-1)


def multiply(a: Any, b: Any, kind: str) -> Any:
    """Return float32 `[units, m, n]`, the products of `[units, m, k]` and `[units, n, k]` float32, summed over k.

    Sums are float64 and rounded once. Where the exponents of both matrices of a unit span few enough bits, every
    partial sum is exact, so numpy may add in any order; the other units are summed in ascending order of k. An element
    has the same bits in a product with more rows or columns: there the exponents span no fewer bits, and the ascending
    order gives an exact sum, too.
    """
    room = DOUBLE_BITS - 2 * SIGNIFICANT_BITS[kind] - int(a.shape[2] - 1).bit_length()
    span = _exponent_span(a) + _exponent_span(b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    total = np.matmul(a, b.transpose(0, 2, 1))
    if (inexact := np.flatnonzero(~(span <= room))).size:
        a, b = a[inexact], b[inexact]
        ordered = np.zeros((len(a), a.shape[1], b.shape[1]))
        for i in range(a.shape[2]):
            ordered += a[:, :, None, i] * b[:, None, :, i]
        total[inexact] = ordered
    return total.astype(np.float32)


def _exponent_span(x: Any) -> Any:
    """Return for each matrix of `[units, rows, k]` the difference of its largest and smallest exponent, without zeros.

    0 for a matrix of zeros, NaN or infinity for one that is not finite.
    """
    magnitude = np.abs(x).reshape(len(x), -1)
    largest = magnitude.max(axis=1)
    smallest = np.where(magnitude > 0, magnitude, np.inf).min(axis=1)
    span = np.frexp(largest)[1] - np.frexp(smallest)[1]
    return np.where(largest == 0, 0.0, np.where(np.isfinite(largest), span, np.nan))


def _read_registers(group: ThreadGroup, operand: Operand, unit: int = WARP_SIZE) -> list[Any]:
    """Return uint32 `[num_units, unit]` for each register of an operand."""
    return [group.read_all(register, np.uint32).reshape(-1, unit) for register in registers_of(operand)]


def _matrix(words: list[Any], kind: str, row_blocks: int) -> Any:
    """Return float32 `[warps, 8 * row_blocks, k]` from the registers of a fragment: of A, or of B with rows along N."""
    per_word = 1 if kind == "tf32" else 2
    matrix = np.empty((len(words[0]), 8 * row_blocks, 4 * per_word * len(words) // row_blocks), np.float32)
    for n, word in enumerate(words):
        values = unpack_values(np.ascontiguousarray(word), kind)
        column = per_word * (THREAD_IN_GROUP + 4 * (n // row_blocks))
        for e in range(per_word):
            matrix[:, GROUP_ID + 8 * (n % row_blocks), column + e] = values[:, :, e]
    return matrix


@handles("mma")
def _mma(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma"."""
    kind = inst.tokens[7]
    shape = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}.get(kind)
    if inst.tokens[3:] != (shape, "row", "col", "f32", kind, kind, "f32"):
        raise unsupported(inst)
    target, a, b, c = inst.operands

    def execute(group: ThreadGroup, mask: Mask) -> None:
        active_units(mask)
        matrix_a, matrix_b = _matrix(_read_registers(group, a), kind, 2), _matrix(_read_registers(group, b), kind, 1)
        product = multiply(matrix_a, matrix_b, kind)
        for n, (register, addend) in enumerate(zip(registers_of(target), _read_registers(group, c), strict=True)):
            value = product[:, GROUP_ID + 8 * (n // 2), 2 * THREAD_IN_GROUP + n % 2] + addend.view(np.float32)
            group.write(register, value.reshape(-1), mask)

    return execute


@handles("ldmatrix", "stmatrix")
def _move_matrices(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Warp Level Matrix Load Instruction: ldmatrix" and "Warp Level Matrix Store Instruction: stmatrix".

    A matrix has 8 rows of 16 bytes. Threads 8n to 8n + 7 hold the addresses of the rows of matrix n.
    """
    count = int(inst.tokens[inst.tokens.index("m8n8") + 1][1:])
    is_load = inst.opcode == "ldmatrix"
    registers, address = inst.operands if is_load else inst.operands[::-1]
    # The row and column of the two elements that a thread holds of each matrix.
    places = [(GROUP_ID, 2 * THREAD_IN_GROUP + e) for e in (0, 1)]
    if "trans" in inst.tokens:
        places = [(column, row) for row, column in places]

    def execute(group: ThreadGroup, mask: Mask) -> None:
        warps = active_units(mask)
        has_address = np.zeros((group.num_threads // WARP_SIZE, WARP_SIZE), bool)
        has_address[warps, : 8 * count] = True
        threads = has_address.reshape(-1)
        index, owner = group.memory_index("shared", address, threads), group.owner("shared")[threads]
        if is_load:
            rows = group.shared_memory.load_bytes(index, 16, owner).view(np.uint16).reshape(-1, count, 8, 8)
            for n, register in enumerate(registers_of(registers)):
                low, high = (rows[:, n, row, column].astype(np.uint32) for row, column in places)
                value = np.zeros(has_address.shape, np.uint32)
                value[warps] = low | high << np.uint32(16)
                group.write(register, value.reshape(-1), mask)
            return
        rows = np.empty((len(index) // (8 * count), count, 8, 8), np.uint16)
        for n, word in enumerate(_read_registers(group, registers)):
            for e, (row, column) in enumerate(places):
                rows[:, n, row, column] = (word[warps] >> np.uint32(16 * e)).astype(np.uint16)
        group.shared_memory.store_bytes(index, rows.reshape(-1, 8).view(np.uint8), owner)

    return execute


def matrix_index(
    group: ThreadGroup, block: Any, descriptor: Any, swizzle: Any, shape: tuple[int, int, int], transposed: bool
) -> Any:
    """Return int64 `[n, rows, columns]`, indices into shared memory of the elements of n matrices; columns are along K.

    PTX ISA, "Register Fragments and Shared Memory Matrix Layouts" (9.7.15.5.1): the canonical layouts.

    Args:
        block: `[n]`; `descriptor`: int64 `[n]`, the start address and two byte offsets.
        swizzle: `[n]`, bytes of a line. Within a line, units of 16 bytes are permuted by the number of the line.
        shape: rows, columns, bytes of an element.
        transposed: neighbours along the rows are contiguous, instead of neighbours along K.
    """
    if len(np.unique(swizzle)) != 1 or np.any(descriptor >> 49 & 7):
        raise EmulationError("matrix descriptors that differ in more than their addresses are not supported")
    line, (rows, columns, size) = int(swizzle[0]), shape
    start, leading, stride = ((descriptor >> shift & 0x3FFF)[:, None, None] << 4 for shift in (0, 16, 32))
    row, column = np.arange(rows)[:, None], np.arange(columns)[None]
    if transposed:
        per_line = line // size
        far, near = (stride, leading) if line == 16 else (leading, stride)
        offset = row % per_line * size + row // per_line * far + column % 8 * line + column // 8 * near
    else:
        per_unit = 16 // size
        unit_stride = leading if line == 16 else 16
        offset = row % 8 * line + row // 8 * stride + column // per_unit * unit_stride + column % per_unit * size
    addresses = start + offset
    addresses = addresses ^ (addresses >> 7 & line // 16 - 1) << 4
    if int(addresses.max()) + size > group.shared_bytes:
        raise EmulationError("a matrix reaches beyond the shared memory of its block")
    return addresses + (block * (len(group.shared_memory.bytes) // group.num_blocks))[:, None, None]


def _sync_products(inst: PtxInstruction) -> Executor:
    """PTX ISA, "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group": products read memory until a wait for them."""
    if inst.tokens[1] == "fence":
        return lambda group, mask: None
    num_pending = immediate(inst.operands[0]) if inst.operands else 0

    def execute(group: ThreadGroup, mask: Mask) -> None:
        active = np.zeros(len(group.product_groups), bool)
        active[active_units(mask, WARPGROUP_SIZE)] = True
        if inst.tokens[1] == "commit_group":
            group.product_groups = group.product_groups + active
            return
        still_pending = []
        for product in group.pending_products:
            warpgroups, addresses, size, commit_group = product
            done = active[warpgroups] & (commit_group < group.product_groups[warpgroups] - num_pending)
            if done.any():  # count this as the time of their last read
                _load_matrices(group, addresses[done], size, warpgroups[done])
            if not done.all():
                still_pending.append(PendingProduct(warpgroups[~done], addresses[~done], size, commit_group[~done]))
        group.pending_products = still_pending

    return execute


def _load_matrices(group: ThreadGroup, addresses: Any, size: int, warpgroups: Any) -> Any:
    """Return the unsigned integers at `[n, rows, columns]` addresses, which the first warp of n warpgroups reads."""
    owner = group.owner("shared").reshape(-1, WARPGROUP_SIZE)[warpgroups, :1, None]
    return group.shared_memory.load(addresses, size, owner=np.broadcast_to(owner, addresses.shape))[0]


@handles("wgmma")
def _wgmma(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions: wgmma.mma_async"."""
    if inst.tokens[1] in ("fence", "commit_group", "wait_group"):
        return _sync_products(inst)
    shape = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", inst.tokens[4])
    accumulator, kind, kind_b = inst.tokens[5:]
    target, a, b, scale_d, *flags = inst.operands
    transposes = [flag == Imm(1) for flag in flags[2:]]
    supported = (inst.tokens[1], accumulator, kind_b, flags[:2]) == ("mma_async", "f32", kind, [Imm(1), Imm(1)])
    if not supported or shape is None or kind not in ("bf16", "f16", "tf32"):
        raise unsupported(inst)
    m, n, k = map(int, shape.groups())
    size = 4 if kind == "tf32" else 2

    def read_matrix(group: ThreadGroup, operand: Operand, rows: int, transposed: bool, active: Any) -> Any:
        descriptors = group.read_all(operand, np.uint64).reshape(-1, WARPGROUP_SIZE)[active]
        if (descriptors != descriptors[:, :1]).any():
            raise EmulationError("the threads of a product name different matrices")
        descriptor, block = descriptors[:, 0].view(np.int64), group.block.reshape(-1, WARPGROUP_SIZE)[active, 0]
        swizzle = SWIZZLE_BYTES[descriptor >> 62 & 3]
        index = matrix_index(group, block, descriptor, swizzle, (rows, k, size), transposed)
        warpgroups = np.arange(group.num_threads // WARPGROUP_SIZE)[active]
        words = _load_matrices(group, index, size, warpgroups)
        group.pending_products.append(PendingProduct(warpgroups, index, size, group.product_groups[warpgroups]))
        return unpack_values(words.astype(np.uint32), kind)[..., 0]

    def execute(group: ThreadGroup, mask: Mask) -> None:
        active = active_units(mask, WARPGROUP_SIZE)
        matrix_b = read_matrix(group, b, n, transposes[-1] if transposes else False, active)
        if isinstance(a, Vector):
            words = [word[active].reshape(-1, WARP_SIZE) for word in _read_registers(group, a, WARPGROUP_SIZE)]
            matrix_a = _matrix(words, kind, 2).reshape(-1, m, k)
        else:
            matrix_a = read_matrix(group, a, m, transposes[0] if transposes else False, active)
        product = multiply(matrix_a, matrix_b, kind).reshape(-1, 4, 16, n)
        accumulates = group.read_all(scale_d, np.bool_)
        for number, register in enumerate(registers_of(target)):
            column = 8 * (number // 4) + 2 * THREAD_IN_GROUP + number % 2
            values = np.zeros((group.num_threads // WARPGROUP_SIZE, 4, WARP_SIZE), np.float32)
            values[active] = product[:, :, GROUP_ID + 8 * (number // 2 % 2), column]
            assert isinstance(register, Reg)
            result, before = values.reshape(-1), group.registers.get(register.name)
            if before is not None:
                result = np.where(accumulates, result + group.broadcast(before).view(np.float32), result)
            group.write(register, result, mask)

    return execute
