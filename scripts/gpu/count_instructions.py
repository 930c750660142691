"""Count machine instructions of the decoding kernels, for cards that this machine lacks.

    .venv-cuda/bin/python -m pip install nvidia-cuda-nvdisasm
    .venv-cuda/bin/python -m scripts.gpu.count_instructions [--cards rtx3090 ...] [--forms iq4_nl ...] [--rows 5]
                                                            [--json FILE]

Compiles the products of a few rows as `check_cuda.py` does (in its environment: `make check-cuda`), assembles them and
counts the instructions of one iteration of the longest loop, in which a thread reads a known number of weights. A
multiprocessor issues four instructions a clock; it has units for half as many byte, logic and integer instructions
(`alu`). From this follows the share of the card's memory bandwidth at which instructions, not memory, limit the speed:
below 1 the bandwidth cannot be reached; above 1 nothing is promised. Nothing runs on a GPU.
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

from kernels_pallas.packed.formats import FORMATS, abstract_weight
from scripts.benchmarks.results import describe, write_json
from scripts.gpu.compiled_code import cuda_tool, longest_loop
from scripts.gpu.cuda_cases import FORMS, Case, KernelSizes, kernel_cases
from scripts.gpu.cuda_target import CARDS, Card, CompileTarget

WARP_SIZE, SCHEDULERS = 32, 4  # each scheduler of a multiprocessor issues one instruction of a warp a clock
ALU = frozenset(
    "PRMT LOP3 SHF IADD3 VIADD LEA ISETP FSETP IMNMX FMNMX SEL FSEL F2FP I2F F2F F2I SGXT PLOP3 IABS".split()
)
PACKED = [form for form in FORMS if FORMATS[form].layout != "plain"]
TILES = {"matmul": 1, "experts_gate_up": 2, "experts_down": 1}  # weight tiles per iteration, by prefix of the kernel
BLOCK_THREADS, TILE_ROWS, TILE_COLUMNS = 128, 64, 128


def weights_per_iteration(kernel: str) -> int:
    """Return the number of weights that a thread reads in one iteration of the loop."""
    [tiles] = [count for name, count in TILES.items() if kernel.startswith(name)]
    return tiles * TILE_ROWS * TILE_COLUMNS // BLOCK_THREADS


def bits_per_weight(form: str) -> float:
    """Return the stored bits per weight, scales and offsets included."""
    size = 4096
    leaves = jax.tree.leaves(abstract_weight((size, size), form))
    return 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / size**2


def loop_instructions(sass: str) -> Counter[str]:
    """Count the instructions of the longest loop of a function by name."""
    loop = longest_loop(sass, r"(?m)^\s*(\.L_\w+):", r"BRA\S*\s.*`\((\.L_\w+)\)")
    code = (re.sub(r"/\*\w+\*/", "", line) for line in loop.splitlines())
    names = (re.match(r"\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)[\s.;]", line) for line in code)
    return Counter(name[1] for name in names if name)


def disassemble(ptx: Path) -> dict[str, str]:
    """Return the machine code of each function of a PTX file, as text."""
    tools = {}
    for name, package in (("ptxas", "nvidia-cuda-nvcc-cu12"), ("nvdisasm", "nvidia-cuda-nvdisasm")):
        tools[name] = cuda_tool(name)
        if tools[name] is None:
            raise SystemExit(f"count_instructions: {name} is missing in {sys.prefix}: pip install {package}")
    arch = re.search(r"\.target (\w+)", ptx.read_text())
    assert arch
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        assemble = [str(tools["ptxas"]), "-arch", arch[1], "-o", str(cubin), str(ptx)]
        subprocess.run(assemble, check=True, stderr=subprocess.DEVNULL)
        command = [str(tools["nvdisasm"]), "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\.section\s+\.text\.", text)[1:]
    return {section.split(",")[0].split()[0]: section for section in sections}


def count(card: Card, case: Case, form: str, dump: Path, target: CompileTarget) -> list[dict[str, Any]]:
    """Compile a case, and return a row of figures for each of its kernels."""
    fn, args = case()
    target.compile(fn, *args)
    rows: list[dict[str, Any]] = []
    for file in sorted(dump.glob("*.ptx")):
        if not re.search(rf"\.entry ({'|'.join(TILES)})", file.read_text()):
            continue
        for name, sass in disassemble(file).items():
            instructions, weights = loop_instructions(sass), weights_per_iteration(name)
            issued = sum(instructions.values())
            alu = sum(number for opcode, number in instructions.items() if opcode in ALU)
            if issued < weights / 2:  # the assembler unrolled a short loop; only a loop behind it is left
                rows.append({"kernel": name, "form": form, "a_weight": None})
                continue
            clocks = max(issued, 2 * alu) / weights  # of a scheduler, for one weight of each lane
            weights_per_second = card.cores * SCHEDULERS * WARP_SIZE * card.ghz * 1e9 / clocks
            share = weights_per_second * bits_per_weight(form) / 8 / (card.gb_per_second * 1e9)
            row = {"kernel": name, "form": form, "weights": weights, "instructions": issued, "alu": alu}
            rows.append(row | {"a_weight": round(issued / weights, 2), "share_of_bandwidth": round(share, 2)})
    for file in dump.iterdir():
        file.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=CARDS)
    parser.add_argument("--forms", nargs="+", default=PACKED, choices=PACKED)
    parser.add_argument("--rows", type=int, default=5, help="rows of a call (default: a window of four drafts)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        cases = kernel_cases(KernelSizes(rows=(("decode", args.rows),)))
        found: dict[str, list[dict[str, Any]]] = {}
        print("| card | kernel | format | instructions a weight | of these alu | share of the bandwidth |")
        print("|---" * 6 + "|")
        for name in args.cards:
            card = CARDS[name]
            target = CompileTarget(card, Path(dump))
            for form in args.forms:
                for op in ("linear", "experts"):
                    for row in count(card, cases[f"{op} {form} decode"], form, Path(dump), target):
                        found.setdefault(name, []).append(row)
                        figures = "unrolled | |"
                        if row["a_weight"]:
                            alu_per_weight = row["alu"] / row["weights"]
                            figures = f"{row['a_weight']} | {alu_per_weight:.2f} | {row['share_of_bandwidth']}"
                        print(f"| {name} | {row['kernel']} | {form} | {figures} |", flush=True)
    if args.json:
        what = {"what": "machine instructions of the decoding kernels, for cards that are not here", "rows": args.rows}
        write_json(str(args.json), {**what, **describe("none: compiled only"), "cards": found})


if __name__ == "__main__":
    main()
