"""Train the embedded model: a Qwen3.5-MoE of eight million parameters with its MTP head, on books, Python and talk.

    python -m scripts.tiny_model.train --books DIR --out DIR [--minutes 30] [--seed 0]
    python -m scripts.tiny_model.train --books DIR --out DIR --manifest checkpoints/tiny/manifest.json  # the same texts
    python -m scripts.tiny_model.train --books DIR --out DIR --like checkpoints/tiny    # the same texts, steps and
    stages python -m scripts.tiny_model.report --books DIR --model DIR                         # measures it, writes its
    README.md

It trains the modules that serve; loss.py has the objective. A run saves itself every few minutes beside --out, and
--resume continues it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtpjax.config import ModelConfig
from mtpjax.loading.loaded_model import LoadedModel
from scripts.tiny_model import data
from scripts.tiny_model.checkpoint import LAYERS, export, prepare
from scripts.tiny_model.loss import MTP_WEIGHTS, ROWS, window_loss
from scripts.tiny_model.start import first_state, history
from scripts.tiny_model.state import Plan, Progress, Saves, read_curve, write_curve
from scripts.tiny_model.steps import DTYPES, computed_in, objective, train

SHOW_STEPS, SAVE_SECONDS = 20, 300.0


def stages(training: dict[str, Any]) -> list[list[str]]:
    """Return the options of each run that led to a training.json, the first run first."""
    names = ("layers", "steps", "batch", "accumulate", "rate", "optimizer", "mtp_steps", "ema", "dtype", "seed")
    values = {name: training["done_steps" if name == "steps" else name] for name in names}
    options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    options += [part for name in training["without"] for part in ("--without", name)]
    options += ["--frozen-trunk"] * training["frozen_trunk"]
    options += ["--share", str(training["share"])] if "share" in training else []
    return [*(stages(training["start"]) if "start" in training else []), options]


def train_like(model: Path, argv: list[str], out: Path) -> None:
    """Repeat all runs that led to the checkpoint `model`, on its own texts; runs before the last go beside `out`."""
    runs = stages(json.loads((model / "training.json").read_text()))
    folders = [*(out.with_name(f"{out.name}.stage{number}") for number in range(1, len(runs))), out]
    for number, (run, here) in enumerate(zip(runs, folders, strict=True)):
        print(f"stage {number + 1} of {len(runs)}: {' '.join(run)}", flush=True)
        file = here / "training.json"
        if "--resume" in argv and file.is_file() and stages(json.loads(file.read_text()))[number] == run:
            print(f"{here}: is done", flush=True)
            continue
        start = ["--start", str(folders[number - 1])] if number else []
        average = ["--average", str(folders[number - 2])] if "--share" in run else []
        main([*argv, "--out", str(here), "--manifest", str(model / "manifest.json"), *run, *start, *average])


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded tiny model.")
    default = {field.name: field.default for field in fields(Plan)}
    parser.add_argument("--books", type=Path, required=True, help="folder of plain texts, author_title.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; replaced at every save")
    parser.add_argument("--manifest", type=Path, help="train only if the texts are those that this file lists")
    parser.add_argument(
        "--like",
        type=Path,
        help="repeat the training of the model in this folder; takes --books, --out and --resume only",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last save of the same command")
    parser.add_argument(
        "--start",
        type=Path,
        help="weights to begin with; a model of fewer layers is stacked. The optimiser and the rate start afresh",
    )
    parser.add_argument(
        "--average",
        type=Path,
        help="begin between the weights of --start and those in this folder, which that run started from",
    )
    parser.add_argument("--share", type=float, default=0.5, help="with --average: the share of --start (%(default)s)")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="leave a text out, by its name in manifest.json; may be repeated",
    )
    parser.add_argument(
        "--frozen-trunk", action="store_true", help="train only the MTP head; the trunk stays that of --start"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the trunk, a multiple of 4 (%(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time, start-up not counted")
    parser.add_argument("--steps", type=int, help="train for this many steps instead")
    parser.add_argument("--batch", type=int, default=default["batch"], help=f"windows of {ROWS} tokens a step")
    parser.add_argument("--accumulate", type=int, default=1, help="read a batch in this many parts to save memory")
    parser.add_argument("--rate", type=float, default=default["rate"], help="peak learning rate")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default=default["optimizer"])
    parser.add_argument("--mtp-steps", type=int, default=default["mtp_steps"], choices=range(1, len(MTP_WEIGHTS) + 1))
    parser.add_argument("--ema", type=float, default=default["ema"], help="decay of the moving average of the weights")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--seed", type=int, default=default["seed"])
    args = parser.parse_args(argv)
    if args.layers < 4 or args.layers % 4:
        parser.error(
            f"--layers {args.layers} is not 4, 8, 12, ...: whole repeats of three DeltaNet layers and one of attention."
        )
    if args.frozen_trunk and args.start is None:
        parser.error("--frozen-trunk needs a trained trunk: give --start.")
    if args.average and args.start is None:
        parser.error("--average is the average with --start: give it too.")
    if not 0 < args.share < 1:
        parser.error(f"--share {args.share:g} is not between 0 and 1.")
    if args.accumulate < 1 or args.batch % args.accumulate:
        parser.error(f"--accumulate {args.accumulate} does not divide --batch {args.batch}.")
    return args


def make_plan(args: argparse.Namespace) -> Plan:
    """Return the plan of the options."""
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    options = {field.name: getattr(args, field.name) for field in fields(Plan) if hasattr(args, field.name)}
    return replace(Plan(), **options | {"dtype": dtype, "minutes": None if args.steps else args.minutes})


class Run:
    """The files that a run writes while it trains.

    Args:
        out: folder of the checkpoint.
        side_files: folder of its files beside the weights.
        saves: of the state.
        held_out: windows that the held-out loss is measured on.
        training: entries of training.json that do not change during the run.
        curve_before: rows of the loss curves of the stages before this run.
    """

    def __init__(
        self,
        out: Path,
        side_files: Path,
        saves: Saves,
        cfg: ModelConfig,
        held_out: np.ndarray,
        training: dict[str, Any],
        curve_before: list[dict[str, float]],
    ):
        self.out, self.side_files, self.saves, self.cfg = out, side_files, saves, cfg
        self.training, self.curve_before = training, curve_before
        self.graph, _ = computed_in(cfg, "float32")
        self.held_out = jnp.asarray(held_out)
        self.loss = jax.jit(self._held_out_loss)

    def _held_out_loss(self, params: Any) -> Array:
        """Return nats a token on the held-out windows: of the trunk, or the mean of the MTP steps if it is frozen."""
        plan = self.saves.plan
        if plan.frozen_trunk:
            tokens = self.held_out[:, : ROWS + 1 + plan.mtp_steps]
            _, parts = objective(self.cfg, replace(plan, dtype="float32"), params, tokens)
            return jnp.mean(jnp.stack([parts[f"mtp{step + 1}"] for step in range(plan.mtp_steps)]))
        return window_loss(self.graph, params, self.held_out[:, : ROWS + 1]) / (len(self.held_out) * ROWS)

    def save(self, state: dict[str, Any], progress: Progress) -> None:
        """Save state, curve and checkpoint.

        The checkpoint has the last weights or their moving average, whichever has the lower held-out loss.
        """
        plan = self.saves.plan
        last, ema = (float(self.loss(state[name])) for name in ("params", "ema"))
        name = "held_out_mtp" if plan.frozen_trunk else "held_out"
        if progress.rows:
            progress.rows[-1] |= {name: last, f"{name}_ema": ema}
        self.saves.save(state, progress)
        training = asdict(plan) | {
            "done_steps": progress.step,
            "tokens": progress.step * plan.batch * ROWS,
            "seconds": round(progress.seconds),
            "threads": os.cpu_count(),
            "weights": "ema" if ema < last else "last",
        }
        (self.side_files / "training.json").write_text(json.dumps(training | self.training, indent=2) + "\n")
        write_curve(self.side_files, progress.rows, self.curve_before)
        model = LoadedModel(self.cfg, self.graph, state["ema" if ema < last else "params"])
        export(self.out, model, self.side_files)
        module = "MTP head" if plan.frozen_trunk else "trunk"
        print(f"saved: {module} on held-out books {last:.3f} nats a token, {ema:.3f} with averaged weights", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    out: Path = args.out.resolve()
    if args.like:
        return train_like(args.like, ["--books", str(args.books), *["--resume"][: args.resume]], out)
    documents = data.read_all(args.books)
    if args.manifest:
        data.check_manifest(documents, args.manifest)
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise SystemExit(f"{out}: holds files that are not a tiny model. Choose another --out.")
    plan = make_plan(args)
    saves = Saves(out.with_name(f".{out.name}.state"), plan)
    side_files = out.with_name(f".{out.name}.side")
    shutil.rmtree(side_files, ignore_errors=True)
    side_files.mkdir(parents=True)
    tokens, held_out, cfg = prepare(documents, side_files, args.layers, args.without)
    state, progress = first_state(args, cfg, plan), Progress()
    if not args.resume:
        saves.clear()
    elif found := saves.latest(state):
        state, progress = found
        print(f"resumed after step {progress.step}", flush=True)
    else:
        print(f"{saves.folder}: nothing saved yet; starting from the beginning", flush=True)
    training = {"training_tokens": len(tokens), "without": args.without} | history(args) | {"layers": cfg.num_layers}
    run = Run(out, side_files, saves, cfg, held_out, training, read_curve(args.start) if args.start else [])
    size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    print(f"{len(tokens):,} training tokens, {len(documents)} texts; {size:,} parameters", flush=True)

    before_seconds, began = progress.seconds, time.monotonic()
    first: list[float] = []  # when the first step ended: compilation does not count as training

    def done(step: int) -> float:
        if plan.steps is not None:
            return step / plan.steps
        return progress.seconds / (60 * (plan.minutes or 1.0))

    saved, recent = began, []
    begin = state
    for state, parts in train(cfg, begin, tokens, plan, done, progress.step):
        now = time.monotonic()
        if not first:
            first.append(now)
            print(f"first step after {now - began:.0f} s", flush=True)
        progress.step += 1
        progress.seconds = before_seconds + now - first[0]
        recent.append(parts)
        if progress.step % SHOW_STEPS == 0:
            row = {name: float(np.mean([step_parts[name] for step_parts in recent])) for name in parts}
            about = {
                "step": progress.step,
                "tokens": progress.step * plan.batch * ROWS,
                "seconds": round(progress.seconds, 1),
            }
            progress.rows.append(about | row)
            recent = []
            shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "rate")
            print(f"step {progress.step:5}  {progress.seconds:6.0f} s  {shown}", flush=True)
            if now - saved > SAVE_SECONDS:
                run.save(state, progress)
                saved = time.monotonic()
    if not progress.step:
        raise SystemExit("--minutes or --steps leaves no time for a single step.")
    run.save(state, progress)
    shutil.rmtree(side_files)
    saves.clear()
    print(
        f"{out}: {progress.step} steps, {progress.step * plan.batch * ROWS:,} tokens in {progress.seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
