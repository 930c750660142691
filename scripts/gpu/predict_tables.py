"""Write the tile tables in `kernels_pallas/tile_tables` of cards on which nothing was measured, by the time model.

    python -m scripts.gpu.predict_tables [--check]

Of each constant the candidates are those that were measured on the H100, as far as the shapes of the 35B-A3B tell them
apart. The model knows times only to some percent, so the value of the H100 stays where no candidate is predicted to be
at least `MARGIN` faster; and among equals, fewer programs leave fewer partial sums to the reader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from kernels_pallas import tile_tables
from kernels_pallas.tile_tables import Entry, TileTable, packaged_table
from scripts.gpu.cuda_target import CARDS, Card
from scripts.gpu.kernel_launches import Experts
from scripts.gpu.kernel_time_model import MODEL, kernel_time

FOLDER = Path(tile_tables.__file__).parent
MARGIN = 0.05
ROWS = (1, 5)
# Compiled for this card, products of 128 rows spill 88 to 160 bytes of a thread's registers; with 64 rows, none.
FEWER_ROWS = {"RTX 5090": 64}
LARGE_EXPERTS = Experts(hidden=3072, size=1024)  # of the 122B-A10B
C = TypeVar("C")


def choose(first: C, candidates: Iterable[C], time: Callable[[C], float]) -> C:
    """Return the fastest candidate, or the first if none is at least `MARGIN` faster."""
    best = min(candidates, key=time)
    return best if time(best) < (1 - MARGIN) * time(first) else first


def predicted_table(card: Card) -> TileTable:
    """Return the table of a card from that of the H100 and the model."""
    measured = packaged_table("H100")
    ops: dict[str, tuple[Entry, ...]] = {}
    for op, entries in measured.ops.items():
        ops[op] = tuple(predicted_entry(op, entry, card, is_last=entry is entries[-1]) for entry in entries)
    source = "predicted from measurements of an H100 by scripts/gpu/kernel_time_model.py; nothing ran on this device"
    return TileTable(card.name, source, ops)


def predicted_entry(op: str, entry: Entry, card: Card, is_last: bool) -> Entry:
    """Return an entry of the H100's table as it should be on a card."""
    if op == "gated_delta_rule":
        return entry  # the kernel that was measured is gone
    found: Any = entry.constants
    kernels: list[tuple[str, Any]]
    if op == "matmul":
        kernels = [("matmul", MODEL[name]) for name in (("in", "qkv") if is_last else ("out",))]
        values = [replace(found, programs=programs) for programs in (128, 256, 512, 1024)]
    else:
        kernels = [("experts_gate_up", LARGE_EXPERTS if is_last else Experts())]
        # The model does not count the partial sums, which every program of the down kernel reads.
        values = [replace(found, gate_up_parts=parts) for parts in ((1, 2) if is_last else (1, 2, 4))]

    def time(constants: Any) -> float:
        return sum(kernel_time(kind, shape, rows, card, constants) for kind, shape in kernels for rows in ROWS)

    chosen = choose(found, values, time)
    kept = f"as on the H100: no candidate is {MARGIN:.0%} faster" if chosen == found else "the fastest candidate"
    note = f"{kept}; predicted {time(chosen):.1f} us for 1 and 5 rows of all shapes compared"
    if op == "matmul" and card.name in FEWER_ROWS:
        chosen = replace(chosen, row_tile_many=FEWER_ROWS[card.name])
        note += f"; tiles of {chosen.row_tile_many} rows, because with more the compiler spills registers"
    if op == "experts":
        fast = (9, 0) <= card.capability < (12, 0)
        chosen = replace(chosen, block_tile=chosen.block_tile if fast else 64)
        blocks = (
            "as predicted for the H100" if fast else "because the card unpacks weights faster than it multiplies them"
        )
        note += f"; blocks of {chosen.block_tile} rows, {blocks}"
    return replace(entry, constants=chosen, basis="predicted", note=note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file would change")
    args = parser.parse_args()
    changed = []
    for card in CARDS.values():
        if card.name == "H100":
            continue
        path, text = FOLDER / f"{card.name.lower().replace(' ', '_')}.json", predicted_table(card).to_json()
        if not path.exists() or path.read_text() != text:
            changed.append(path.name)
            if not args.check:
                path.write_text(text)
    print(f"{'would change' if args.check else 'written'}: {', '.join(changed) or 'nothing'}")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
