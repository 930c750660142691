"""Train the embedded model: a Qwen3.5-MoE of about five million parameters with its MTP head, on books, Python and talk.

    python -m scripts.tiny_model.train --books DIR --out DIR [--minutes 30] [--seed 0]
    python -m scripts.tiny_model.train --books DIR --out DIR --manifest checkpoints/tiny/manifest.json   # the very same texts
    python -m scripts.tiny_model.train --books DIR --out DIR --like checkpoints/tiny   # the very same model: texts, steps, stages
    python -m scripts.tiny_model.report --books DIR --model DIR   # measures it, writes its README.md

It trains the modules that serve; tiny_loss.py has the objective. A run saves itself every few minutes beside --out and
goes on from there with --resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from checkpoints import write_safetensors_directory
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.loading.loaded_model import LoadedModel
from scripts.tiny_model import data
from scripts.tiny_model.loss import MTP_WEIGHTS, ROWS, window_loss
from scripts.tiny_model.start import first_state, history
from scripts.tiny_model.state import Plan, Progress, Saves, read_curve, write_curve
from scripts.tiny_model.steps import DTYPES, computed_in, objective, train

SHOW_STEPS, SAVE_SECONDS = 20, 300.0
HELD_OUT_WINDOWS = 32  # read at every save
LAYERS = 8
ADVISED = {"do_sample": True, "temperature": 0.7, "min_p": 0.05, "presence_penalty": 1.5}


def tiny_config(vocab: int, stop_tokens: tuple[int, ...], layers: int = LAYERS) -> ModelConfig:
    """The shape of the embedded model: every part of Qwen3.5-MoE, small."""
    return ModelConfig(
        hidden_size=256, num_layers=layers, layer_pattern=(LINEAR, LINEAR, LINEAR, FULL), q_heads=4, kv_heads=2, head_dim=64,
        rotary_dim=16, rope_theta=1e7, linear_k_heads=2, linear_v_heads=4, linear_k_dim=64, linear_v_dim=64,
        conv_width=4, vocab_size=vocab, num_experts=8, experts_per_token=2, expert_size=64, shared_expert_size=128,
        tied_embeddings=True, max_position=2048, stop_token_ids=stop_tokens,
    )  # fmt: skip


def _as_dtype(read: Callable[[], np.ndarray], dtype: np.dtype) -> np.ndarray:
    return read().astype(dtype)


def export(out: Path, model: LoadedModel, side_files: Path) -> None:
    """Replace `out` by the checkpoint of `model` in BF16, with every file of `side_files`.

    As published, the decay rates and the norm behind DeltaNet stay float32.
    """

    def tensors() -> Iterator[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]:
        for name, shape, _, read in export_tensors(model):
            wide = name.endswith(("A_log", "linear_attn.norm.weight"))
            dtype = np.dtype(np.float32 if wide else ml_dtypes.bfloat16)
            yield name, shape, dtype, partial(_as_dtype, read, dtype)

    stops = list(model.cfg.stop_token_ids)
    new, old = (out.with_name(f".{out.name}.{what}") for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    write_safetensors_directory(
        new, config_to_hf(model.cfg) | {"dtype": "bfloat16"}, tensors(),
        generation_config={"eos_token_id": stops, "pad_token_id": stops[1], **ADVISED}, extra_files=sorted(side_files.iterdir()),
    )  # fmt: skip
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    new.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def to_train_on(
    documents: list[data.Document], without: Sequence[str]
) -> tuple[list[data.Document], list[data.Document]]:
    """The texts of the tokenizer and those of the model.

    The tokenizer reads all but the small talk, whose few words it would learn by heart, whatever is left `without`: weights
    that one run starts from must mean the same tokens.
    """
    training = [document for document in documents if document.split == "train"]
    if unknown := set(without) - {document.name for document in training}:
        raise SystemExit(
            f"--without {min(unknown)!r}: no text to train on has this name. manifest.json lists the names."
        )
    return [d for d in training if d.name != data.SMALL_TALK], [d for d in training if d.name not in without]


def prepare(
    documents: list[data.Document], side_files: Path, layers: int = LAYERS, without: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, ModelConfig]:
    """Train the tokenizer and write all but the weights. Returns the tokens to train on, some held-out windows, the config."""
    tokenized, training = to_train_on(documents, without)
    tokenizer = data.train_tokenizer(document.text for document in tokenized)
    ids = {name: tokenizer.token_to_id(name) for name in data.SPECIAL}
    cfg = tiny_config(tokenizer.get_vocab_size(), (ids["<|im_end|>"], ids["<|endoftext|>"]), layers)
    tokenizer.save(str(side_files / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False, "model_max_length": cfg.max_position, "chat_template": data.CHAT_TEMPLATE,
    }  # fmt: skip
    (side_files / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    listed = data.manifest(documents, cfg, ids)
    (side_files / "manifest.json").write_text(json.dumps(listed, indent=1) + "\n")
    data.write_json_lines(side_files / "prompts.jsonl", data.demo_prompts(documents))
    held_out = data.pack([d for d in documents if d.split == "held-out" and d.domain == "books"], tokenizer)
    width = ROWS + 1 + len(MTP_WEIGHTS)
    spread = data.windows(held_out, width, max(ROWS, len(held_out) // HELD_OUT_WINDOWS))[:HELD_OUT_WINDOWS]
    return data.pack(training, tokenizer), spread, cfg


def stages(spent: dict[str, Any]) -> list[list[str]]:
    """The options of each run that led to a `training.json`, the first one first."""
    names = ("layers", "steps", "batch", "accumulate", "rate", "optimizer", "mtp_steps", "ema", "dtype", "seed")
    given = {name: spent["done_steps" if name == "steps" else name] for name in names}
    own = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    own += [part for name in spent["without"] for part in ("--without", name)]
    own += ["--frozen-trunk"] * spent["frozen_trunk"] + (["--share", str(spent["share"])] if "share" in spent else [])
    return [*(stages(spent["start"]) if "start" in spent else []), own]


def train_like(model: Path, argv: list[str], out: Path) -> None:
    """All runs that led to the checkpoint `model`, on its own texts; those before the last go beside `out`."""
    runs = stages(json.loads((model / "training.json").read_text()))
    folders = [*(out.with_name(f"{out.name}.stage{number}") for number in range(1, len(runs))), out]
    for number, (run, here) in enumerate(zip(runs, folders, strict=True)):
        print(f"stage {number + 1} of {len(runs)}: {' '.join(run)}", flush=True)
        done = here / "training.json"
        if "--resume" in argv and done.is_file() and stages(json.loads(done.read_text()))[number] == run:
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
        "--like", type=Path, help="train again what is in this folder; only --books, --out and --resume count beside it"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last save of the same command")
    parser.add_argument(
        "--start", type=Path,
        help="weights to begin with; a model of fewer layers is stacked. The optimiser and the rate begin anew",
    )  # fmt: skip
    parser.add_argument(
        "--average",
        type=Path,
        help="begin between the weights of --start and those in this folder, where that run started",
    )
    parser.add_argument("--share", type=float, default=0.5, help="with --average: the share of --start (%(default)s)")
    parser.add_argument(
        "--without", action="append", default=[], metavar="NAME",
        help="leave a text out, by its name in manifest.json; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--frozen-trunk", action="store_true", help="train the MTP head alone; the trunk stays as --start has it"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the trunk, a multiple of 4 (%(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time, start-up not counted")
    parser.add_argument("--steps", type=int, help="train for this many steps instead, whatever the time")
    parser.add_argument("--batch", type=int, default=default["batch"], help=f"windows of {ROWS} tokens a step")
    parser.add_argument("--accumulate", type=int, default=1, help="read a batch in this many parts, to save memory")
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


def plan_of(args: argparse.Namespace) -> Plan:
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    given = {field.name: getattr(args, field.name) for field in fields(Plan) if hasattr(args, field.name)}
    return replace(Plan(), **given | {"dtype": dtype, "minutes": None if args.steps else args.minutes})


class Run:
    """One run of the script: what is written while it trains."""

    def __init__(
        self, out: Path, side_files: Path, saves: Saves, cfg: ModelConfig, held_out: np.ndarray, spent: dict[str, Any],
        before: list[dict[str, float]],
    ):  # fmt: skip
        self.out, self.side_files, self.saves, self.cfg = out, side_files, saves, cfg
        self.spent, self.before = spent, before
        self.graph, _ = computed_in(cfg, "float32")
        self.held_out = jnp.asarray(held_out)
        self.loss = jax.jit(self._held_out_loss)

    def _held_out_loss(self, params: Any) -> Array:
        """Nats a token on the held-out windows: of the trunk, or, where it is frozen, the mean of the MTP steps."""
        plan = self.saves.plan
        if plan.frozen_trunk:
            _, parts = objective(
                self.cfg, replace(plan, dtype="float32"), params, self.held_out[:, : ROWS + 1 + plan.mtp_steps]
            )
            return jnp.mean(jnp.stack([parts[f"mtp{step + 1}"] for step in range(plan.mtp_steps)]))
        return window_loss(self.graph, params, self.held_out[:, : ROWS + 1]) / (len(self.held_out) * ROWS)

    def save(self, state: dict[str, Any], progress: Progress) -> None:
        """State, curve and checkpoint; the weights or their moving average, whichever reads the held-out windows better."""
        plan = self.saves.plan
        last, ema = (float(self.loss(state[name])) for name in ("params", "ema"))
        name = "held_out_mtp" if plan.frozen_trunk else "held_out"
        if progress.rows:
            progress.rows[-1] |= {name: last, f"{name}_ema": ema}
        self.saves.save(state, progress)
        spent = asdict(plan) | {
            "done_steps": progress.step, "tokens": progress.step * plan.batch * ROWS, "seconds": round(progress.seconds),
            "threads": os.cpu_count(), "weights": "ema" if ema < last else "last",
        }  # fmt: skip
        (self.side_files / "training.json").write_text(json.dumps(spent | self.spent, indent=2) + "\n")
        write_curve(self.side_files, progress.rows, self.before)
        model = LoadedModel(self.cfg, self.graph, state["ema" if ema < last else "params"])
        export(self.out, model, self.side_files)
        what = "MTP head" if plan.frozen_trunk else "trunk"
        print(f"saved: {what} on held-out books {last:.3f} nats a token, {ema:.3f} with averaged weights", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    out: Path = args.out.resolve()
    if args.like:
        return train_like(args.like, ["--books", str(args.books), *["--resume"][: args.resume]], out)
    documents = data.read_all(args.books)
    if args.manifest:
        data.check_manifest(documents, args.manifest)
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise SystemExit(f"{out}: holds something else than a tiny model. Choose another --out.")
    plan = plan_of(args)
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
        print(f"{saves.folder}: nothing saved yet; starting anew", flush=True)
    spent = {"training_tokens": len(tokens), "without": args.without} | history(args) | {"layers": cfg.num_layers}
    run = Run(out, side_files, saves, cfg, held_out, spent, read_curve(args.start) if args.start else [])
    size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    print(f"{len(tokens):,} training tokens, {len(documents)} texts; {size:,} parameters", flush=True)

    before_seconds, began = progress.seconds, time.monotonic()
    first: list[float] = []  # end of the first step here: compiling is not training

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
            row = {name: float(np.mean([some[name] for some in recent])) for name in parts}
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
