"""What the experiments share: the way to the library and the benchmarks, arguments, a JSON file and a plot for each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.results import describe, write_json

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "docs" / "benchmarks"
Experiment = Callable[..., dict[str, Any]]


def run(name: str, doc: str, experiment: Experiment, plot: Callable[[dict[str, Any], Any], None], **paths: str) -> None:
    """The command line of one experiment: figures to OUT/NAME.json, plot to OUT/NAME.png.

    `paths` are further options with their help; an experiment that has some is given all arguments.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="sizes that take seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file and the plot (%(default)s)")
    for option, text in paths.items():
        parser.add_argument(f"--{option}", type=Path, help=text)
    args = parser.parse_args()
    found = experiment(args.smoke, args) if paths else experiment(args.smoke)
    result = {"what": f"experiment {name}", "smoke": args.smoke, **describe(), **found}
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
    """Token ids of the embedded held-out excerpts."""
    from checkpoints import TINY
    from mtpjax.text.tokenizer import load_tokenizer
    from scripts.benchmarks.demo_prompts import excerpts

    return excerpts(load_tokenizer(TINY / "tokenizer.json"))


def own_texts(count: int, length: int) -> np.ndarray:
    """`[count, length]` token ids: the embedded excerpts, continued by the embedded model at T = 0.7 with as many seeds."""
    from mtpjax import LLM, SamplingParams

    llm = LLM(num_speculative_tokens=0, dtype="float32", max_model_len=length + 1, max_num_seqs=min(count, 32))
    prompts = held_out_prompts()
    asked = [prompts[i % len(prompts)][: length - 1] for i in range(count)]
    params = [
        SamplingParams(max_tokens=length - len(p), temperature=0.7, seed=i, ignore_eos=True)
        for i, p in enumerate(asked)
    ]
    outputs = llm.generate(asked, params)
    return np.array([[*p, *o.token_ids] for p, o in zip(asked, outputs, strict=True)], np.int32)
