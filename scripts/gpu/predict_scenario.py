"""What changes a group of kernels after commit 833b245: one table, an entry a group, easy to correct.

An entry says how the time is predicted:

* `Candidate`: constants that were tried on the card. The measured time changes by the ratio of two trials.
* `Modelled`: `predict_model`, from bytes or turns, or measured plus what it says of more bytes.
* `Assumed`: a time that nothing measured supports; the note gives the reason.
* `Gone`: no such kernel any more; the note says who does its work.

Groups without an entry take the time that was measured. Counts are those of the compiled programs
(`docs/benchmarks/kernel_counts.json`); a group that is `Gone` counts as none whatever they say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scripts.gpu import predict_model as model
from scripts.gpu.kernel_counts import DRAFT
from scripts.gpu.predict_measured import COMMIT, trial

STATE_BYTES = 32 * 128 * 128 * 4  # of the recurrent state of a DeltaNet layer, float32
Q_HEADS, HEAD_DIM = 16, 256


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


Change = Candidate | Modelled | Assumed | Gone


def pieces_of(context: int) -> int:
    """Return the pieces of attention over a context: of 64 positions up to 4,096, of 256 up to 32,768, then of 512."""
    count, begin = 0, 0
    for end, size in ((4096, 64), (32768, 256), (1 << 30, 512)):
        count += -(-min(max(context - begin, 0), end - begin) // size)
        begin = end
    return count


def attention_few(measured: float, rows: int, context: int) -> float:
    """Return a time by the trial with the nearest piece; at short contexts one row is the model of a chain."""
    base = f"attention M{rows} piece512 slots32"
    if context >= 131_072:
        return measured
    if context <= 4096 and rows == 1:
        return measured + model.chains().at(2) - trial(base, "attention_few", 1024)
    piece = f"attention M{rows} piece256 slots{64 if rows == 1 else 32}"
    return measured + trial(piece, "attention_few", context) - trial(base, "attention_few", context)


def attention_join(measured: float, rows: int, context: int) -> float:
    """Return a time by the bytes of the partial sums, read by as many programs as fill the card."""
    return model.bytes_us(pieces_of(context) * rows * Q_HEADS * (HEAD_DIM + 2) * 4)


def window(measured: float, rows: int, context: int) -> float:
    """Return a time for a window that loads what it needs at once and writes the state."""
    ratio = trial(f"delta M{rows} columns64", "delta_window") / trial(f"delta M{rows} columns32", "delta_window")
    return measured * ratio + model.more_bytes_us(STATE_BYTES)


_ATTENTION = Modelled(
    attention_few, "pieces of 64, 256, 512 positions by their place; trials of 256, model below 4,096"
)
_JOIN = Modelled(attention_join, "parallel over heads, channels and pieces: bytes of the partial sums")

ROUND: dict[str, Change] = {
    "DeltaNet, in": Candidate(
        "matmul_codes4_plain",
        "in M5 programs128 stages3",
        "in M5 programs512 stages2",
        "512 programs, 2 stages (tried with 5 rows)",
    ),
    "out, o": Candidate(
        "matmul_codes4",
        "out M5 programs128 stages3",
        "out M5 programs512 stages2",
        "512 programs, 2 stages (tried with 5 rows)",
    ),
    "q, k, v": Candidate(
        "matmul_codes4",
        "qkv M5 programs128 stages3",
        "qkv M5 programs512 stages2",
        "512 programs, 2 stages (tried with 5 rows)",
    ),
    "router and shared gate, up": Candidate(
        "matmul_plain_codes4",
        "router M5 programs128 stages3",
        "router M5 programs512 stages2",
        "512 programs, 2 stages (tried with 5 rows)",
    ),
    "shared down": Candidate(
        "matmul_codes4",
        "down M5 programs128 stages3",
        "down M5 programs512 stages3",
        "512 programs (tried with 5 rows)",
    ),
    "experts, gate and up": Candidate(
        "gate_up_split",
        "gate_up M{rows} splits1 stages3",
        "gate_up M{rows} splits2 stages3",
        "the sum over D in two parts; SiLU is left to the down kernel, whose time is taken as measured",
    ),
    "attention": _ATTENTION,
    "attention, join": _JOIN,
    "DeltaNet window": Modelled(
        window, "64 columns a program (measured candidate), and the state is written: accepted rows are folded in"
    ),
    COMMIT: Gone("the next window folds accepted rows in as it reads the state"),
}
CHUNK: dict[str, Change] = {
    "DeltaNet, in": Candidate(
        "matmul_codes4_plain", "in M{rows} rows64 stages3", "in M{rows} rows128 stages3", "row tiles of 128"
    ),
    "out, o": Candidate(
        "matmul_codes4", "out M{rows} rows64 stages3", "out M{rows} rows128 stages3", "row tiles of 128"
    ),
    "q, k, v": Candidate(
        "matmul_codes4_plain",
        "in M{rows} rows64 stages3",
        "in M{rows} rows128 stages3",
        "row tiles of 128: the ratio of DeltaNet's input projection, not tried itself",
    ),
    "router and shared gate, up": Candidate(
        "matmul_codes4_plain",
        "in M{rows} rows64 stages3",
        "in M{rows} rows128 stages3",
        "row tiles of 128: the ratio of DeltaNet's input projection, not tried itself",
    ),
    "shared down": Candidate(
        "matmul_codes4",
        "out M{rows} rows64 stages3",
        "out M{rows} rows128 stages3",
        "row tiles of 128: the ratio of the output projection, not tried itself",
    ),
}


def change_of(group: str, decode: bool) -> Change | None:
    """Return what changes a group; kernels inside the loop over drafts change as those outside, for one row."""
    return (ROUND if decode else CHUNK).get(group.removeprefix(DRAFT))


def draft_head_us(rows: int) -> float:
    """Return the predicted microseconds of an LM head of so many IQ4_NL rows: `LLM(draft_vocab_size=rows)`."""
    return model.bytes_us(model.weight_bytes(rows, 0, 2048))
