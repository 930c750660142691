"""The first weights of a training run: random ones, those of an earlier run, or the mean of two runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from checkpoints import open_checkpoint
from mtpjax.config import ModelConfig
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel, ParamPath, flatten_params, map_params
from mtpjax.loading.random_init import random_model
from mtpjax.model import abstract_model
from scripts.tiny_model.loss import spread_gains
from scripts.tiny_model.state import Plan
from scripts.tiny_model.steps import new_state


def stacked(model: LoadedModel, layers: int) -> LoadedModel:
    """Return a deeper model: the layers are repeated in order until there are `layers` of them.

    A deeper model then need not learn from random weights. This is the depth-wise stacking of Du et al. 2024 ("Stacking
    Your Transformers"). The MTP head stays as it is.
    """
    cfg = replace(model.cfg, num_layers=layers)
    graph, params = nnx.split(abstract_model(cfg, jnp.float32))
    leaves = flatten_params(model.params)

    def take(path: ParamPath, leaf: Any) -> Array:
        if path[:2] == ("decoder", "blocks"):
            path = (*path[:2], int(path[2]) % model.cfg.num_superblocks, *path[3:])
        return jnp.copy(leaves[path])

    return LoadedModel(cfg, graph, map_params(params, take))


def read_start(folder: Path, cfg: ModelConfig, option: str) -> LoadedModel:
    """Load the weights in `folder`, stacked up to the layers of `cfg`.

    Raises:
        SystemExit: the folder has another model; `option` names the option that gave the folder.
    """
    start = load_checkpoint(open_checkpoint(folder), dtype=jnp.dtype(jnp.float32))
    if replace(start.cfg, num_layers=cfg.num_layers) == cfg and cfg.num_layers % start.cfg.num_layers == 0:
        start = stacked(start, cfg.num_layers)
    if start.cfg != cfg:
        raise SystemExit(
            f"{option} {folder}: another model than the one trained here:\nfound    {start.cfg}\nexpected {cfg}"
        )
    return start


def averaged(model: LoadedModel, other: LoadedModel, share: float) -> LoadedModel:
    """Return the weights `share` of the way from `other` to `model` (WiSE-FT, Wortsman et al. 2022)."""
    return replace(model, params=jax.tree.map(lambda a, b: share * a + (1 - share) * b, model.params, other.params))


def first_state(args: argparse.Namespace, cfg: ModelConfig, plan: Plan) -> dict[str, Any]:
    """Return the state before the first step.

    The weights are random with spread gains, or those of `--start`, averaged with those of `--average` if it is given.
    """
    if args.start is None:
        return new_state(spread_gains(random_model(cfg, seed=plan.seed), plan.seed), plan)
    start = read_start(args.start, cfg, "--start")
    if args.average:
        start = averaged(start, read_start(args.average, cfg, "--average"), args.share)
    return new_state(start, plan)


def history(args: argparse.Namespace) -> dict[str, Any]:
    """Return the entries of training.json that describe the first weights of a run.

    Raises:
        SystemExit: `--average` is not the folder that the run in `--start` started from.
    """

    def training(folder: Path) -> dict[str, Any] | None:
        file = folder / "training.json"
        return json.loads(file.read_text()) if file.is_file() else None

    start = training(args.start) if args.start else None
    if args.average is None:
        return {"start": start} if start else {}
    if not start or not (before := start.get("start")) or before != training(args.average):
        raise SystemExit(f"--average {args.average}: expected the folder that the run in {args.start} started from.")
    return {"start": start, "share": args.share}
