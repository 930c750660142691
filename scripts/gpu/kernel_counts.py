"""Count the kernels of a decoding round and of a prompt chunk of the 35B-A3B by what they compute, from programs that
are compiled without a GPU.

    JAX_PLATFORMS=cpu .venv-cuda/bin/python -m scripts.gpu.kernel_counts --json docs/benchmarks/kernel_counts.json

Requests are greedy: at the choice of a token, the branch without sampling counts. `scripts.gpu.predict` reads the file.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from scripts.benchmarks.results import describe, write_json
from scripts.gpu.compiled_code import CompiledProgram
from scripts.gpu.cuda_cases import CONTEXT, MODEL, program_case
from scripts.gpu.cuda_target import CARDS, CompileTarget

DRAFT = "draft: "  # begins the groups of kernels inside the loop over drafts
OTHER = "XLA's kernels"
PROGRAMS = {"decode 0": (0, 512), "decode 4": (4, 512), "prefill 512": (4, 512), "prefill 2048": (4, 2048)}
# The groups of kernels that do one thing, by the beginning of their names, in this commit and in 833b245.
BY_NAME = {
    "experts_gate_up": "experts, gate and up",
    "experts_down": "experts, down",
    "choose_experts": "choice of experts",
    "choose_blocks": "plan of the experts",
    "norm_add": "norms",
    "norm_sum": "norms",
    "norm_pair": "norms",
    "norm_gated": "gated norm",
    "attention_update_cache": "attention, cache update",
    "attention_enter": "attention, cache update",
    "attention_decode": "attention",
    "attention_few": "attention",
    "attention_many": "attention",
    "attention_prefill": "attention",
    "attention_reduce_splits": "attention, join",
    "attention_join": "attention, join",
    "gated_delta_rule_prompt_inputs": "DeltaNet inputs",
    "gated_delta_rule_recurrent": "DeltaNet window",
    "gated_delta_rule_window": "DeltaNet window",
    "gated_delta_rule_chunk_matrices": "DeltaNet chunk matrices",
    "gated_delta_rule_chunk_scan": "DeltaNet chunk scan",
}


class Launch(NamedTuple):
    """One kernel of a program.

    Attributes:
        name: of a Pallas kernel; "" for one of XLA's.
        results, operands: their shapes.
        times: launches a round or chunk.
        in_draft: whether it is inside the loop over drafts.
    """

    name: str
    results: list[tuple[int, ...]]
    operands: list[tuple[int, ...]]
    times: int
    in_draft: bool


def launches(
    program: CompiledProgram, computation: str | None = None, times: int = 1, in_draft: bool = False
) -> Iterator[Launch]:
    """Yield the kernels that one run of a computation launches; None: the entry.

    A loop with a known trip count is multiplied out. Of a conditional the first branch counts, the greedy choice.
    """
    kernels = {id(inst) for inst in program.buffer_writers()}
    for inst in program.computations[computation or program.entry]:
        if inst.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', inst.text)
            count = int(trips[1]) if trips else 1
            for role in ("body", "condition"):
                yield from launches(program, inst.called(role), times * count, in_draft or bool(trips))
        elif inst.opcode == "conditional":
            listed = re.search(r"branch_computations=\{%([\w.\-]+)", inst.text)
            yield from launches(program, listed[1] if listed else inst.called("false_computation"), times, in_draft)
        elif inst.opcode == "call":
            yield from launches(program, inst.called("to_apply"), times, in_draft)
        elif id(inst) in kernels:
            name = re.search(r'\bname = "?(\w+)', inst.text) if inst.opcode == "custom-call" else None
            constraints = re.search(r"operand_layout_constraints=\{(.*?)\}, \w+=", inst.text)
            yield Launch(
                name[1] if name else "",
                _shapes(inst.type),
                _shapes(constraints[1]) if constraints else [],
                times,
                in_draft,
            )


def round_of(program: CompiledProgram) -> str:
    """Return the computation of one round of a decode program: the body of its first loop."""
    return next(i for i in program.computations[program.entry] if i.opcode == "while").called("body")


def _shapes(types: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", types)]


def group_of(launch: Launch) -> str:
    """Return the group of a kernel; of one that no rule knows, its own name."""
    prefix = DRAFT if launch.in_draft else ""
    if not launch.name:
        return OTHER
    if launch.name.startswith("matmul_"):
        return prefix + _product(launch)
    for name in sorted(BY_NAME, key=len, reverse=True):
        if launch.name.startswith(name):
            return prefix + BY_NAME[name]
    return prefix + launch.name


def _product(launch: Launch) -> str:
    """Return the group of a product, by the widths of its rows and of its results."""
    outputs, inputs = {shape[-1] for shape in launch.results}, {s[-1] for s in launch.operands if len(s) == 2}
    if max(outputs) > 16_384:  # also of a draft head
        return "LM head"
    if 32 in outputs:
        return "DeltaNet, in"
    if 256 in outputs:
        return "router and shared gate, up"
    if outputs == {512}:
        return "MTP sync"
    if 512 in outputs:
        return "q, k, v"
    if 4096 in inputs:
        return "out, o"
    return "shared down" if 512 in inputs else launch.name


def count_groups(text: str, decode: bool) -> Counter[str]:
    """Return the launches of each group, a round or a chunk, from the optimized HLO of a program."""
    program = CompiledProgram(text)
    counts: Counter[str] = Counter()
    for launch in launches(program, round_of(program) if decode else None):
        counts[group_of(launch)] += launch.times
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--card", choices=CARDS, default="h100" if "h100" in CARDS else "h200")
    parser.add_argument("--programs", choices=PROGRAMS, nargs="+", default=list(PROGRAMS))
    parser.add_argument("--json", help="write the counts to this file")
    args = parser.parse_args()
    target, found = CompileTarget(CARDS[args.card]), {}
    for name in args.programs:
        draft, chunk = PROGRAMS[name]
        fn, shapes, static, _ = program_case(name.split()[0], draft=draft, chunk=chunk)
        counts = count_groups(target.compile(fn, *shapes, **static).as_text() or "", name.startswith("decode"))
        found[name] = {"kernels": counts.total(), "groups": dict(counts.most_common())}
        print(f"{name}: {counts.total()} kernels, {len(counts)} groups", flush=True)
    if args.json:
        about: dict[str, Any] = {"what": "kernels of a round or a prompt chunk by what they compute, compiled only"}
        about |= {"model": MODEL, "card": args.card, "context": CONTEXT, **describe("none: compiled only")}
        write_json(args.json, about | {"programs": found})


if __name__ == "__main__":
    main()
