"""The rotary position embedding of a config: `rope_parameters`, the older `rope_scaling`, and flat keys."""

from __future__ import annotations

from typing import Any, NamedTuple

from checkpoints.known_keys import warn_of_unknown_keys
from mtpjax.config import FULL, LINEAR, ModelConfig, RopeScaling, yarn_attention_factor
from mtpjax.hf_config.keys import HARMLESS_IN_ROPE
from mtpjax.hf_config.reader import Reader

# M-RoPE gives every row three positions, which are equal for text: that is plain RoPE.
PLAIN, LINEAR_SCALING, YARN = ("default", "mrope"), "linear", "yarn"
KINDS = (*PLAIN, LINEAR_SCALING, YARN)


class Rope(NamedTuple):
    """What the config says of positions; see the fields of `ModelConfig` with these names."""

    rotary_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position: int


def read_rope(get: Reader, head_dim: int) -> Rope:
    """Read the rotary embedding of the attention layers.

    A `rope_scaling` goes before `rope_parameters`, as in transformers; what it lacks comes from there, then from the
    config itself. Of parameters for each layer type those of full attention count: DeltaNet layers have no positions.

    Raises:
        ConfigError: an unknown kind, or an impossible value.
    """
    parameters, scaling = _of_attention(get, "rope_parameters"), _of_attention(get, "rope_scaling")
    flat = {"rope_theta": get.get("rope_theta", 1e7), "share": get.get("partial_rotary_factor", 0.25)}
    name = "rope_scaling" if scaling else "rope_parameters"
    rope = Reader(parameters | scaling, f"{get.source}: {name}")
    kind = rope.choice("rope_type", KINDS, "default")
    share = rope.float("partial_rotary_factor", flat["share"])
    rotary_dim = int(head_dim * share + 1e-6)  # a factor such as 58 / 88 must not lose a dimension to rounding
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        supported = "an even number of rotary dims in head_dim"
        raise rope.unsupported("'partial_rotary_factor'", rotary_dim / head_dim, supported)
    theta = rope.float("rope_theta", flat["rope_theta"])
    max_position = get.int("max_position_embeddings", 262_144)
    scaled = None
    if kind not in PLAIN:
        original = rope.int("original_max_position_embeddings", max_position)
        original = get.int("original_max_position_embeddings", original)  # goes first, as in transformers
        scaled = _read_scaling(rope, kind, theta, original, max_position)
        max_position = scaled.max_position
    warn_of_unknown_keys(f"{rope.source} has", rope.raw, rope.used, HARMLESS_IN_ROPE)
    return Rope(rotary_dim, theta, scaled, max_position)


def _of_attention(get: Reader, key: str) -> dict[str, Any]:
    """Return the parameters under `key` of the attention layers, with their kind under "rope_type"."""
    found = get.object(key) or {}
    if FULL in found or LINEAR in found:
        by_layer_type = Reader(found, f"{get.source}: {key}")
        attention = by_layer_type.object(FULL)
        if attention is None:
            raise by_layer_type.unsupported(f"'{FULL}'", None, "a JSON object, because these layers need positions")
        harmless = {LINEAR: "layers of this type have no positions"}
        warn_of_unknown_keys(f"{by_layer_type.source} has", by_layer_type.raw, by_layer_type.used, harmless)
        found = attention
    parameters = {name: value for name, value in found.items() if value is not None}
    old_name = parameters.pop("type", None)  # of rope_type
    if old_name is not None and parameters.setdefault("rope_type", old_name) != old_name:
        if any(kind not in PLAIN for kind in (old_name, parameters["rope_type"])):
            both = f"{parameters['rope_type']!r} and {old_name!r}"
            raise get.unsupported(f"'rope_type' and 'type' of '{key}'", both, "one kind under either name")
    return parameters


def _read_scaling(rope: Reader, kind: str, theta: float, original: int, max_position: int) -> RopeScaling:
    factor = rope.float("factor", max_position / original if kind == YARN else None)
    if factor < 1:
        raise rope.unsupported("'factor'", factor, "a number >= 1")
    if kind == LINEAR_SCALING:
        return RopeScaling(kind=kind, factor=factor, original_max_position=original)
    mscale, mscale_all_dim = (rope.float(key) if rope.get(key) else 0.0 for key in ("mscale", "mscale_all_dim"))
    default = yarn_attention_factor(factor)
    if mscale and mscale_all_dim:
        default = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
    scaling = RopeScaling(
        kind=kind,
        factor=factor,
        original_max_position=original,
        attention_factor=rope.float("attention_factor", default),
        beta_fast=rope.float("beta_fast", 32.0),
        beta_slow=rope.float("beta_slow", 1.0),
        truncate=rope.bool("truncate", True),
    )
    if theta <= 1:
        raise rope.unsupported("'rope_theta'", theta, "a number > 1 under YaRN")
    if scaling.beta_fast < scaling.beta_slow:
        raise rope.unsupported("'beta_fast'", scaling.beta_fast, f"a number >= beta_slow = {scaling.beta_slow:g}")
    return scaling


def rope_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that `read_rope` reads back to the same values."""
    share = cfg.rotary_dim / cfg.head_dim
    parameters = {"rope_type": "default", "rope_theta": cfg.rope_theta, "partial_rotary_factor": share}
    scaling, max_position = cfg.rope_scaling, cfg.max_position
    if scaling is not None:
        max_position = scaling.original_max_position
        parameters |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
        if scaling.kind == YARN:
            parameters |= {
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
    return {"rope_parameters": parameters, "max_position_embeddings": max_position}
