"""Compile every GPU kernel, and the whole prefill and decode programs, for five NVIDIA cards without having one.

    make check-cuda                     (makes .venv-cuda with jax's CUDA compiler plugin, 1.1 GB, and runs this)
    python scripts/check_cuda.py [--cards rtx3090 ...] [--programs rtx3090 ...] [--json FILE]

A kernel that does not fit a card (shared memory, an instruction it lacks) fails here as it would there; a crash of the
compiler ends only the process of that card. The programs are those of a 35B-A3B with IQ4_NL weights, one sequence,
draft 4 and a bfloat16 cache: bytes, kernels a round, and copies of weights, of which there must be none.
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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CARDS = ("rtx3090", "a100", "rtx4090", "h200", "b200")
MODEL, DRAFT, CONTEXT, CHUNK = "35b-a3b", 4, 32768, 512
LIMIT_GIB = {"rtx3090": 23.0}  # of the 24 that the card has
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
EVEN = tuple(range(16))
# name: layout, group, table, offset
FORMS: dict[str, tuple[str, int, tuple[int, ...] | None, bool]] = {
    "iq4_nl": ("codes4", 32, IQ4_NL, False),
    "q4_k": ("codes4", 32, EVEN, True),
    "nvfp4": ("codes4", 16, (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), False),
    "int4 g128": ("codes4", 128, EVEN, True),
    "q8_0": ("codes8", 32, None, False),
    "q6_k": ("codes8", 16, None, False),
    "fp8": ("fp8", 128, None, False),
    "bf16": ("plain", 0, None, False),
}
ROWS = {"decode": 5, "prefill": 2048}
# Matrices that the files of quantised checkpoints keep unquantised.
UNPACKED = {"router", "shared_gate", "in_a", "in_b", "conv"}


def packed(shape: Sequence[int], form: str) -> Any:
    """A weight of shapes only."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.quantized import QuantizedTensor

    layout, group, table, offset = FORMS[form]
    *lead, size = shape
    spec = jax.ShapeDtypeStruct
    if layout == "plain":
        return spec(tuple(shape), jnp.bfloat16)
    if layout == "fp8":
        *stack, out = lead
        scale = spec((*stack, -(-out // 128), -(-size // 128)), jnp.float32)
        codes = spec(tuple(shape), jnp.float8_e4m3fn)
    else:
        scale = spec((*lead, size // group), jnp.float16)
        codes = spec((*lead, size // 2), jnp.uint8) if layout == "codes4" else spec(tuple(shape), jnp.int8)
    return QuantizedTensor(
        codes=codes, scale=scale, offset=scale if offset else None, layout=layout, group=group, table=table
    )


# Cases: name -> (jitted function, arguments as shapes)


def kernel_cases() -> dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]]:
    """Every kernel in the shapes of the 35B-A3B."""

    def linear_case(form: str, rows: int) -> tuple[Any, tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp

        from kernels_pallas.matmul.triton import matmul

        return jax.jit(matmul), (jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16), packed((2048, 2048), form))

    def experts_case(form: str, rows: int) -> tuple[Any, tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp

        from kernels_pallas.grouped_matmul.triton import grouped_mlp

        spec, stacks = jax.ShapeDtypeStruct, (packed((10, 256, 1024, 2048), form), packed((10, 256, 2048, 512), form))
        routing = (spec((rows, 8), jnp.int32), spec((rows, 8), jnp.float32), spec((rows,), jnp.bool_))
        return jax.jit(grouped_mlp), (spec((rows, 2048), jnp.bfloat16), *stacks, spec((), jnp.int32), *routing)

    def attention_case(rows: int) -> tuple[Any, tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp

        from kernels_pallas.attention.triton import attend_cache

        spec, cache = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((10, 1, 2, CONTEXT, 256), jnp.bfloat16)
        where = (spec((), jnp.int32), spec((1, rows), jnp.int32), spec((1, rows), jnp.bool_))
        return jax.jit(attend_cache), (spec((1, rows, 16, 256), jnp.bfloat16), cache, cache, *where)

    attention = {f"attention {regime}": partial(attention_case, rows) for regime, rows in ROWS.items()}
    return attention | {
        f"{op} {form} {regime}": partial(make, form, rows)
        for op, make in (("linear", linear_case), ("experts", experts_case))
        for form in FORMS
        for regime, rows in ROWS.items()
    }


def program_case(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """"prefill" or "decode" of the whole model: jitted step, arguments, static arguments, parameters."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mtpjax.cache import new_cache, slots_for
    from mtpjax.config import preset
    from mtpjax.model import abstract_model
    from mtpjax.rows import NO_ROWS
    from mtpjax.sampling import STOPS, Requests
    from mtpjax.speculative import LoopState, decode, mtp_drafter
    from mtpjax.steps import prefill
    from mtpjax.weights import fill

    cfg, spec = preset(MODEL), jax.ShapeDtypeStruct

    def store(path: tuple[Any, ...], leaf: Any) -> Any:
        plain = leaf.dtype != jnp.bfloat16 or path[-1] in UNPACKED
        return spec(leaf.shape, leaf.dtype) if plain else packed(leaf.shape, "iq4_nl")

    graph, params = nnx.split(abstract_model(cfg, jnp.bfloat16, stack=cfg.repeats))
    graph, params = nnx.split(nnx.merge(graph, fill(params, store)))
    cache = jax.eval_shape(lambda: new_cache(cfg, 1, slots_for(CONTEXT, DRAFT + 1), dtype=jnp.bfloat16))

    def ints(*shape: int) -> Any:
        return spec(shape, jnp.int32)

    if name == "prefill":
        args: tuple[Any, ...] = (params, ints(1, CHUNK), ints(1, CHUNK), ints(1), cache)
        return prefill, args, {"graph": graph, "rows": NO_ROWS}, params
    state = LoopState(
        cache=cache, hidden=spec((1, cfg.hidden_size), jnp.bfloat16), token=ints(1), count=ints(1),
        done=spec((1,), jnp.bool_), stopped=spec((1,), jnp.bool_), rounds=ints(1), accepted=ints(1, DRAFT),
    )  # fmt: skip
    requests = Requests(
        max_tokens=ints(1), temperature=spec((1,), jnp.float32), seed=spec((1,), jnp.uint32), stops=ints(1, STOPS)
    )
    static = {"graph": graph, "k": DRAFT, "rounds": 32, "vocab": cfg.vocab_size, "drafter": mtp_drafter}
    return decode, (params, state, requests), static, params


def weight_shapes(params: Any) -> tuple[set[str], set[str]]:
    """Types of what a copy of weights would be, whole stacks and single layers: (experts, other packed weights)."""
    import jax

    names = {"uint8": "u8", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}
    experts, others = set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind, shape = names.get(leaf.dtype.name, "other"), tuple(leaf.shape)
        key = jax.tree_util.keystr(path)
        if "codes" not in key and "scale" not in key:
            continue
        mine = experts if len(shape) == 4 else others
        views = [(kind, shape)] + ([("u32", (*shape[:-1], shape[-1] // 4))] if kind == "u8" else [])
        for dtype, dims in views:
            mine |= {f"{dtype}[{','.join(map(str, d))}]" for d in (dims, dims[1:]) if len(d) >= 2}
    return experts, others


# Worker: one process, one card


def work(card: str, cases: list[str]) -> None:
    """Compile cases one by one, a line of JSON before and after each."""
    with tempfile.TemporaryDirectory() as dump:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump}"
        _work(card, cases, Path(dump))


def _work(card: str, cases: list[str], dump: Path) -> None:
    from scripts.cuda_target import CARDS as DESCRIBED
    from scripts.cuda_target import Target

    target, kernels = Target(DESCRIBED[card]), kernel_cases()
    for name in cases:
        print(json.dumps({"start": name}), flush=True)
        began = time.perf_counter()
        try:
            if name in ("prefill", "decode"):
                found = program_report(target, name)
            else:
                found = kernel_report(target, kernels[name], dump)
        except Exception as error:  # whatever the compiler says is the result
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        print(json.dumps({"case": name, "seconds": round(time.perf_counter() - began, 1), **found}), flush=True)


def kernel_report(target: Any, make: Callable[[], tuple[Any, tuple[Any, ...]]], dump: Path) -> dict[str, Any]:
    from scripts.cuda_target import kernel_resources, memory

    fn, args = make()
    compiled = target.compile(fn, *args)
    ours = kernel_resources(dump, ("matmul_", "experts_", "attention_"))
    if not ours:
        raise RuntimeError("the compiled program holds none of our kernels")
    return {"kernels": ours, "temp": memory(compiled)["temp"]}


def program_report(target: Any, name: str) -> dict[str, Any]:
    from scripts.cuda_target import Program, memory

    fn, args, static, params = program_case(name)
    compiled = target.compile(fn, *args, **static)
    program = Program(compiled.as_text())
    experts, others = weight_shapes(params)
    kernels, dynamic = program.loops()
    if name == "decode":  # the outer loop over rounds is the one that holds the others
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


def run_card(card: str, cases: list[str], python: str = sys.executable) -> Iterator[dict[str, Any]]:
    """Results of all cases on a card; a process that dies costs the case that it was at, and a new one goes on."""
    left = list(cases)
    while left:
        command = [python, __file__, "--worker", card, *left]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
        at: str | None = None
        for line in done.stdout.splitlines():
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            at = said.get("start", at)
            if "case" in said:
                left.remove(said["case"])
                at = None
                yield {"card": card, **said}
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            failed = at or left[0]
            if at is None and failed == left[0] and len(left) == len(cases):
                raise SystemExit(f"check_cuda: cannot compile for {card} here: {words}")
            left.remove(failed)
            yield {"card": card, "case": failed, "error": f"the compiler process ended with {done.returncode}: {words}"}


def problems(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    if "error" in result:
        return [result["error"]]
    found = []
    if result["case"] in ("prefill", "decode"):
        for kind in ("expert_copies", "packed_copies"):
            found += [f"{kind.replace('_', ' ')}: {result[kind]}"] if result[kind] else []
        limit = LIMIT_GIB.get(result["card"])
        total = (result["argument"] + result["temp"]) / 2**30
        if limit and total > limit:
            found.append(f"needs {total:.2f} GiB of {limit}")
    return found


def show(result: dict[str, Any]) -> str:
    name = f"{result['card']:8} {result['case']:26}"
    if "error" in result:
        return f"{name} FAILED {result['error']}"
    if result["case"] in ("prefill", "decode"):
        gib = {key: result[key] / 2**30 for key in ("argument", "temp", "alias")}
        loops = ", ".join(f"{kernels} a turn, entered {times} times" for kernels, times in result["loops"])
        what = "a round" if result["case"] == "decode" else f"a chunk of {CHUNK}"
        return (
            f"{name} arguments {gib['argument']:.2f} + temporaries {gib['temp']:.2f} = "
            f"{gib['argument'] + gib['temp']:.2f} GiB (aliased {gib['alias']:.2f}); {result['kernels']} kernels {what}, "
            f"and attention's: {loops}; copies of experts {sum(result['expert_copies'].values())}, "
            f"of other packed weights {sum(result['packed_copies'].values())}"
        )
    each = ", ".join(
        f"{kernel}: {use.get('registers', '?')} registers, {use['shared'] / 1024:.0f} KiB shared"
        + (f", {use['spilled']} B SPILLED" if use.get("spilled") else "")
        for kernel, use in result["kernels"].items()
    )
    return f"{name} {each}"


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
        cases += ["prefill", "decode"] if card in args.programs else []
        for result in run_card(card, cases):
            results.append(result)
            print(show(result), flush=True)
            for problem in problems(result):
                bad += 1
                print(f"         ^ must not be: {problem}", flush=True)
    if args.json:
        about = {"model": MODEL, "weights": "iq4_nl", "draft": DRAFT, "context": CONTEXT, "chunk": CHUNK}
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(results)} programs compiled for {len({r['card'] for r in results})} cards, {bad} problems")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
