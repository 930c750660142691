"""What changes a group of kernels after commit 833b245: one table, an entry a group, easy to correct.

An entry says how the time is predicted:

* `Candidate`: constants that were tried on the card. The measured time changes by the ratio of two trials.
* `Modelled`: `predict_model`, from bytes or turns, or measured plus what it says of more bytes.
* `Assumed`: a time that nothing measured supports; the note gives the reason.
* `Added`: a kernel that there was not.
* `Gone`: no such kernel any more; the note says who does its work.

Groups without an entry take the time that was measured. Counts are those of the compiled programs
(`docs/benchmarks/kernel_counts.json`); a group that is `Gone` counts as none whatever they say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scripts.gpu import predict_model as model
from scripts.gpu.kernel_counts import DRAFT
from scripts.gpu.predict_measured import COMMIT, bandwidth, trace, trial

STATE_BYTES = 32 * 128 * 128 * 4  # of the recurrent state of a DeltaNet layer, float32
SHARED_DOWN_BYTES = model.weight_bytes(2048, 0, 512)  # of the shared expert's down projection
Q_HEADS, HEAD_DIM = 16, 256
HEADS = 32  # value heads of a DeltaNet layer, and programs of its window
BYTES_PER_CYCLE, CYCLES_PER_US = 64, 1755  # between a multiprocessor and the L2 cache; assumed, an H100's clock
LOGIT_BYTES = 16 * 256 * 4  # of the router's partial sums, a row


@dataclass(frozen=True)
class Candidate:
    """Trials of a kernel, "{rows}" being 1 or 5 rows of a round, or the rows of a chunk.

    Attributes:
        kernel: its name in the trial.
        before, after: the cases; by rows where they differ.
        note: what changes.
        at_contexts: the trial has a time for each context.
    """

    kernel: str
    before: str
    after: str | dict[int, str]
    note: str
    at_contexts: bool = False
    how: str = field(default="measured candidate", init=False)

    def us(self, measured: float, rows: int, context: int) -> float:
        after = self.after if isinstance(self.after, str) else self.after[rows]
        at = context if self.at_contexts else None
        before_us, after_us = (trial(case.format(rows=rows), self.kernel, at) for case in (self.before, after))
        return measured + after_us - before_us if self.at_contexts else measured * after_us / before_us


@dataclass(frozen=True)
class Modelled:
    """A time by the model: a function of the measured time, rows and context."""

    predict: Callable[[float, int, int], float]
    note: str
    how: str = field(default="model", init=False)

    def us(self, measured: float, rows: int, context: int) -> float:
        return self.predict(measured, rows, context)


@dataclass(frozen=True)
class Assumed:
    """A time without a measurement."""

    predict: Callable[[float, int, int], float]
    note: str
    how: str = field(default="assumed", init=False)

    def us(self, measured: float, rows: int, context: int) -> float:
        return self.predict(measured, rows, context)


@dataclass(frozen=True)
class Gone:
    """No kernel any more."""

    note: str
    how: str = field(default="gone", init=False)

    def us(self, measured: float, rows: int, context: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Added:
    """A kernel that 833b245 did not have: how many a round or chunk, for as long as the compiled programs lack it."""

    count: int
    predict: Callable[[int], float]  # of rows
    note: str
    how: str = field(default="assumed", init=False)

    def us(self, measured: float, rows: int, context: int) -> float:
        return self.predict(rows)


Change = Candidate | Modelled | Assumed | Gone | Added

PIECES = ((2048, 32), (8192, 128), (32_768, 256), (1 << 30, 512))  # of attention: end in the cache, positions
PIECE_PROGRAMS = 1024  # of attention over pieces, at most
PROMPT_ATTENTION = 300e6  # operations a microsecond of attention in prompts: half of the measured rate of a matmul


def pieces_of(context: int) -> int:
    """Return the pieces of attention over a context."""
    count, begin = 0, 0
    for end, size in PIECES:
        count += -(-min(max(context - begin, 0), end - begin) // size)
        begin = end
    return count


def attention_few(measured: float, rows: int, context: int) -> float:
    """Return the time of attention over pieces, by the model up to 2,048 positions, by trials from 32,768 on.

    Five rows read the cache twice, 32 pairs of row and query head at a time, not three times, 16 at a time: two thirds
    of the time, but not less than one row takes.
    """
    chain = model.chains().at(1, min(PIECE_PROGRAMS, 2 * pieces_of(131_136) * -(-rows * Q_HEADS // 2 // 32)))
    one = "attention M1 piece256 slots64" if context <= 65_536 else "attention M1 piece512 slots32"
    long = trial(one, "attention_few", max(context, 32_768))
    if rows > 1:
        long = max(long, trial("attention M5 piece512 slots32", "attention_few", max(context, 32_768)) * 2 / 3)
    if context >= 32_768:
        return long
    return chain + (long - chain) * max(context - 2048, 0) / (32_768 - 2048)


def attention_join(measured: float, rows: int, context: int) -> float:
    """Return a time by the bytes of the partial sums, read by as many programs as fill the card."""
    return model.bytes_us(pieces_of(context) * rows * Q_HEADS * (HEAD_DIM + 2) * 4)


def attention_many(measured: float, rows: int, context: int) -> float:
    """Return the time of attention of a chunk that ends at the context, at an assumed rate."""
    return 4.0 * rows * (context - rows / 2) * Q_HEADS * HEAD_DIM / PROMPT_ATTENTION


def window(measured: float, rows: int, context: int) -> float:
    """Return the time of a window's one kernel: convolution, norms and gates, the recurrence, the gated norm.

    The recurrence reads and writes the state and has all of its inputs: half a microsecond a row, and for each row
    accepted before, 3.84 with four drafts. One row took 6.5 us and each more 2.8 (trials of 16 columns) while each
    loaded and normalised its own inputs. The inputs take what the attention's cache update, which does alike, takes
    beyond the shortest kernel; the norm, whose operands are at hand, half a microsecond. 32 programs, each on a
    multiprocessor of its own, read and write the state at 64 bytes a cycle, not at the share of all.
    """
    accepted = 3.84 if rows == 5 else 1.0
    inputs = trace("decode 0")["attention, cache update"].us - shortest()
    few_programs = 2 * STATE_BYTES / HEADS / BYTES_PER_CYCLE / CYCLES_PER_US - 2 * STATE_BYTES / bandwidth()
    return model.bytes_us(2 * STATE_BYTES) + 0.5 * (rows + accepted) + inputs + 0.5 + max(few_programs, 0.0)


def shortest() -> float:
    """Return the time of the shortest kernel that was measured, a gated norm: little more than a kernel's start."""
    return trace("decode 0")["gated norm"].us


def gate_up(measured: float, rows: int, context: int) -> float:
    """Return the time of gate and up in two parts, by trials, and of the choice of experts before it in each program.

    The choice takes what it took by itself beyond the shortest kernel. 128 programs a row read its logits, 16 partial
    sums of 256, from the L2 cache: at twice the copy bandwidth.
    """
    split = _GATE_UP.us(measured, rows, context)
    choice = trace(f"decode {rows - 1}")["choice of experts"].us - shortest()
    return split + choice + rows * 8 * 16 * LOGIT_BYTES / (2 * bandwidth())


def row_tiles(weights: tuple[tuple[int, int, int], ...]) -> Callable[[float, int, int], float]:
    """Return a prediction for row tiles of 128 by `kernel_time_model`. `weights`: outputs, inputs, bits of each."""
    return lambda measured, rows, context: measured * model.row_tile_ratio(weights, rows)


_FEW = "512 programs, 2 stages (tried with 5 rows)"
_SMALL = "256 programs, 2 stages, not tried together: as 512 programs, 2 stages (tried with 5 rows)"
_TILES = "row tiles of 128, not tried itself: the model of kernel times"

_GATE_UP = Candidate(
    "gate_up_split",
    "gate_up M{rows} splits1 stages3",
    "gate_up M{rows} splits2 stages3",
    "the sum over D in two parts; SiLU is left to the down kernel",
)

ROUND: dict[str, Change] = {
    "DeltaNet, in": Candidate("matmul_codes4_plain", "in M5 programs128 stages3", "in M5 programs512 stages2", _FEW),
    "out, o": Candidate("matmul_codes4", "out M5 programs128 stages3", "out M5 programs512 stages2", _SMALL),
    "q, k, v": Candidate("matmul_codes4", "qkv M5 programs128 stages3", "qkv M5 programs512 stages2", _FEW),
    "router and shared gate, up": Candidate(
        "matmul_plain_codes4", "router M5 programs128 stages3", "router M5 programs512 stages2", _SMALL
    ),
    "shared down": Gone("the down kernel of the experts multiplies the shared expert, too"),
    "experts, gate and up": Assumed(
        gate_up,
        "the sum over D in two parts (measured candidate); each program chooses its expert first, for as long as the "
        "choice took beyond the shortest kernel, with logits from the L2 cache",
    ),
    "choice of experts": Gone("the programs of gate and up choose their experts"),
    "experts, down": Assumed(
        lambda measured, rows, context: measured + SHARED_DOWN_BYTES / bandwidth(),
        "as measured, and the bytes of the shared expert; adding the parts and SiLU are taken to cost nothing",
    ),
    "attention": Modelled(
        attention_few,
        "pieces of 32 positions up to 2,048, longer ones behind: a chain of one turn, trials at 32k and 131k",
    ),
    "attention, join": Modelled(attention_join, "parallel over heads, channels, pieces: bytes of the partial sums"),
    "DeltaNet window": Assumed(
        window,
        "one kernel: the state is read and written, 0.5 us a row and accepted row; inputs of all rows as the cache "
        "update of attention without its start, 0.5 us for the gated norm",
    ),
    "gated norm": Gone("the kernel of the window ends with it"),
    COMMIT: Gone("the next window folds accepted rows in as it reads the state"),
}
CHUNK: dict[str, Change] = {
    "DeltaNet, in": Candidate(
        "matmul_codes4_plain", "in M{rows} rows64 stages3", "in M{rows} rows128 stages3", "row tiles of 128"
    ),
    "out, o": Candidate(
        "matmul_codes4", "out M{rows} rows64 stages3", "out M{rows} rows128 stages3", "row tiles of 128"
    ),
    "q, k, v": Modelled(row_tiles(((8192, 2048, 4), (512, 2048, 4), (512, 2048, 4))), _TILES),
    "router and shared gate, up": Modelled(
        row_tiles(((256, 2048, 16), (1, 2048, 16), (512, 2048, 4), (512, 2048, 4))), _TILES
    ),
    "shared down": Modelled(row_tiles(((2048, 512, 4),)), _TILES),
    "attention": Assumed(attention_many, "tiles of 128 pairs for wgmma, at half of the rate of a large matmul"),
    "DeltaNet inputs": Added(
        0, lambda rows: model.bytes_us(rows * 8192 * (2 + 4)), "bytes: projections in bfloat16, results in float32"
    ),
    "plan of the experts": Added(0, lambda rows: 8.0, "one kernel in place of a sort and a dozen small ones"),
}


def change_of(group: str, decode: bool) -> Change | None:
    """Return what changes a group; kernels inside the loop over drafts change as those outside, for one row."""
    return (ROUND if decode else CHUNK).get(group.removeprefix(DRAFT))


def draft_head_us(rows: int) -> float:
    """Return the predicted microseconds of an LM head of so many IQ4_NL rows: `LLM(draft_vocab_size=rows)`."""
    return model.product_us(rows, 2048, 1)
