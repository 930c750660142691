"""The command line of an experiment, which writes a JSON file and a plot, and texts that several experiments measure
on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.results import describe, write_json

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "docs" / "benchmarks"
Measure = Callable[[argparse.Namespace], dict[str, Any]]
Plot = Callable[[dict[str, Any], Any], None]


def run(name: str, description: str | None, measure: Measure, plot: Plot, **path_options: str) -> None:
    """Run the command line of one experiment: write its figures to OUT/NAME.json and its plot to OUT/NAME.png.

    Args:
        measure: returns the figures for the arguments; `smoke` asks for sizes that take seconds.
        plot: draws the figures on a matplotlib figure.
        path_options: further options that take a path, with their help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="sizes that take seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file and the plot (%(default)s)")
    for option, text in path_options.items():
        parser.add_argument(f"--{option}", type=Path, help=text)
    args = parser.parse_args()
    figures = measure(args)
    result = {"what": f"experiment {name}", "smoke": args.smoke, **describe(), **figures}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(str(args.out / f"{name}.json"), result)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 4.6), constrained_layout=True)
    plot(result, figure)
    figure.savefig(args.out / f"{name}.png", dpi=100)
    plt.close(figure)
    print(f"wrote {args.out / f'{name}.png'}")


def held_out_prompts() -> list[list[int]]:
    """Return the token ids of the embedded excerpts of held-out books."""
    from checkpoints import TINY
    from mtpjax.text.tokenizer import load_tokenizer
    from scripts.benchmarks.demo_prompts import excerpts

    return excerpts(load_tokenizer(TINY / "tokenizer.json"))


def generated_texts(count: int, length: int) -> np.ndarray:
    """Return token ids `[count, length]`: the embedded excerpts, continued by the embedded model.

    Text i is sampled at T = 0.7 with seed i.
    """
    from mtpjax import LLM, SamplingParams

    llm = LLM(num_speculative_tokens=0, dtype="float32", max_model_len=length + 1, max_num_seqs=min(count, 32))
    excerpts = held_out_prompts()
    prompts = [excerpts[i % len(excerpts)][: length - 1] for i in range(count)]
    params = [
        SamplingParams(max_tokens=length - len(prompt), temperature=0.7, seed=seed, ignore_eos=True)
        for seed, prompt in enumerate(prompts)
    ]
    outputs = llm.generate(prompts, params)
    texts = [[*prompt, *output.token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
    return np.array(texts, np.int32)
