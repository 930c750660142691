"""Run what XLA compiles for NVIDIA cards, without one: every GPU kernel, and texts of the embedded model. An emulator reads the
PTX and does in numpy what each instruction says.

    make emulate-cuda                                   (in the environment of `make check-cuda`)
    python -m scripts.gpu.emulate_cuda [--cards h200 ...] [--cases text ...] [--json FILE]

Kernels: one layer at a small size on random data, compared with the formula in float32, and with the kernel as interpreted on a
CPU. Texts: whole programs, from reading prompts to the draft-verify loop; with drafts they must be those without. While a kernel
runs, each access to memory is checked: aligned, inside a buffer that the kernel was given, written before it is read (what nobody
wrote is NaN), and not racing with other warps or blocks; copies arrive as late as they may. Exit status 1 when anything is wrong.
It proves numbers, not times,.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scripts.benchmarks.results import describe, write_json
from scripts.gpu.check_cuda import float32_cases, run_card
from scripts.gpu.cuda_cases import Case, KernelSizes, kernel_cases

CARDS = ("rtx3090", "a100", "rtx4090", "h200", "b200")
CHECKPOINT = Path(__file__).resolve().parent.parent.parent / "checkpoints" / "tiny"
SIZES = KernelSizes(
    hidden=1024, layers=2, experts=4, chosen=2, expert_size=512, heads=(4, 2, 256), linear=(2, 4, 128), context=512, vocab=9_000,
    rows=(("decode", 5), ("prefill", 64)),
)  # fmt: skip
BOUND = 1e-2  # of the largest magnitude: bfloat16 operands and results
PROMPTS = (
    "The old man",
    "Once upon a time there was a little girl who lived near the sea and had",
    "It was",
    "“I do not know,” said the",
)
DRAFT = 3
SAMPLED = {
    "temperature": 0.9,
    "top_k": 20,
    "top_p": 0.95,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.1,
    "seed": 5,
}
LONG = ("The story begins in a village by the sea, where an old man mended nets. " * 13 + "One day",)


class Text(NamedTuple):
    """Arguments of `LLM` and of `SamplingParams`, and the prompts."""

    options: dict[str, Any]
    wanted: dict[str, Any] = {}
    prompts: Sequence[str] = PROMPTS


TEXTS = {
    "text bf16": Text({"dtype": "bfloat16"}),
    "text iq4_nl": Text({"dtype": "bfloat16", "quantization": "iq4nl"}),
    "text long iq4_nl": Text(
        {"dtype": "bfloat16", "quantization": "iq4nl", "mtp_prompt_tokens": 64, "prefill_buckets": (16, 64)}, {}, LONG
    ),
    "text int8 refilled": Text({"dtype": "bfloat16", "quantization": "int8", "max_num_seqs": 2}, SAMPLED),
    "text fp8": Text({"dtype": "bfloat16", "quantization": "fp8"}),
    "text float32": Text({"dtype": "float32"}, {"max_tokens": 6}),
}


def cases() -> dict[str, Case]:
    return kernel_cases(SIZES) | float32_cases(SIZES)


# Worker: one process, one card


def work(card: str, names: list[str]) -> None:
    """Run cases one by one, a line of JSON before and after each."""
    from scripts.gpu.cuda_target import CARDS as DESCRIBED
    from scripts.gpu.emulated_device import EmulatedCard

    emulated = EmulatedCard(DESCRIBED[card])
    for name in names:
        print(json.dumps({"start": name}), flush=True)
        began, before = time.perf_counter(), emulated.launched
        try:
            found = text_report(emulated, TEXTS[name]) if name in TEXTS else kernel_report(emulated, name)
        except Exception as error:  # whatever goes wrong is the result
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        seconds = round(time.perf_counter() - began, 1)
        print(
            json.dumps({"case": name, "seconds": seconds, "kernels": emulated.launched - before, **found}), flush=True
        )


def difference(got: Any, want: Any) -> float:
    """Largest, of the largest magnitude; NaN where one is and the other is not."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.max(np.abs(got - want)) / max(float(np.max(np.abs(want))), 1e-30))


def kernel_report(emulated: Any, name: str) -> dict[str, Any]:
    from scripts.gpu.data import CHECKED, data_of, reference

    fn, specs = cases()[name]()
    args = data_of(name, specs, SIZES)
    got = jax.tree.leaves(emulated.compile(fn, args)(*args))
    interpreted = (kernel_cases(SIZES, interpret=True) | float32_cases(SIZES, interpret=True))[name]()[0]
    plain = jax.tree.leaves(interpreted(*args))
    want = reference(name, args, SIZES.chosen)
    rows = np.asarray(got[-1 if name.startswith("norm") else 0], np.float32).reshape(-1, *want.shape[1:])[-CHECKED:]
    return {
        "of_formula": difference(rows, want),
        "of_interpreted": max(difference(a, b) for a, b in zip(got, plain, strict=True)),
    }


def text_report(emulated: Any, text: Text) -> dict[str, Any]:
    from mtpjax import LLM, SamplingParams

    sampling = SamplingParams(**{"max_tokens": 8, **text.wanted})

    def texts(draft: int, **options: Any) -> tuple[list[str], float]:
        options |= text.options
        llm = LLM(CHECKPOINT, num_speculative_tokens=draft, max_model_len=1024, **options)
        outputs = llm.generate(list(text.prompts), sampling)
        return [out.text for out in outputs], float(np.mean([out.metrics.mean_acceptance_length for out in outputs]))

    with emulated.in_use():
        (plain, _), (drafted, length) = (texts(k, compile_fn=emulated.compile) for k in (0, DRAFT))
    jax.clear_caches()
    on_cpu, _ = texts(0)
    return {
        "texts": plain,
        "same_with_drafts": drafted == plain,
        "same_on_cpu": on_cpu == plain,
        "tokens_a_round": length,
    }


# Parent


def problems(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    if "error" in result:
        return [result["error"]]
    if result["case"] in TEXTS:
        found = [] if result["same_with_drafts"] else ["drafts change the text"]
        exact = TEXTS[result["case"]].options["dtype"] == "float32"
        return found + (["another text than on a CPU, in float32"] if exact and not result["same_on_cpu"] else [])
    return [
        f"differs by {result[of]:.1e} from {what}"
        for of, what in (("of_formula", "the formula"), ("of_interpreted", "the interpreted kernel"))
        if not result[of] <= BOUND
    ]


def show(result: dict[str, Any]) -> str:
    name = f"{result['card']:8} {result['case']:31}"
    if "error" in result:
        return f"{name} FAILED {result['error']}"
    if result["case"] in TEXTS:
        same = ["the same" if result[of] else "OTHERS" for of in ("same_with_drafts", "same_on_cpu")]
        return (
            f"{name} {len(result['texts'])} texts: {same[0]} with drafts ({result['tokens_a_round']:.2f} tokens a round), "
            f"{same[1]} on a CPU; {result['kernels']} kernels in {result['seconds']:.0f} s"
        )
    formula, interpreted = result["of_formula"], result["of_interpreted"]
    return f"{name} differs by {formula:.1e} from the formula, {interpreted:.1e} from the interpreted kernel"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cards", nargs="+", default=["rtx3090", "h200", "b200"], choices=CARDS)
    parser.add_argument("--cases", nargs="+", help="only those whose names hold one of these words (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="cards at a time, a process each (default: 2)")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], args.worker[1:])
        return 0
    chosen = [name for name in (*cases(), *TEXTS) if not args.cases or any(word in name for word in args.cases)]
    if not chosen:
        parser.error(f"no case holds one of {args.cases}; they are: {', '.join((*cases(), *TEXTS))}")

    def on_card(card: str) -> list[dict[str, Any]]:
        found = []
        for result in run_card(card, chosen, __file__):
            found.append(result)
            print(
                "\n".join([show(result), *[f"         ^ must not be: {problem}" for problem in problems(result)]]),
                flush=True,
            )
        return found

    with ThreadPoolExecutor(args.jobs) as pool:
        results = [result for found in pool.map(on_card, args.cards) for result in found]
    bad = sum(len(problems(result)) for result in results)
    if args.json:
        about = {
            "what": "compiled kernels and programs, run by an emulator of PTX",
            "bound": BOUND,
            "sizes": str(SIZES),
        }
        write_json(str(args.json), {**about, **describe("none: emulated"), "results": results})
    print(f"{len(results)} cases emulated on {len(args.cards)} cards, {bad} problems")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
