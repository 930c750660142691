"""Machine instructions of the decoding kernels, for cards that are not there.

    .venv-cuda/bin/python -m pip install nvidia-cuda-nvdisasm
    .venv-cuda/bin/python -m scripts.gpu.count_instructions [--cards rtx3090 ...] [--forms iq4_nl ...] [--rows 5] [--json FILE]

Compiles the products of a few rows as `check_cuda.py` does (its environment: `make check-cuda`), assembles them and counts
the instructions of a turn of the longest loop, in which a thread takes a known number of weights. A multiprocessor
starts four a clock; bytes, logic and whole numbers (`alu`) have units for half of that. From this follows the
share of the card's bandwidth at which instructions, not memory, set the pace: below 1 the bandwidth cannot be reached; above,
nothing is promised. Nothing is run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from scripts.benchmarks.results import describe, write_json
from scripts.gpu.check_cuda import CARDS
from scripts.gpu.cuda_cases import FORMS, Case, KernelSizes, kernel_cases, packed
from scripts.gpu.cuda_target import CARDS as DESCRIBED
from scripts.gpu.cuda_target import Card, Target, cuda_tool, longest_loop

LANES, SCHEDULERS = 32, 4  # threads of a warp; of a multiprocessor, each starts an instruction of a warp a clock
ALU = frozenset(
    "PRMT LOP3 SHF IADD3 VIADD LEA ISETP FSETP IMNMX FMNMX SEL FSEL F2FP I2F F2F F2I SGXT PLOP3 IABS".split()
)
PACKED = [form for form, stored in FORMS.items() if stored.layout != "plain"]
TILES = {"matmul": 1, "experts_gate_up": 2, "experts_down": 1}  # of 64 rows that a block of the kernel takes in a turn
THREADS, ROWS, STEP = 128, 64, 128  # of a block: threads, rows of a tile, weights of a row that a turn takes


def weights_a_turn(kernel: str) -> int:
    """Weights that a thread takes in a turn of the loop."""
    [tiles] = [count for name, count in TILES.items() if kernel.startswith(name)]
    return tiles * ROWS * STEP // THREADS


def bits_a_weight(form: str) -> float:
    """As stored, scales and offsets included."""
    size = 4096
    return 8 * sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(packed((size, size), form))) / size**2


def instructions(sass: str) -> Counter[str]:
    """Those of the longest loop of a function, by name."""
    loop = longest_loop(sass, r"(?m)^\s*(\.L_\w+):", r"BRA\S*\s.*`\((\.L_\w+)\)")
    code = (re.sub(r"/\*\w+\*/", "", line) for line in loop.splitlines())
    names = (re.match(r"\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)[\s.;]", line) for line in code)
    return Counter(name[1] for name in names if name)


def disassembled(ptx: Path) -> dict[str, str]:
    """The machine code of the functions of a PTX file, as text."""
    tools = {}
    for name, package in (("ptxas", "nvidia-cuda-nvcc-cu12"), ("nvdisasm", "nvidia-cuda-nvdisasm")):
        tools[name] = cuda_tool(name)
        if tools[name] is None:
            raise SystemExit(f"count_instructions: {name} is missing in {sys.prefix}: pip install {package}")
    arch = re.search(r"\.target (\w+)", ptx.read_text())
    assert arch
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "a.cubin"
        subprocess.run(
            [str(tools["ptxas"]), "-arch", arch[1], "-o", str(cubin), str(ptx)], check=True, stderr=subprocess.DEVNULL
        )
        text = subprocess.run(
            [str(tools["nvdisasm"]), "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    return {part.split(",")[0].split()[0]: part for part in re.split(r"\.section\s+\.text\.", text)[1:]}


def count(card: Card, case: Case, form: str, dump: Path, target: Target) -> list[dict[str, Any]]:
    """A row for each kernel of a case."""
    fn, args = case()
    target.compile(fn, *args)
    rows = []
    for file in sorted(dump.glob("*.ptx")):
        if not re.search(rf"\.entry ({'|'.join(TILES)})", file.read_text()):
            continue
        for name, sass in disassembled(file).items():
            ops, weights = instructions(sass), weights_a_turn(name)
            issue, alu = sum(ops.values()), sum(n for op, n in ops.items() if op in ALU)
            if (
                issue < weights / 2
            ):  # a loop of few turns that the assembler wrote out: only what ends the kernel is left
                rows.append({"kernel": name, "form": form, "a_weight": None})
                continue
            pace = max(issue, 2 * alu) / weights  # clocks of a scheduler for a weight of each lane
            a_second = card.cores * SCHEDULERS * LANES * card.ghz * 1e9 / pace
            share = a_second * bits_a_weight(form) / 8 / (card.gb_per_second * 1e9)
            rows.append(
                {"kernel": name, "form": form, "weights": weights, "instructions": issue, "alu": alu,
                 "a_weight": round(issue / weights, 2), "share_of_bandwidth": round(share, 2)}
            )  # fmt: skip
    for file in dump.iterdir():
        file.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=CARDS)
    parser.add_argument("--forms", nargs="+", default=PACKED, choices=PACKED)
    parser.add_argument("--rows", type=int, default=5, help="rows of a call (default: a window of four drafts)")
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        cases = kernel_cases(KernelSizes(rows=(("decode", args.rows),)))
        found: dict[str, list[dict[str, Any]]] = {}
        print("| card | kernel | format | instructions a weight | of these alu | share of the bandwidth |")
        print("|---" * 6 + "|")
        for name in args.cards:
            card = DESCRIBED[name]
            target = Target(card, Path(dump))
            for form in args.forms:
                for op in ("linear", "experts"):
                    for row in count(card, cases[f"{op} {form} decode"], form, Path(dump), target):
                        found.setdefault(name, []).append(row)
                        figures = "written out | |"
                        if row["a_weight"]:
                            figures = (
                                f"{row['a_weight']} | {row['alu'] / row['weights']:.2f} | {row['share_of_bandwidth']}"
                            )
                        print(f"| {name} | {row['kernel']} | {form} | {figures} |", flush=True)
    if args.json:
        what = {"what": "machine instructions of the decoding kernels, for cards that are not here", "rows": args.rows}
        write_json(args.json, {**what, **describe("none: compiled only"), "cards": found})


if __name__ == "__main__":
    main()
