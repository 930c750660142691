"""Train the embedded model: a Qwen3.5-MoE of about five million parameters with its MTP head, on children's books.

    python scripts/train_tiny.py --books DIR --out DIR [--minutes 30] [--seed 0]
    python scripts/tiny_report.py --books DIR --model DIR   # measures it, writes its README.md

It trains the modules that serve. The MTP head is trained as it drafts: step 1 reads the trunk's hidden states, each
further step its own output, all with the true next token. Its target is the trunk's own distribution, because a draft
counts when it is the trunk's choice, whatever the book says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

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
from mtpjax.cache import BLOCK, new_cache
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.loading import load_checkpoint
from mtpjax.model import Placement, place
from mtpjax.model.moe import Moe
from mtpjax.weights import LoadedModel, export_tensors, random_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_data as data

ROWS = BLOCK  # tokens of a training window: one block of attention
MTP_WEIGHTS = (0.3, 0.15, 0.1, 0.07)  # of the losses of MTP steps 1, 2, 3, 4
GAIN_SPREAD = 0.7  # standard deviation of log(1 + w) in the norms before the LM head, at the start
BALANCE_WEIGHT, WEIGHT_DECAY, WARM_UP, CLIP = 0.01, 0.1, 100, 1.0
SAVE_SECONDS = 300.0


def tiny_config(vocab: int, stop_tokens: tuple[int, ...]) -> ModelConfig:
    """The shape of the embedded model: every part of Qwen3.5-MoE, small."""
    return ModelConfig(
        hidden_size=256, layers=4, pattern=(LINEAR, LINEAR, LINEAR, FULL), q_heads=4, kv_heads=2, head_dim=64,
        rotary_dim=16, rope_theta=1e7, linear_k_heads=2, linear_v_heads=4, linear_k_dim=64, linear_v_dim=64,
        conv_width=4, vocab_size=vocab, experts=8, experts_per_token=2, expert_size=64, shared_expert_size=128,
        tied_embeddings=True, max_position=2048, stop_tokens=stop_tokens,
    )  # fmt: skip


def cross_entropy(logits: Float[Array, "B T V"], target: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean over rows, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, target))


def distillation(logits: Float[Array, "B T V"], target: Float[Array, "B T V"]) -> Float[Array, ""]:
    """Mean over rows of the cross entropy with `softmax(target)`, in nats; no gradient enters the target."""
    return jnp.mean(optax.softmax_cross_entropy(logits, jax.nn.softmax(jax.lax.stop_gradient(target))))


def spread_gains(model: LoadedModel, seed: int) -> LoadedModel:
    """Log-normal gains in the two norms whose output the MTP head reads, the final one and its own.

    Those of published checkpoints are far from uniform. Uniform gains, where training starts and nearly stays at this
    size, would hide from every measurement whether the head is fed before or after them: it normalises what it reads.
    """

    places = ("norm", "mtp.norm")

    def spread(path: tuple[Any, ...], leaf: Array) -> Array:
        place = ".".join(str(getattr(key, "key", "")) for key in path).strip(".")
        if place not in places:
            return leaf
        rng = np.random.default_rng([seed, places.index(place)])
        return jnp.asarray(np.expm1(rng.normal(0.0, GAIN_SPREAD, leaf.shape)), leaf.dtype)

    return replace(model, params=jax.tree_util.tree_map_with_path(spread, model.params))


def balance(p: Float[Array, "N E"], chosen: Int[Array, "N K"]) -> Float[Array, ""]:
    """The load-balancing loss of Switch Transformer (Fedus et al. 2021, eq. 4): 1 when every expert gets as much."""
    experts = p.shape[1]
    share = jnp.mean(jax.nn.one_hot(chosen, experts), axis=(0, 1))
    return experts * jnp.sum(share * jnp.mean(p, axis=0))


def recording(seen: list[Array]) -> Any:
    """While this patch is on, `Moe.route` leaves its balance loss in `seen`: the model itself returns none.

    Layers of a stack of one are unrolled, so the values belong to the trace that called the model.
    """
    route = Moe.route

    def recorded(self: Moe, x: Array) -> tuple[Array, Array, Array]:
        weights, chosen, p = route(self, x)
        seen.append(balance(p, chosen))
        return weights, chosen, p

    return mock.patch.object(Moe, "route", recorded)


def fresh(cfg: ModelConfig, batch: int) -> tuple[Any, Placement]:
    """An empty cache and the placement of `ROWS` rows in it; the static block count makes attention differentiable."""
    zeros = jnp.zeros(batch, jnp.int32)
    return new_cache(cfg, batch, ROWS), place(cfg, zeros, ROWS, zeros, slots=ROWS, blocks=1)


def losses(
    graph: Any, cfg: ModelConfig, params: Any, tokens: Int[Array, "B T"], steps: int
) -> tuple[Array, dict[str, Array]]:
    """The loss of windows of `ROWS + 1 + steps` tokens, and its parts: "lm", "mtp1"..., "balance"."""
    seen: list[Array] = []
    model = nnx.merge(graph, params)
    cache, where = fresh(cfg, tokens.shape[0])
    with recording(seen):
        y, cache = model.trunk(tokens[:, :ROWS], cache, where)
        hidden = model.final_norm(y)
        trunk = model.head(hidden)
        parts = {"lm": cross_entropy(trunk, tokens[:, 1 : ROWS + 1])}
        for step in range(1, steps + 1):
            # Row t of step s: its hidden state knows the tokens up to t + s - 1, reads t + s and predicts t + s + 1.
            # RoPE counts distances only, so the rows may stay at position t. Each further step has half the windows.
            # The trunk predicts that token at row t + s, which the last s rows of a window lack.
            some = max(1, tokens.shape[0] >> step - 1)
            cache, where = fresh(cfg, some)
            hidden, _ = model.mtp_step(hidden[:some], tokens[:some, step : ROWS + step], cache, where)
            parts[f"mtp{step}"] = distillation(model.mtp_head(hidden[:, :-step]), trunk[:some, step:])
    parts["balance"] = jnp.mean(jnp.stack(seen))
    weights = {"lm": 1.0, "balance": BALANCE_WEIGHT} | {f"mtp{s + 1}": w for s, w in enumerate(MTP_WEIGHTS)}
    return sum((weights[name] * part for name, part in parts.items()), jnp.zeros(())), parts


def decayed(params: Any) -> Any:
    """True for the leaves that decay: matrices, not norms, taps or decay rates."""

    def is_matrix(path: tuple[Any, ...], leaf: Array) -> bool:
        names = [str(getattr(key, "key", "")) for key in path]
        return not any(name.endswith("norm") or name in ("conv", "a_log", "dt_bias") for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


@dataclass(frozen=True)
class Plan:
    """How to train. `rate` is the peak of the learning rate, reached after `WARM_UP` steps; it falls as a cosine."""

    batch: int = 4
    rate: float = 2.5e-3
    mtp_steps: int = 3
    seed: int = 0


def optimizer() -> optax.GradientTransformation:
    """AdamW without its rate, which each step is given."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=decayed),
    )


@partial(jax.jit, static_argnames=("graph", "cfg", "mtp_steps"), donate_argnames=("params", "state"))
def train_step(
    params: Any, state: Any, tokens: Int[Array, "B T"], rate: Array, *, graph: Any, cfg: ModelConfig, mtp_steps: int
) -> tuple[Any, Any, dict[str, Array]]:
    """One step of `optimizer()`, whose state is `state`. Returns parameters, state and the parts of the loss."""
    (_, parts), grads = jax.value_and_grad(losses, argnums=2, has_aux=True)(graph, cfg, params, tokens, mtp_steps)
    updates, state = optimizer().update(grads, state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, parts


def train(
    model: LoadedModel, tokens: np.ndarray, plan: Plan, progress: Callable[[int], float]
) -> Iterator[tuple[LoadedModel, dict[str, float]]]:
    """Yield the model and the parts of the loss after each step, until `progress(step)` is 1.

    The given and the yielded parameters are donated to the next step: what is to be kept must be copied.
    """
    params, state = model.params, optimizer().init(model.params)
    static = {"graph": model.graph, "cfg": model.cfg, "mtp_steps": plan.mtp_steps}
    width = ROWS + 1 + plan.mtp_steps
    for number, window in enumerate(data.batches(tokens, plan.batch, width, ROWS, plan.seed)):
        done = progress(number)
        if done >= 1.0:
            return
        rate = plan.rate * min(1.0, (number + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * done)))
        params, state, parts = train_step(params, state, jnp.asarray(window), jnp.float32(rate), **static)
        yield replace(model, params=params), {name: float(part) for name, part in parts.items()}


def _as_dtype(read: Callable[[], np.ndarray], dtype: np.dtype) -> np.ndarray:
    return read().astype(dtype)


def save(out: Path, model: LoadedModel, side_files: Path) -> None:
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


def prepare(books: list[data.Book], side_files: Path) -> tuple[np.ndarray, ModelConfig]:
    """Train the tokenizer and write all but the weights. Returns the training tokens and the config."""
    training = [book for book in books if book.split == "train"]
    tokenizer = data.train_tokenizer(book.text for book in training)
    ids = {name: tokenizer.token_to_id(name) for name in data.SPECIAL}
    cfg = tiny_config(tokenizer.get_vocab_size(), (ids["<|im_end|>"], ids["<|endoftext|>"]))
    tokenizer.save(str(side_files / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False, "model_max_length": cfg.max_position,
    }  # fmt: skip
    (side_files / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    manifest = {
        "vocab_size": cfg.vocab_size,
        "special_tokens": ids,
        "eos_token_id": list(cfg.stop_tokens),
        "books": [book.manifest_line() for book in books],
    }
    (side_files / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    data.write_json_lines(side_files / "prompts.jsonl", data.demo_prompts(books))
    return data.pack(training, tokenizer), cfg


def write_spent(
    side_files: Path, args: argparse.Namespace, plan: Plan, training_tokens: int, steps: int, seconds: float
) -> None:
    """training.json: what it took to get here, that of the weights it started from included."""
    spent: dict[str, Any] = vars(plan) | {
        "steps": steps, "of_steps": args.steps, "tokens": steps * plan.batch * ROWS, "training_tokens": training_tokens,
        "seconds": round(seconds), "threads": os.cpu_count(),
    }  # fmt: skip
    if args.start and (before := args.start / "training.json").is_file():
        spent["start"] = json.loads(before.read_text())
    (side_files / "training.json").write_text(json.dumps(spent, indent=2) + "\n")


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded tiny model.")
    parser.add_argument("--books", type=Path, required=True, help="folder of plain texts, author_title.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; replaced every five minutes")
    parser.add_argument("--start", type=Path, help="weights to go on from; the optimiser and the rate begin anew")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time, start-up not counted")
    parser.add_argument("--steps", type=int, help="train for this many steps instead, whatever the time")
    parser.add_argument("--batch", type=int, default=Plan.batch, help=f"windows of {ROWS} tokens a step")
    parser.add_argument("--rate", type=float, default=Plan.rate, help="peak learning rate")
    parser.add_argument("--mtp-steps", type=int, default=Plan.mtp_steps, choices=range(1, len(MTP_WEIGHTS) + 1))
    parser.add_argument("--seed", type=int, default=Plan.seed)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    out: Path = args.out.resolve()
    books = data.read_books(args.books)
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise SystemExit(f"{out}: holds something else than a tiny model. Choose another --out.")
    side_files = out.with_name(f".{out.name}.side")
    shutil.rmtree(side_files, ignore_errors=True)
    side_files.mkdir(parents=True)
    tokens, cfg = prepare(books, side_files)
    print(f"{len(tokens):,} training tokens, {len(books)} titles, vocabulary {cfg.vocab_size}", flush=True)

    plan = Plan(batch=args.batch, rate=args.rate, mtp_steps=args.mtp_steps, seed=args.seed)
    began = time.monotonic()
    first: list[float] = []  # end of the first step: compiling is not training

    def progress(step: int) -> float:
        if args.steps is not None:
            return step / args.steps
        return (time.monotonic() - first[0]) / (60 * args.minutes) if first else 0.0

    saved, model = began, None
    if args.start:
        start = load_checkpoint(open_checkpoint(args.start), dtype=jnp.float32)
        if start.cfg != cfg:
            raise SystemExit(f"--start {args.start}: another model than the one trained here:\n{start.cfg}\n{cfg}")
    else:
        start = spread_gains(random_model(cfg, seed=plan.seed), plan.seed)
    sums: dict[str, float] = {}  # moving averages
    for number, (model, parts) in enumerate(train(start, tokens, plan, progress), 1):
        now = time.monotonic()
        if not first:
            first.append(now)
            size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
            print(f"{size:,} parameters; first step after {now - began:.0f} s", flush=True)
        sums = {name: 0.95 * sums.get(name, part) + 0.05 * part for name, part in parts.items()}
        if number % 20 == 0:
            speed = (number - 1) * plan.batch * ROWS / (now - first[0])
            shown = "  ".join(f"{name} {value:.3f}" for name, value in sums.items())
            print(f"step {number:5}  {now - first[0]:6.0f} s  {speed:6.0f} tokens/s  {shown}", flush=True)
        if now - saved > SAVE_SECONDS:
            write_spent(side_files, args, plan, len(tokens), number, now - first[0])
            save(out, model, side_files)
            saved = now
    if model is None:
        raise SystemExit("--minutes or --steps leaves no time for a single step.")
    seconds = time.monotonic() - first[0]
    write_spent(side_files, args, plan, len(tokens), number, seconds)
    save(out, model, side_files)
    shutil.rmtree(side_files)
    print(f"{out}: {number} steps, {number * plan.batch * ROWS:,} tokens in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
