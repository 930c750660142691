"""Train the embedded model: a Qwen3.5-MoE of about five million parameters with its MTP head, on books, Python and talk.

    python scripts/train_tiny.py --books DIR --out DIR [--minutes 30] [--seed 0]
    python scripts/train_tiny.py --books DIR --out DIR --manifest checkpoints/tiny/manifest.json   # the very same texts
    python scripts/train_tiny.py --books DIR --out DIR --like checkpoints/tiny   # the very same model: texts, steps, stages
    python scripts/tiny_report.py --books DIR --model DIR   # measures it, writes its README.md

It trains the modules that serve; tiny_loss.py has the objective. A run saves itself every few minutes beside --out and
goes on from there with --resume.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from checkpoints import open_checkpoint, write_safetensors_directory
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.loading import load_checkpoint
from mtpjax.model import abstract_model
from mtpjax.orbax_tree import TreePath
from mtpjax.weights import LoadedModel, export_tensors, fill, flat, random_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_data as data
from tiny_loss import MTP_WEIGHTS, ROWS, losses, spread_gains, window_loss
from tiny_state import Plan, Progress, Saves, write_curve

WEIGHT_DECAY, CLIP = 0.1, 1.0
SHOW_STEPS, SAVE_SECONDS = 20, 300.0
HELD_OUT_WINDOWS = 32  # read at every save
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


LAYERS = 8


def tiny_config(vocab: int, stop_tokens: tuple[int, ...], layers: int = LAYERS) -> ModelConfig:
    """The shape of the embedded model: every part of Qwen3.5-MoE, small."""
    return ModelConfig(
        hidden_size=256, layers=layers, pattern=(LINEAR, LINEAR, LINEAR, FULL), q_heads=4, kv_heads=2, head_dim=64,
        rotary_dim=16, rope_theta=1e7, linear_k_heads=2, linear_v_heads=4, linear_k_dim=64, linear_v_dim=64,
        conv_width=4, vocab_size=vocab, experts=8, experts_per_token=2, expert_size=64, shared_expert_size=128,
        tied_embeddings=True, max_position=2048, stop_tokens=stop_tokens,
    )  # fmt: skip


def _name(path: tuple[Any, ...]) -> str:
    return next(name for key in reversed(path) if (name := getattr(key, "key", None)))


def decayed(params: Any) -> Any:
    """True for the leaves that decay: matrices, not norms, taps or decay rates."""

    def is_matrix(path: tuple[Any, ...], leaf: Array) -> bool:
        return not (_name(path).endswith("norm") or _name(path) in ("conv", "a_log", "dt_bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def orthogonalised(params: Any) -> Any:
    """The two axes of each matrix that Muon orthogonalises; None for what Adam trains: vectors, embedding, router, gates.

    Stacked layers and experts are matrices of their own.
    """
    adam = ("embedding", "head", "router", "shared_gate", "in_a", "in_b")

    def axes(path: tuple[Any, ...], leaf: Array, decays: bool) -> Any:
        muon = decays and _name(path) not in adam
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2) if muon else None

    return jax.tree_util.tree_map_with_path(axes, params, decayed(params))


@cache
def optimizer(name: str) -> optax.GradientTransformation:
    """ "muon" or "adamw", without the rate, which each step is given.

    Muon (Jordan 2024) in the scaling of Moonlight (Liu et al. 2025), whose updates are as large as AdamW's.
    """
    if name == "adamw":
        rest = optax.adamw(1.0, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY, mask=decayed)
    else:
        rest = optax.contrib.muon(
            1.0, muon_weight_dimension_numbers=orthogonalised, consistent_rms=0.2, weight_decay=WEIGHT_DECAY,
            adam_b1=0.9, adam_b2=0.95,
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(CLIP), rest)


@cache
def computed_in(cfg: ModelConfig, dtype: str) -> tuple[Any, Any]:
    """Graph and leaves of the model that computes in `dtype`; the parameters that are trained stay float32."""
    return nnx.split(abstract_model(cfg, DTYPES[dtype], stack=1))


def objective(cfg: ModelConfig, plan: Plan, params: Any, tokens: Int[Array, "B T"]) -> tuple[Array, dict[str, Array]]:
    """`losses` in the plan's dtype."""
    graph, like = computed_in(cfg, plan.dtype)
    return losses(graph, cfg, jax.tree.map(lambda p, to: p.astype(to.dtype), params, like), tokens, plan.mtp_steps)


@partial(jax.jit, static_argnames=("cfg", "plan"), donate_argnames=("state",))
def train_step(
    state: dict[str, Any], tokens: Int[Array, "B T"], rate: Float[Array, ""], *, cfg: ModelConfig, plan: Plan
) -> tuple[dict[str, Any], dict[str, Array]]:
    """One step. `state` has "params", their moving average "ema" and "optimizer". Returns it and the parts of the loss."""
    params = state["params"]
    parts_of = tokens.reshape(plan.accumulate, -1, tokens.shape[1])
    gradient = jax.value_and_grad(partial(objective, cfg, plan), has_aux=True)

    def add(total: Any, some: Array) -> tuple[Any, None]:
        (_, parts), grads = gradient(params, some)
        return jax.tree.map(lambda t, new: t + new / plan.accumulate, total, (grads, parts)), None

    if plan.accumulate == 1:
        (_, parts), grads = gradient(params, tokens)
    else:
        shapes = jax.eval_shape(gradient, params, parts_of[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0][1]))
        (grads, parts), _ = jax.lax.scan(add, zeros, parts_of)
    updates, inner = optimizer(plan.optimizer).update(grads, state["optimizer"], params)
    params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    ema = jax.tree.map(lambda old, new: plan.ema * old + (1 - plan.ema) * new, state["ema"], params)
    return {"params": params, "ema": ema, "optimizer": inner}, parts


def new_state(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    return {
        "params": model.params,
        "ema": jax.tree.map(jnp.copy, model.params),
        "optimizer": optimizer(plan.optimizer).init(model.params),
    }


def rate_at(plan: Plan, step: int, done: float) -> float:
    """The learning rate of a step (counted from 0) when `done` of the run, 0...1, is over."""
    return plan.rate * min(1.0, (step + 1) / plan.warm_up) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * done)))


def train(
    cfg: ModelConfig, state: dict[str, Any], tokens: np.ndarray, plan: Plan, done: Callable[[int], float], first: int = 0
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Yield the state and the parts of the loss after each step from `first` on, until `done(step)` is 1.

    The given and the yielded states are donated to the next step: what is to be kept must be copied.
    """
    width = ROWS + 1 + plan.mtp_steps
    order = data.batches(tokens, plan.batch, width, ROWS, plan.seed)
    for step, window in enumerate(itertools.islice(order, first, None), first):
        if (share := done(step)) >= 1.0:
            return
        rate = rate_at(plan, step, share)
        state, parts = train_step(state, jnp.asarray(window), jnp.float32(rate), cfg=cfg, plan=plan)
        yield state, {"rate": rate} | {name: float(part) for name, part in parts.items()}


def _as_dtype(read: Callable[[], np.ndarray], dtype: np.dtype) -> np.ndarray:
    return read().astype(dtype)


def export(out: Path, model: LoadedModel, side_files: Path) -> None:
    """Replace `out` by the checkpoint of `model` in BF16, with every file of `side_files`.

    As published, the decay rates and the norm behind DeltaNet stay float32.
    """

    def tensors() -> Iterator[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]:
        for name, shape, _, read in export_tensors(model, 1):
            wide = name.endswith(("A_log", "linear_attn.norm.weight"))
            dtype = np.dtype(np.float32 if wide else ml_dtypes.bfloat16)
            yield name, shape, dtype, partial(_as_dtype, read, dtype)

    stops = list(model.cfg.stop_tokens)
    new, old = (out.with_name(f".{out.name}.{what}") for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    write_safetensors_directory(
        new, model.cfg.to_hf() | {"dtype": "bfloat16"}, tensors(),
        generation_config={"eos_token_id": stops, "pad_token_id": stops[1]}, extra_files=sorted(side_files.iterdir()),
    )  # fmt: skip
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    new.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def prepare(documents: list[data.Document], side_files: Path, layers: int = LAYERS) -> tuple[np.ndarray, np.ndarray, ModelConfig]:
    """Train the tokenizer and write all but the weights. Returns the tokens to train on, some held-out windows, the config."""
    training = [document for document in documents if document.split == "train"]
    tokenizer = data.train_tokenizer(document.text for document in training)
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
    spread = data.windows(held_out, ROWS + 1, max(ROWS, len(held_out) // HELD_OUT_WINDOWS))[:HELD_OUT_WINDOWS]
    return data.pack(training, tokenizer), spread, cfg


def stages(spent: dict[str, Any]) -> list[list[str]]:
    """The options of each run that led to a `training.json`, the first one first."""
    names = ("layers", "steps", "batch", "accumulate", "rate", "optimizer", "mtp_steps", "ema", "dtype", "seed")
    given = {name: spent["done_steps" if name == "steps" else name] for name in names}
    own = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [*(stages(spent["start"]) if "start" in spent else []), own]


def train_like(model: Path, argv: list[str], out: Path) -> None:
    """All runs that led to the checkpoint `model`, on its own texts; those before the last go beside `out`."""
    runs = stages(json.loads((model / "training.json").read_text()))
    start: list[str] = []
    for number, run in enumerate(runs, 1):
        here = out if number == len(runs) else out.with_name(f"{out.name}.stage{number}")
        print(f"stage {number} of {len(runs)}: {' '.join(run)}", flush=True)
        done = here / "training.json"
        if "--resume" in argv and done.is_file() and stages(json.loads(done.read_text()))[number - 1] == run:
            print(f"{here}: is done", flush=True)
        else:
            main([*argv, "--out", str(here), "--manifest", str(model / "manifest.json"), *run, *start])
        start = ["--start", str(here)]


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
        parser.error(f"--layers {args.layers} is not 4, 8, 12, ...: whole repeats of three DeltaNet layers and one of attention.")
    if args.accumulate < 1 or args.batch % args.accumulate:
        parser.error(f"--accumulate {args.accumulate} does not divide --batch {args.batch}.")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    given = {field.name: getattr(args, field.name) for field in fields(Plan) if hasattr(args, field.name)}
    return replace(Plan(), **given | {"dtype": dtype, "minutes": None if args.steps else args.minutes})


def stacked(model: LoadedModel, layers: int) -> LoadedModel:
    """The model with its layers repeated in order until there are `layers`: a deeper one that need not learn from nothing.

    Depth-wise stacking as in Du et al. 2024 ("Stacking Your Transformers"). The MTP head stays as it is.
    """
    cfg = replace(model.cfg, layers=layers)
    graph, params = nnx.split(abstract_model(cfg, jnp.float32, stack=1))
    given = flat(model.params)

    def take(path: TreePath, leaf: Any) -> Array:
        if path[:2] == ("decoder", "blocks"):
            path = (*path[:2], int(path[2]) % model.cfg.repeats, *path[3:])
        return jnp.copy(given[path])

    return LoadedModel(cfg, graph, fill(params, take))


def first_state(args: argparse.Namespace, cfg: ModelConfig, plan: Plan) -> dict[str, Any]:
    """Random weights with spread gains, or those of --start."""
    if args.start is None:
        return new_state(spread_gains(random_model(cfg, seed=plan.seed), plan.seed), plan)
    start = load_checkpoint(open_checkpoint(args.start), dtype=jnp.float32)
    if replace(start.cfg, layers=cfg.layers) == cfg and cfg.layers % start.cfg.layers == 0:
        start = stacked(start, cfg.layers)
    if start.cfg != cfg:
        raise SystemExit(f"--start {args.start}: another model than the one trained here:\n{start.cfg}\n{cfg}")
    return new_state(start, plan)


class Run:
    """One run of the script: what is written while it trains."""

    def __init__(self, out: Path, side_files: Path, saves: Saves, cfg: ModelConfig, held_out: np.ndarray, spent: dict):  # type: ignore[type-arg]
        self.out, self.side_files, self.saves, self.cfg, self.spent = out, side_files, saves, cfg, spent
        self.graph, _ = computed_in(cfg, "float32")
        self.held_out = jnp.asarray(held_out)
        self.loss = jax.jit(partial(window_loss, self.graph))

    def save(self, state: dict[str, Any], progress: Progress) -> None:
        """State, curve and checkpoint; the weights or their moving average, whichever reads the held-out windows better."""
        count = self.held_out.shape[0] * (self.held_out.shape[1] - 1)
        last, ema = (float(self.loss(state[name], self.held_out)) / count for name in ("params", "ema"))
        if progress.rows:
            progress.rows[-1] |= {"held_out": last, "held_out_ema": ema}
        self.saves.save(state, progress)
        plan = self.saves.plan
        spent = asdict(plan) | {
            "done_steps": progress.step, "tokens": progress.step * plan.batch * ROWS, "seconds": round(progress.seconds),
            "threads": os.cpu_count(), "weights": "ema" if ema < last else "last",
        }  # fmt: skip
        (self.side_files / "training.json").write_text(json.dumps(spent | self.spent, indent=2) + "\n")
        write_curve(self.side_files, progress.rows)
        model = LoadedModel(self.cfg, self.graph, state["ema" if ema < last else "params"])
        export(self.out, model, self.side_files)
        print(f"saved: held-out books {last:.3f} nats a token, {ema:.3f} with averaged weights", flush=True)


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
    tokens, held_out, cfg = prepare(documents, side_files, args.layers)
    state, progress = first_state(args, cfg, plan), Progress()
    if not args.resume:
        saves.clear()
    elif found := saves.latest(state):
        state, progress = found
        print(f"resumed after step {progress.step}", flush=True)
    else:
        print(f"{saves.folder}: nothing saved yet; starting anew", flush=True)
    spent: dict[str, Any] = {"training_tokens": len(tokens)}
    if args.start and (before := args.start / "training.json").is_file():
        spent["start"] = json.loads(before.read_text())
    spent["layers"] = cfg.layers
    run = Run(out, side_files, saves, cfg, held_out, spent)
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
            about = {"step": progress.step, "tokens": progress.step * plan.batch * ROWS, "seconds": round(progress.seconds, 1)}
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
    print(f"{out}: {progress.step} steps, {progress.step * plan.batch * ROWS:,} tokens in {progress.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
