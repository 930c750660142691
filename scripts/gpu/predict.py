"""Predict the time of a decoding round or of a prompt chunk of the 35B-A3B (IQ4_NL, one sequence) on an H100.

    python -m scripts.gpu.predict --card h100 --context 1024 --draft 0 [--draft-vocab-size 32768]
    python -m scripts.gpu.predict --card h100 --context 8192 --prompt 2048
    python -m scripts.gpu.predict --card h100 --all --json docs/benchmarks/predicted.json

A row of the table is a group of kernels: how many a round and microseconds of one, as measured at commit 833b245
(`predict_measured`) and as predicted (`predict_scenario`, with the counts of `kernel_counts`), and how the prediction
comes about. Below the sums stand what was measured beside kernels (gaps and the host, taken as they were), the goal,
and the errors of the model on measured points. Nothing here has run on a card after the changes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from scripts.benchmarks.results import describe, write_json
from scripts.gpu import predict_model
from scripts.gpu.kernel_counts import DRAFT, OTHER
from scripts.gpu.predict_measured import (
    FILES,
    Times,
    chunk_before,
    least_ms,
    read,
    round_before,
    whole_chunk_ms,
    whole_round_ms,
)
from scripts.gpu.predict_scenario import CHUNK, ROUND, Added, Change, Gone, change_of, draft_head_us

COUNTS = FILES / "kernel_counts.json"
GOALS_MS = {(0, 1024): 1.9, (4, 1024): 3.2, (0, 131_072): 3.2, (4, 131_072): 4.8}
GOALS_TOKENS = {8192: 30_000, 131_072: 15_000}  # a second, of prompts
ROUNDS = tuple((draft, context) for context in (1024, 32_768, 131_072) for draft in (0, 4))
CHUNKS = tuple((rows, context) for context in (8192, 131_072) for rows in (512, 2048))
START_US = 2.0  # of a kernel that nothing is known of


@dataclass(frozen=True)
class Row:
    """One group of kernels."""

    group: str
    count_before: float
    us_before: float
    count: float
    us: float
    how: str
    note: str

    @property
    def before_ms(self) -> float:
        return self.count_before * self.us_before / 1e3

    @property
    def after_ms(self) -> float:
        return self.count * self.us / 1e3


@dataclass(frozen=True)
class Prediction:
    """The table of a round or a chunk.

    Attributes:
        title: what it is.
        rows: the groups, the longest first.
        measured_ms: of the whole round or chunk at 833b245, None where it was not measured.
        beside_ms: of it beside kernels; where the whole was not measured, that of the nearest that was.
        goal_ms: None if there is none.
        least_ms: of a round, by its bytes at the copy bandwidth; None if not known.
    """

    title: str
    rows: list[Row]
    measured_ms: float | None
    beside_ms: float
    goal_ms: float | None
    least_ms: float | None = None

    @property
    def before_ms(self) -> float:
        return sum(row.before_ms for row in self.rows)

    @property
    def after_ms(self) -> float:
        return sum(row.after_ms for row in self.rows)


def compiled_counts(program: str) -> dict[str, float]:
    """Return the launches of each group in a compiled program.

    Raises:
        SystemExit: they have not been counted; names the command.
    """
    programs = json.loads(COUNTS.read_text())["programs"] if COUNTS.exists() else {}
    if program not in programs:
        raise SystemExit(
            f"{COUNTS}: has no counts of {program!r}; run python -m scripts.gpu.kernel_counts --json {COUNTS} "
            "where jax has its CUDA compiler plugin"
        )
    return programs[program]["groups"]


def added(change: Change) -> int:
    """Return the count of a kernel that the compiled programs lack."""
    return change.count if isinstance(change, Added) else 0


def predict_rows(
    before: dict[str, Times], counts: dict[str, float], rows: int, context: int, decode: bool
) -> list[Row]:
    """Return the groups of both tables."""
    table = []
    new = [group for group, change in (ROUND if decode else CHUNK).items() if isinstance(change, Added)]
    for group in dict.fromkeys((*before, *counts, *new)):
        measured, change = before.get(group), change_of(group, decode)
        count = counts.get(group, 0.0)
        if measured is None:  # a kernel that 833b245 did not have
            us, note = START_US, "new; the start of a kernel and little more"
            if change is not None:
                us, note, count = change.us(0.0, rows, context), f"new; {change.note}", count or added(change)
            table.append(Row(group, 0, 0, count, us, "assumed", note))
            continue
        if change is None:
            us, how, note = measured.us, "measured" if count else "gone", "as it was" if count else "not in the program"
        else:
            us, how, note = (
                change.us(measured.us, 1 if group.startswith(DRAFT) else rows, context),
                change.how,
                change.note,
            )
        if isinstance(change, Gone):
            count = 0.0
        table.append(Row(group, measured.count, measured.us, count, us, how, note))
    there = (row for row in table if row.count or row.count_before)
    return sorted(there, key=lambda row: -max(row.after_ms, row.before_ms))


def predict_round(draft: int, context: int, draft_vocab_size: int | None = None) -> Prediction:
    """Predict a decoding round."""
    before = round_before(draft, context)
    rows = predict_rows(before, compiled_counts(f"decode {draft}"), draft + 1, context, decode=True)
    if draft_vocab_size is not None:
        note = f"draft_vocab_size={draft_vocab_size}: a product of so many outputs"
        rows = [
            Row(r.group, r.count_before, r.us_before, r.count, draft_head_us(draft_vocab_size), "model", note)
            if r.group == DRAFT + "LM head"
            else r
            for r in rows
        ]
    measured = whole_round_ms(draft, context)
    known = measured if measured is not None else whole_round_ms(draft, 1024)
    assert known is not None
    at = before if measured is not None else round_before(draft, 1024)
    beside = known - sum(t.total_us for t in at.values()) / 1e3
    vocab = f", drafts from {draft_vocab_size:,} tokens" if draft_vocab_size else ""
    title = f"a round with {draft} drafts at {context:,} tokens{vocab}"
    return Prediction(title, rows, measured, beside, GOALS_MS.get((draft, context)), least_ms(draft, context))


def predict_chunk(rows: int, context: int) -> Prediction:
    """Predict a prompt chunk that ends at a context, with MTP."""
    before = chunk_before(rows, context)
    table = predict_rows(before, compiled_counts(f"prefill {rows}"), rows, context, decode=False)
    known = whole_chunk_ms(512, 512)
    assert known is not None
    beside = known - sum(t.total_us for t in chunk_before(512, 512).values()) / 1e3
    goal = GOALS_TOKENS.get(context)
    title = f"a prompt chunk of {rows:,} rows that ends at {context:,}"
    return Prediction(title, table, whole_chunk_ms(rows, context), beside, goal and 1e3 * rows / goal)


def format_table(prediction: Prediction) -> str:
    """Return the table as Markdown, its sums, and the goal."""
    lines = [
        f"## {prediction.title[0].upper()}{prediction.title[1:]}",
        "",
        "| kernels | count, 833b245 | us, measured | ms | count after | us, predicted | ms | how |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in prediction.rows:
        predicted = f"{r.count:.0f} | {r.us:.1f} | {r.after_ms:.3f}" if r.count else "0 | | 0"
        head = f"| {r.group} | {r.count_before:.0f} | {r.us_before:.1f} | {r.before_ms:.3f}"
        lines.append(f"{head} | {predicted} | {r.how}: {r.note} |")
    kernels = [round(sum(getattr(r, name) for r in prediction.rows)) for name in ("count_before", "count")]
    before, after, beside = prediction.before_ms, prediction.after_ms, prediction.beside_ms
    lines.append(f"| **sum** | {kernels[0]} | | **{before:.2f}** | {kernels[1]} | | **{after:.2f}** | |")
    whole = f"measured {prediction.measured_ms:.2f} ms" if prediction.measured_ms else "not measured as a whole"
    lines += ["", f"Before: {before:.2f} ms of kernels, {whole}."]
    lines.append(f"After: {after:.2f} ms of kernels, {after + beside:.2f} with {beside:.2f} beside them as it was.")
    if prediction.least_ms:
        lines.append(f"Its bytes take {prediction.least_ms:.2f} ms at the copy bandwidth.")
    by_how: dict[str, float] = {}
    for r in prediction.rows:
        by_how[r.how] = by_how.get(r.how, 0.0) + r.after_ms
    shares = ", ".join(f"{how} {ms / after:.0%}" for how, ms in sorted(by_how.items(), key=lambda x: -x[1]) if ms)
    lines.append(f"Of the predicted time: {shares}.")
    if prediction.goal_ms:
        goal = prediction.goal_ms
        verdict = "met" if after + beside <= goal else "met by the kernels alone" if after <= goal else "MISSED"
        lines.append(f"Goal {goal:.1f} ms: {verdict} ({after - goal:+.2f} ms of kernels).")
    return "\n".join(lines)


def format_model() -> str:
    """Return the model of a kernel's time and its errors."""
    lines = ["## The model, and its errors on what was measured", ""]
    models = {
        "products of few rows": (predict_model.products(), ("us of its bytes",)),
        "attention at 1,024": (predict_model.chains(), ("turns of a piece", "programs")),
    }
    for name, (line, names) in models.items():
        slopes = (f"{slope:.4g} x {x}" for slope, x in zip(line.slopes, names, strict=True))
        lines.append(f"{name}: {' + '.join((f'{line.start:.2f} us', *slopes))}")
        for case, error in line.errors.items():
            lines.append(f"* {case}: {error:+.1%}, left out of the fit {line.errors_left_out[case]:+.1%}")
    lines.append(f"Entries of the scenario: {len(ROUND)} for rounds; {OTHER} stay as they were measured on average.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--card", choices=["h100"], default="h100", help="the card that has measured points")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens in the cache")
    parser.add_argument("--draft", type=int, choices=[0, 4], default=0, help="drafts of a round, as measured")
    parser.add_argument("--draft-vocab-size", type=int, metavar="N", help="drafts from N tokens (a round with drafts)")
    parser.add_argument("--prompt", type=int, choices=[512, 2048], metavar="ROWS", help="a chunk in place of a round")
    parser.add_argument(
        "--all", action="store_true", help="all rounds and chunks that have been measured or have goals"
    )
    parser.add_argument("--json", help="write the tables to this file")
    args = parser.parse_args()
    if args.context < 1:
        parser.error(f"--context is {args.context}, expected at least 1")
    if args.all:
        found = [predict_round(*shape) for shape in ROUNDS]
        found += [predict_round(4, context, 32_768) for context in (1024, 131_072)]
        found += [predict_chunk(*shape) for shape in CHUNKS]
    elif args.prompt:
        found = [predict_chunk(args.prompt, args.context)]
    else:
        found = [predict_round(args.draft, args.context, args.draft_vocab_size)]
    print("\n\n".join([*(format_table(prediction) for prediction in found), format_model()]))
    if args.json:
        about: dict[str, Any] = {"what": "predicted time of rounds and prompt chunks on an H100, kernel by kernel"}
        about |= {"measured": {key: read("h100_model.json")[key] for key in ("device", "date", "commit")}}
        tables = [
            asdict(p) | {"before_ms": p.before_ms, "after_ms": p.after_ms, "whole_ms": p.after_ms + p.beside_ms}
            for p in found
        ]
        write_json(args.json, about | describe("none: predicted") | {"tables": tables})


if __name__ == "__main__":
    main()
