"""Compile every GPU kernel, and the whole prefill and decode programs, for five NVIDIA cards without having one.

    make check-cuda                     (makes .venv-cuda with jax's CUDA compiler plugin, 1.1 GB, and runs this)
    python -m scripts.gpu.check_cuda [--cards rtx3090 ...] [--programs rtx3090 ...] [--json FILE]

A kernel that does not fit a card (shared memory, an instruction it lacks) fails here as it would there; a crash of the
compiler ends only the process of that card. On the first card every decoding kernel is compiled for one row, too, and must
have the same floating-point instructions as for five: a row's bits then do not depend on its window. The loops of products may
not wait for memory where they load, nor those for few rows pass four-bit weights through shared memory. The programs are those
of a 35B-A3B with IQ4_NL weights, and for the smallest card with the mixture of types that llama.cpp calls Q4_K_M, for one
sequence, draft 4 and a bfloat16 cache: bytes, kernels a round, and copies of weights, of which there must be none.
Exit status 1 when anything fails. Nothing is run on a GPU: there are no times and no numbers here.
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

CARDS = ("rtx3090", "a100", "rtx4090", "h200", "b200")
KERNELS = ("matmul_", "experts_", "attention_", "delta_", "choose_", "sampling_", "norm_")  # beginnings of their names
PRODUCTS = ("matmul_", "experts_")  # of packed weights
BY_REGISTERS = ("codes4", "codes5")  # layouts whose decoding kernels hand weights from register to tensor core
BY_MEMORY = ("b200",)  # cards whose tensor cores take weights from memory alone
LIMIT_GIB = {"rtx3090": 23.0}  # of the 24 that the card has


# Worker: one process, one card


def work(card: str, cases: list[str]) -> None:
    """Compile cases one by one, a line of JSON before and after each."""
    with tempfile.TemporaryDirectory() as dump:
        _work(card, cases, Path(dump))


def _work(card: str, cases: list[str], dump: Path) -> None:
    from scripts.gpu.cuda_target import CARDS as DESCRIBED
    from scripts.gpu.cuda_target import Target

    target, kernels = Target(DESCRIBED[card], dump), kernel_cases() | float32_cases()
    alone = kernel_cases(KernelSizes(rows=(("decode", 1), ("prefill", 2048)))) if card in LIMIT_GIB else {}
    for name in cases:
        print(json.dumps({"start": name}), flush=True)
        began = time.perf_counter()
        try:
            if name in PROGRAMS:
                found = program_report(target, name)
            else:
                found = kernel_report(target, kernels[name], dump, alone.get(name) if name.endswith("decode") else None)
        except Exception as error:  # whatever the compiler says is the result
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        print(json.dumps({"case": name, "seconds": round(time.perf_counter() - began, 1), **found}), flush=True)


def float32_cases(size: KernelSizes | None = None, interpret: bool = False) -> dict[str, Case]:
    """The kernels for rows of float32, whose tiles are larger, in bytes; that of logits takes nothing else anyway."""
    cases = kernel_cases(size, ("iq4_nl", "mixed"), interpret, jnp.float32)
    return {f"{name} float32": case for name, case in cases.items() if not name.startswith("sampling")}


def kernel_report(target: Any, make: Case, dump: Path, alone: Case | None) -> dict[str, Any]:
    """`alone`: the same kernel for a single row, whose instructions must be the same."""
    from scripts.gpu.cuda_target import detours, float_instructions, kernel_resources, memory

    fn, args = make()
    compiled = target.compile(fn, *args)
    floats, ways, ours = float_instructions(dump, KERNELS), detours(dump, PRODUCTS), kernel_resources(dump, KERNELS)
    if not ours:
        raise RuntimeError("the compiled program holds none of our kernels")
    for name, way in ways.items():
        ours[name] |= way
    found = {"kernels": ours, "temp": memory(compiled)["temp"]}
    if alone is not None:
        fn, args = alone()
        target.compile(fn, *args)
        its = float_instructions(dump, KERNELS)
        kernel_resources(dump, KERNELS)  # empties the folder
        found["differ_for_one_row"] = [
            name for name in floats | its if not floats.get(name) or floats[name] != its.get(name)
        ]
    return found


def program_report(target: Any, name: str) -> dict[str, Any]:
    from scripts.gpu.cuda_target import Program, memory

    fn, args, static, params = program_case(name)
    compiled = target.compile(fn, *args, **static)
    program = Program(compiled.as_text())
    experts, others = weight_shapes(params)
    kernels, dynamic = program.loops()
    if name.startswith("decode"):  # the outer loop over rounds is the one that holds the others
        (a_round, _), *inside = dynamic
    else:
        a_round, inside = kernels, dynamic
    return {
        **memory(compiled),
        "expert_copies": program.copies(experts),
        "packed_copies": program.copies(others),
        "kernels": a_round,
        "loops": inside,
    }


# Parent


def run_card(
    card: str, cases: list[str], script: str = __file__, python: str = sys.executable
) -> Iterator[dict[str, Any]]:
    """Results of all cases on a card, by the workers of a script; a process that dies costs the case that it was at, and a new
    one goes on."""
    left = list(cases)
    while left:
        command, at = [python, script, "--worker", card, *left], None
        with tempfile.TemporaryFile("w+") as errors:
            env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
            assert worker.stdout
            for line in worker.stdout:
                if not line.startswith("{"):
                    continue
                said = json.loads(line)
                at = said.get("start", at)
                if "case" in said:
                    left.remove(said["case"])
                    at = None
                    yield {"card": card, **said}
            status = worker.wait()
            errors.seek(0)
            words = (errors.read().strip().splitlines() or ["no message"])[-1][:300]
        if status:
            failed = at or left[0]
            if at is None and failed == left[0] and len(left) == len(cases):
                raise SystemExit(f"{Path(script).stem}: cannot compile for {card} here: {words}")
            left.remove(failed)
            yield {"card": card, "case": failed, "error": f"the compiler process ended with {status}: {words}"}


def problems(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    if "error" in result:
        return [result["error"]]
    found = [f"{name}: other instructions for one row than for five" for name in result.get("differ_for_one_row", ())]
    for name, use in result["kernels"].items() if result["case"] not in PROGRAMS else ():
        if use.get("unprefetched"):
            found.append(f"{name}: {use['unprefetched']} loads of its loop are not prefetched")
        straight = result["case"].endswith("decode") and name.endswith(BY_REGISTERS) and result["card"] not in BY_MEMORY
        if straight and use.get("stored", 0) + use.get("shuffled", 0):
            found.append(f"{name}: its loop passes weights on ({use['stored']} stores, {use['shuffled']} shuffles)")
    if result["case"] in PROGRAMS:
        for kind in ("expert_copies", "packed_copies"):
            found += [f"{kind.replace('_', ' ')}: {result[kind]}"] if result[kind] else []
        limit = LIMIT_GIB.get(result["card"])
        total = (result["argument"] + result["temp"]) / 2**30
        if limit and total > limit:
            found.append(f"needs {total:.2f} GiB of {limit}")
    return found


def show(result: dict[str, Any]) -> str:
    name = f"{result['card']:8} {result['case']:31}"
    if "error" in result:
        return f"{name} FAILED {result['error']}"
    if result["case"] in PROGRAMS:
        gib = {key: result[key] / 2**30 for key in ("argument", "temp", "alias")}
        loops = "".join(f", and {k} a turn of a loop of unknown length, entered {n} times" for k, n in result["loops"])
        what = {"prefill": f"a chunk of {CHUNK}", "insert": "in all"}.get(result["case"].split()[0], "a round")
        return (
            f"{name} arguments {gib['argument']:.2f} + temporaries {gib['temp']:.2f} = "
            f"{gib['argument'] + gib['temp']:.2f} GiB (aliased {gib['alias']:.2f}); {result['kernels']} kernels {what}"
            f"{loops}; copies of experts {sum(result['expert_copies'].values())}, "
            f"of other packed weights {sum(result['packed_copies'].values())}"
        )
    each = ", ".join(
        f"{kernel}: {use.get('registers', '?')} registers, {use['shared'] / 1024:.0f} KiB shared"
        + (f", {use['spilled']} B SPILLED" if use.get("spilled") else "")
        for kernel, use in result["kernels"].items()
    )
    alike = "; the same instructions for one row" if result.get("differ_for_one_row") == [] else ""
    return f"{name} {each}{alike}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cards", nargs="*", default=list(CARDS), choices=CARDS, help="compile the kernels for these")
    parser.add_argument("--programs", nargs="*", default=list(CARDS), choices=CARDS, help="and the programs for these")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], args.worker[1:])
        return 0
    results, bad = [], 0
    for card in CARDS:
        cases = list(kernel_cases()) if card in args.cards else []
        cases += list(float32_cases()) if card in args.cards and card in LIMIT_GIB else []
        programs = [
            name for name in PROGRAMS if card in LIMIT_GIB or not name.endswith(MIXED)
        ]  # those where it is tight
        cases += programs if card in args.programs else []
        for result in run_card(card, cases):
            results.append(result)
            print(show(result), flush=True)
            for problem in problems(result):
                bad += 1
                print(f"         ^ must not be: {problem}", flush=True)
    if args.json:
        what = {"what": "kernels and programs compiled for cards that are not here", "model": MODEL}
        about = {**what, "weights": "iq4_nl or q4_k_m", "draft": DRAFT, "context": CONTEXT, "chunk": CHUNK}
        write_json(str(args.json), {**about, **describe("none: compiled only"), "results": results})
    print(f"{len(results)} programs compiled for {len({r['card'] for r in results})} cards, {bad} problems")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
