"""Run what XLA compiles for NVIDIA cards, without a card: every GPU kernel, and texts of the embedded model.

    make emulate-cuda                                   (in the environment of `make check-cuda`)
    python -m scripts.gpu.emulate_cuda [--cards h200 ...] [--cases text ...] [--json FILE [--update]]

An emulator reads the PTX and executes each instruction with numpy (`scripts/ptx_emulator/README.md`).

* Kernels: one layer of a small size on random data. The result is compared with the formula in float32, and with the
  kernel interpreted on a CPU.
* Texts: whole programs, from the prefill of prompts to the draft-verify loop. Texts with drafts must equal texts
  without drafts.
* Caches: prompts alone and together, in chunks of two lengths, with the MTP head and without. Caches must be equal, bit
  for bit (`emulated_caches.py`).

While a kernel runs, each access to memory is checked: it must be aligned, inside a buffer of the kernel, and without a
race with other warps or blocks. Memory that was never written holds NaN, and asynchronous copies arrive as late as they
may. Exit status 1 if anything is wrong. This checks results, not performance.
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

from mtpjax import LLM, SamplingParams
from scripts.benchmarks.results import describe, write_json
from scripts.gpu.check_cuda import Result, float32_cases, run_card
from scripts.gpu.cuda_cases import Case, KernelSizes, kernel_cases
from scripts.gpu.cuda_target import CARDS
from scripts.gpu.data import CHECKED, data_of, reference, relative_difference
from scripts.gpu.emulated_caches import CACHES, cache_problems, cache_report, show_caches
from scripts.gpu.emulated_device import EmulatedDevice

CHECKPOINT = Path(__file__).resolve().parent.parent.parent / "checkpoints" / "tiny"
SIZES = KernelSizes(
    hidden=1024,
    layers=2,
    experts=4,
    experts_per_token=2,
    expert_size=512,
    heads=(4, 2, 256),
    linear=(2, 4, 128),
    context=512,
    vocab=9_000,
    rows=(("decode", 5), ("prefill", 64)),
)
TOLERANCE = 1e-2  # of the largest magnitude: operands and results are bfloat16
PROMPTS = (
    "The old man",
    "Once upon a time there was a little girl who lived near the sea and had",
    "It was",
    "“I do not know,” said the",
)
LONG_PROMPT = "The story begins in a village by the sea, where an old man mended nets. " * 13 + "One day"
DRAFT = 3
SAMPLED = {
    "temperature": 0.9,
    "top_k": 20,
    "top_p": 0.95,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.1,
    "seed": 5,
}


class Text(NamedTuple):
    """Arguments of `LLM`, arguments of `SamplingParams`, and the prompts."""

    options: dict[str, Any]
    sampling: dict[str, Any] = {}
    prompts: Sequence[str] = PROMPTS


LONG_OPTIONS = {"dtype": "bfloat16", "quantization": "iq4nl", "mtp_prompt_tokens": 64, "prefill_buckets": (16, 64)}
TEXTS = {
    "text bf16": Text({"dtype": "bfloat16"}),
    "text iq4_nl": Text({"dtype": "bfloat16", "quantization": "iq4nl"}),
    "text long iq4_nl": Text(LONG_OPTIONS, prompts=(LONG_PROMPT,)),
    "text int8 refilled": Text({"dtype": "bfloat16", "quantization": "int8", "max_num_seqs": 2}, SAMPLED),
    "text fp8": Text({"dtype": "bfloat16", "quantization": "fp8"}),
    "text float32": Text({"dtype": "float32"}, {"max_tokens": 6}),
}


def all_kernel_cases(interpret: bool = False) -> dict[str, Case]:
    return kernel_cases(SIZES, interpret=interpret) | float32_cases(SIZES, interpret=interpret)


# Worker: one process, one card


def work(card: str, names: list[str]) -> None:
    """Run cases one by one, and print a line of JSON before and after each."""
    device = EmulatedDevice(CARDS[card])
    for name in names:
        print(json.dumps({"start": name}), flush=True)
        start, launched_before = time.perf_counter(), device.num_launched
        try:
            result = report(device, name)
        except Exception as error:  # a failed case is a result, whatever the error
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        counts = {"seconds": round(time.perf_counter() - start, 1), "kernels": device.num_launched - launched_before}
        print(json.dumps({"case": name, **counts, **result}), flush=True)


def report(device: EmulatedDevice, name: str) -> Result:
    """Run a case."""
    if name in CACHES:
        return cache_report(device, CACHES[name])
    return text_report(device, TEXTS[name]) if name in TEXTS else kernel_report(device, name)


def kernel_report(device: EmulatedDevice, name: str) -> Result:
    """Run a kernel, and compare it with the formula and with the interpreted kernel."""
    fn, specs = all_kernel_cases()[name]()
    args = data_of(name, specs, SIZES)
    outputs = jax.tree.leaves(device.compile(fn, args)(*args))
    interpreted_fn, _ = all_kernel_cases(interpret=True)[name]()
    interpreted = jax.tree.leaves(interpreted_fn(*args))
    formula = reference(name, args, SIZES.experts_per_token)
    output = np.asarray(outputs[-1 if name.startswith("norm") else 0], np.float32)
    return {
        "of_formula": relative_difference(name, output.reshape(-1, *formula.shape[1:])[-CHECKED:], formula),
        "of_interpreted": max(relative_difference(name, a, b) for a, b in zip(outputs, interpreted, strict=True)),
    }


def text_report(device: EmulatedDevice, text: Text) -> Result:
    """Generate texts on the card without and with drafts, and on the CPU."""
    sampling = SamplingParams(**{"max_tokens": 8, **text.sampling})

    def generate(draft: int, **options: Any) -> tuple[list[str | None], float]:
        llm = LLM(CHECKPOINT, num_speculative_tokens=draft, max_model_len=1024, **text.options, **options)
        outputs = llm.generate(list(text.prompts), sampling)
        return [out.text for out in outputs], float(np.mean([out.metrics.mean_acceptance_length for out in outputs]))

    with device.active():
        texts, _ = generate(0, compile_fn=device.compile)
        texts_with_drafts, tokens_per_round = generate(DRAFT, compile_fn=device.compile)
    jax.clear_caches()
    texts_on_cpu, _ = generate(0)
    return {
        "texts": texts,
        "same_with_drafts": texts_with_drafts == texts,
        "same_on_cpu": texts_on_cpu == texts,
        "tokens_a_round": tokens_per_round,
    }


# Parent


def problems(result: Result) -> list[str]:
    """Return everything in a result that is wrong."""
    if "error" in result:
        return [result["error"]]
    if result["case"] in CACHES:
        return cache_problems(result)
    if result["case"] in TEXTS:
        exact = TEXTS[result["case"]].options["dtype"] == "float32"
        found = {
            "drafts change the text": not result["same_with_drafts"],
            "another text than on a CPU, in float32": exact and not result["same_on_cpu"],
        }
        return [problem for problem, is_wrong in found.items() if is_wrong]
    return [
        f"differs by {result[key]:.1e} from {expected}"
        for key, expected in (("of_formula", "the formula"), ("of_interpreted", "the interpreted kernel"))
        if not result[key] <= TOLERANCE  # NaN is a problem, too
    ]


def show(result: Result) -> str:
    """Return a line of text about a result."""
    name = f"{result['card']:8} {result['case']:31}"
    if "error" in result:
        return f"{name} FAILED {result['error']}"
    if result["case"] in CACHES:
        return f"{name} {show_caches(result)}"
    if result["case"] in TEXTS:
        drafts, cpu = ("the same" if result[key] else "OTHERS" for key in ("same_with_drafts", "same_on_cpu"))
        return (
            f"{name} {len(result['texts'])} texts: {drafts} with drafts "
            f"({result['tokens_a_round']:.2f} tokens a round), "
            f"{cpu} on a CPU; {result['kernels']} kernels in {result['seconds']:.0f} s"
        )
    formula, interpreted = result["of_formula"], result["of_interpreted"]
    return f"{name} differs by {formula:.1e} from the formula, {interpreted:.1e} from the interpreted kernel"


def with_others(results: list[Result], file: Path) -> list[Result]:
    """Return these results and those of other cases and cards that a file has, which keep the commit they are of."""
    before = json.loads(file.read_text())
    done = {(result["card"], result["case"]) for result in results}
    others = [
        {"commit": before["commit"]} | result
        for result in before["results"]
        if (result["card"], result["case"]) not in done
    ]
    return results + others


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--cards", nargs="+", default=["rtx3090", "h200", "b200"], choices=CARDS)
    parser.add_argument("--cases", nargs="+", help="only cases whose names contain one of these words (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="cards at a time, a process each (default: 2)")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--update", action="store_true", help="keep what the file has of other cases and cards")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], args.worker[1:])
        return 0
    names = (*all_kernel_cases(), *TEXTS, *CACHES)
    selected = [name for name in names if not args.cases or any(word in name for word in args.cases)]
    if not selected:
        parser.error(f"no case contains one of {args.cases}; they are: {', '.join(names)}")

    def run(card: str) -> list[Result]:
        results = []
        for result in run_card(card, selected, "scripts.gpu.emulate_cuda"):
            results.append(result)
            wrong = [f"         ^ wrong: {problem}" for problem in problems(result)]
            print("\n".join([show(result), *wrong]), flush=True)
        return results

    with ThreadPoolExecutor(args.jobs) as pool:
        results = [result for card_results in pool.map(run, args.cards) for result in card_results]
    num_problems = sum(len(problems(result)) for result in results)
    if args.json:
        about = {
            "what": "compiled kernels and programs, run by an emulator of PTX",
            "bound": TOLERANCE,
            "sizes": str(SIZES),
        }
        kept = with_others(results, args.json) if args.update and args.json.exists() else results
        write_json(str(args.json), {**about, **describe("none: emulated"), "results": kept})
    print(f"{len(results)} cases emulated on {len(args.cards)} cards, {num_problems} problems")
    return int(num_problems > 0)


if __name__ == "__main__":
    sys.exit(main())
