"""Compile every GPU kernel, and the whole prefill and decode programs, for seven NVIDIA cards without having one.

    make check-cuda                     (makes .venv-cuda with jax's CUDA compiler plugin, 1.1 GB, and runs this)
    python -m scripts.gpu.check_cuda [--cards rtx3090 ...] [--programs rtx3090 ...] [--json FILE]

A kernel that does not fit a card (shared memory, an instruction that the card lacks) fails here as it would fail there.
A crash of the compiler ends only the process of its card. Further checks of the kernels:

* On the first card every decoding kernel is compiled for one row, too. It must have the same floating-point
  instructions as for five rows: then the bits of a row do not depend on the number of rows in its window.
* The loops of matrix products may not wait for memory where they load.
* The loops of matrix products of few rows may not pass four-bit weights through shared memory.
* Decoding kernels may not spill registers, except those for rows of float32.

The programs are those of a 35B-A3B with IQ4_NL weights, and for the smallest card also with the mixture of types that
llama.cpp calls Q4_K_M, for one sequence, draft length 4 and a bfloat16 cache. Reported are bytes, kernels of a round,
and copies of weights, of which there must be none. Exit status 1 if anything fails. Nothing runs on a GPU: there are no
times and no results of kernels here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from scripts.benchmarks.results import describe, write_json
from scripts.gpu.compiled_code import CompiledProgram, float_instructions, kernel_resources, loop_overheads
from scripts.gpu.cuda_cases import (
    CHUNK,
    CONTEXT,
    DRAFT,
    MIXED,
    MODEL,
    PROGRAMS,
    Case,
    KernelSizes,
    kernel_cases,
    program_case,
    weight_shapes,
)
from scripts.gpu.cuda_target import CARDS, CompileTarget, memory_bytes
from scripts.gpu.fused_cases import fused_cases

KERNELS = (
    "matmul_",
    "experts_",
    "attention_",
    "gated_delta_rule_",
    "choose_",
    "sampling_",
    "norm_",
)  # prefixes of their names
PRODUCTS = ("matmul_", "experts_")  # prefixes of the products with packed weights
REGISTER_LAYOUTS = ("codes4", "codes5")  # decoding kernels pass these weights from register to tensor core
# Values a thread stores for other reasons: wgmma takes the rows from memory, and this kernel activates them itself.
STORED_ROWS = {"experts_down_": 16}
MEMORY_OPERAND_CARDS = ("b200",)  # their tensor cores take weights from memory only
LIMIT_GIB = {"rtx3090": 23.0}  # of the 24 GiB that the card has
Result = dict[str, Any]


# Worker: one process, one card


def work(card: str, cases: list[str]) -> None:
    """Compile cases one by one, and print a line of JSON before and after each."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        target, kernels = CompileTarget(CARDS[card], dump), kernel_cases() | float32_cases() | fused_cases()
        one_row: dict[str, Case] = {}
        if card in LIMIT_GIB:
            one_row = kernel_cases(KernelSizes(rows=(("decode", 1), ("prefill", 2048)))) | fused_cases(1)
        for name in cases:
            print(json.dumps({"start": name}), flush=True)
            start = time.perf_counter()
            try:
                if name in PROGRAMS:
                    result = program_report(target, name)
                else:
                    single = one_row.get(name) if name.endswith("decode") else None
                    result = kernel_report(target, kernels[name], dump, single)
            except Exception as error:  # a failed compilation is a result, whatever the error
                result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
            print(json.dumps({"case": name, "seconds": round(time.perf_counter() - start, 1), **result}), flush=True)


def float32_cases(size: KernelSizes | None = None, interpret: bool = False) -> dict[str, Case]:
    """Return the kernels for rows of float32, whose tiles have more bytes. The kernel for logits is float32 anyway."""
    cases = kernel_cases(size, ("iq4_nl", "mixed"), interpret, jnp.float32)
    return {f"{name} float32": case for name, case in cases.items() if not name.startswith("sampling")}


def kernel_report(target: CompileTarget, case: Case, dump: Path, one_row: Case | None) -> Result:
    """Compile a kernel. `one_row`: the same kernel for a single row, which must have the same instructions."""
    fn, args = case()
    compiled = target.compile(fn, *args)
    instructions, overheads = float_instructions(dump, KERNELS), loop_overheads(dump, PRODUCTS)
    kernels = kernel_resources(dump, KERNELS)
    if not kernels:
        raise RuntimeError("the compiled program holds no kernel of kernels_pallas")
    for name, counts in overheads.items():
        kernels[name] |= counts
    report: Result = {"kernels": kernels, "temp": memory_bytes(compiled)["temp"]}
    if one_row is not None:
        fn, args = one_row()
        target.compile(fn, *args)
        for_one_row = float_instructions(dump, KERNELS)
        kernel_resources(dump, KERNELS)  # empties the folder
        report["differ_for_one_row"] = [
            name
            for name in instructions | for_one_row
            if not instructions.get(name) or instructions[name] != for_one_row.get(name)
        ]
    return report


def program_report(target: CompileTarget, name: str) -> Result:
    """Compile a whole program."""
    fn, args, static, params = program_case(name)
    compiled = target.compile(fn, *args, **static)
    program = CompiledProgram(compiled.as_text() or "")
    experts, others = weight_shapes(params)
    kernels, loops = program.count_kernels()
    if name.startswith("decode"):  # the outer loop over rounds holds the other loops
        (kernels, _), *loops = loops
    return {
        **memory_bytes(compiled),
        "expert_copies": program.count_buffers(experts),
        "packed_copies": program.count_buffers(others),
        "kernels": kernels,
        "loops": loops,
    }


# Parent


def run_card(card: str, cases: list[str], module: str, python: str = sys.executable) -> Iterator[Result]:
    """Yield the results of all cases on a card, from worker processes `python -m MODULE --worker CARD CASES`.

    A process that dies costs the case that it was at; a new process continues with the next one.
    """
    left = list(cases)
    while left:
        command, current = [python, "-m", module, "--worker", card, *left], None
        with tempfile.TemporaryFile("w+") as errors:
            env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
            assert worker.stdout
            for line in worker.stdout:
                if not line.startswith("{"):
                    continue
                message = json.loads(line)
                current = message.get("start", current)
                if "case" in message:
                    left.remove(message["case"])
                    current = None
                    yield {"card": card, **message}
            status = worker.wait()
            errors.seek(0)
            last_line = (errors.read().strip().splitlines() or ["no message"])[-1][:300]
        if status and left:
            if current is None and len(left) == len(cases):
                raise SystemExit(f"{module}: cannot compile for {card} here: {last_line}")
            failed = current or left[0]
            left.remove(failed)
            yield {"card": card, "case": failed, "error": f"the compiler process ended with {status}: {last_line}"}


def problems(result: Result) -> list[str]:
    """Return everything in a result that is wrong."""
    if "error" in result:
        return [result["error"]]
    if result["case"] in PROGRAMS:
        found = [
            f"{kind.replace('_', ' ')}: {result[kind]}" for kind in ("expert_copies", "packed_copies") if result[kind]
        ]
        limit, total = LIMIT_GIB.get(result["card"]), (result["argument"] + result["temp"]) / 2**30
        return found + ([f"needs {total:.2f} GiB of {limit}"] if limit and total > limit else [])
    found = [f"{name}: other instructions for one row than for five" for name in result.get("differ_for_one_row", ())]
    for name, use in result["kernels"].items():
        if use.get("unprefetched"):
            found.append(f"{name}: {use['unprefetched']} loads of its loop are not prefetched")
        if result["case"].endswith("decode") and use.get("spilled"):
            found.append(f"{name}: {use['spilled']} bytes of spilled registers")
        by_registers = name.endswith(REGISTER_LAYOUTS) and result["card"] not in MEMORY_OPERAND_CARDS
        of_rows = max((count for prefix, count in STORED_ROWS.items() if name.startswith(prefix)), default=0)
        moves = max(0, use.get("stored", 0) - of_rows) + use.get("shuffled", 0)
        if result["case"].endswith("decode") and by_registers and moves:
            found.append(f"{name}: its loop passes weights on ({use['stored']} stores, {use['shuffled']} shuffles)")
    return found


def show(result: Result) -> str:
    """Return a line of text about a result."""
    name = f"{result['card']:8} {result['case']:31}"
    if "error" in result:
        return f"{name} FAILED {result['error']}"
    if result["case"] in PROGRAMS:
        gib = {key: result[key] / 2**30 for key in ("argument", "temp", "alias")}
        loops = "".join(
            f", and {kernels} per iteration of a loop of unknown length, entered {entered} times"
            for kernels, entered in result["loops"]
        )
        scope = {"prefill": f"a chunk of {CHUNK}", "insert": "in all"}.get(result["case"].split()[0], "a round")
        return (
            f"{name} arguments {gib['argument']:.2f} + temporaries {gib['temp']:.2f} = "
            f"{gib['argument'] + gib['temp']:.2f} GiB (aliased {gib['alias']:.2f}); {result['kernels']} kernels {scope}"
            f"{loops}; copies of experts {sum(result['expert_copies'].values())}, "
            f"of other packed weights {sum(result['packed_copies'].values())}"
        )
    kernels = ", ".join(
        f"{kernel}: {use.get('registers', '?')} registers, {use['shared'] / 1024:.0f} KiB shared"
        + (f", {use['spilled']} B SPILLED" if use.get("spilled") else "")
        for kernel, use in result["kernels"].items()
    )
    same = "; the same instructions for one row" if result.get("differ_for_one_row") == [] else ""
    return f"{name} {kernels}{same}"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--cards", nargs="*", default=list(CARDS), choices=CARDS, help="compile the kernels for these")
    parser.add_argument("--programs", nargs="*", default=list(CARDS), choices=CARDS, help="and the programs for these")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], args.worker[1:])
        return 0
    results, num_problems = [], 0
    for card in CARDS:
        smallest = card in LIMIT_GIB
        cases = [*kernel_cases(), *fused_cases()] if card in args.cards else []
        cases += list(float32_cases()) if card in args.cards and smallest else []
        programs = [name for name in PROGRAMS if smallest or not name.endswith(MIXED)]
        cases += programs if card in args.programs else []
        for result in run_card(card, cases, "scripts.gpu.check_cuda"):
            results.append(result)
            print(show(result), flush=True)
            for problem in problems(result):
                num_problems += 1
                print(f"         ^ wrong: {problem}", flush=True)
    if args.json:
        about: Result = {"what": "kernels and programs compiled for cards that are not here", "model": MODEL}
        about |= {"weights": "iq4_nl or q4_k_m", "draft": DRAFT, "context": CONTEXT, "chunk": CHUNK}
        write_json(str(args.json), {**about, **describe("none: compiled only"), "results": results})
    cards = {result["card"] for result in results}
    print(f"{len(results)} programs compiled for {len(cards)} cards, {num_problems} problems")
    return int(num_problems > 0)


if __name__ == "__main__":
    sys.exit(main())
