"""Checkpoint tensors <-> parameter tree: where each published tensor lies, loading, random weights, export."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints import CheckpointError, TensorSource
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax.config import FULL, ModelConfig
from mtpjax.hf_config import config_from_hf
from mtpjax.loading.quantized_leaves import (
    can_quantize,
    can_share_layout,
    is_block_aligned,
    random_quantized,
    read_quantized,
    stack_quantized,
)
from mtpjax.model import abstract_model
from mtpjax.model.params import ONLY_LAYER

Path = tuple[str | int, ...]

_ATTENTION = {
    "q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight", "o": "o_proj.weight",
    "q_norm": "q_norm.weight", "k_norm": "k_norm.weight",
}  # fmt: skip
_DELTANET = {
    "in_qkv": "in_proj_qkv.weight", "in_z": "in_proj_z.weight", "in_b": "in_proj_b.weight", "in_a": "in_proj_a.weight",
    "conv": "conv1d.weight", "a_log": "A_log", "dt_bias": "dt_bias", "norm": "norm.weight", "out": "out_proj.weight",
}  # fmt: skip
_MLP = {"gate": "gate_proj.weight", "up": "up_proj.weight", "down": "down_proj.weight"}
_MTP = {
    "embed_norm": "pre_fc_norm_embedding.weight", "hidden_norm": "pre_fc_norm_hidden.weight",
    "fc": "fc.weight", "norm": "norm.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Location:
    """Where one published tensor lies: `index` into the leaf at `path`; `shape` is the tensor's own."""

    path: Path
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LoadedModel:
    """A split model: `graph` is static, `params` the tree of arrays; `nnx.merge(graph, params)` inside jit."""

    cfg: ModelConfig
    graph: Any
    params: Any


def flat(params: Any) -> dict[Path, Any]:
    state: Any = nnx.to_flat_state(params)
    return dict(state)


def weight_map(cfg: ModelConfig, has: Callable[[str], bool] = lambda name: False) -> dict[str, Location]:
    """Every tensor of the model by canonical name.

    Args:
        has: whether the checkpoint holds a name; decides between fused experts (the default) and one tensor an expert.
    """
    shapes = {path: leaf.shape for path, leaf in flat(nnx.split(abstract_model(cfg))[1]).items()}
    found: dict[str, Location] = {}

    def put(name: str, path: Path, index: tuple[int | slice, ...] = (), shape: tuple[int, ...] | None = None) -> None:
        found[name] = Location(path, index, shape or shapes[path][len(index) :])

    def experts(prefix: str, path: Path, at: int) -> None:
        size = cfg.expert_size
        if not has(f"{prefix}.experts.0.gate_proj.weight"):
            put(f"{prefix}.experts.gate_up_proj", (*path, "gate_up"), (at,))
            put(f"{prefix}.experts.down_proj", (*path, "down"), (at,))
            return
        for e in range(cfg.num_experts):
            each, half = f"{prefix}.experts.{e}", (size, cfg.hidden_size)
            put(f"{each}.gate_proj.weight", (*path, "gate_up"), (at, e, slice(0, size)), half)
            put(f"{each}.up_proj.weight", (*path, "gate_up"), (at, e, slice(size, 2 * size)), half)
            put(f"{each}.down_proj.weight", (*path, "down"), (at, e))

    def layer(prefix: str, path: Path, kind: str, at: int | None) -> None:
        lead = () if at is None else (at,)
        for ours, name in (("input_norm", "input_layernorm"), ("post_norm", "post_attention_layernorm")):
            put(f"{prefix}.{name}.weight", (*path, ours), lead)
        names, where = (_ATTENTION, "self_attn") if kind == FULL else (_DELTANET, "linear_attn")
        for ours, name in names.items():
            shape = (cfg.conv_channels, 1, cfg.conv_width) if ours == "conv" else None
            put(f"{prefix}.{where}.{name}", (*path, "mixer", ours), lead, shape)
        mlp, shared = (*path, "mlp"), f"{prefix}.mlp.shared_expert"
        if cfg.num_experts:
            put(f"{prefix}.mlp.gate.weight", (*mlp, "router"), lead)
            put(f"{shared}_gate.weight", (*mlp, "shared_gate"), lead)
            experts(f"{prefix}.mlp", mlp, at or 0)
        for ours, name in _MLP.items():
            if cfg.num_experts:
                put(f"{shared}.{name}", (*mlp, "shared", ours), lead)
            else:
                put(f"{prefix}.mlp.{name}", (*mlp, ours), lead)

    put("embed_tokens.weight", ("embedding",))
    put("norm.weight", ("norm",))
    if not cfg.tied_embeddings:
        put("lm_head.weight", ("lm_head",))
    for number in range(cfg.num_layers):
        repeat, inside = divmod(number, len(cfg.layer_pattern))
        path = ("decoder", "blocks", repeat, "layers", inside)
        layer(f"layers.{number}", path, cfg.layer_pattern[inside], ONLY_LAYER)
    if cfg.mtp_layers:
        for ours, name in _MTP.items():
            put(f"mtp.{name}", ("mtp", ours))
        layer("mtp.layers.0", ("mtp", "layer"), FULL, None)
    return found


def config_of(source: TensorSource) -> ModelConfig:
    """The checkpoint's config; whether there is an MTP head is decided by its tensors, not by its config."""
    cfg = config_from_hf(source.config, source=str(source.path / "config.json"))
    return replace(cfg, mtp_layers=int(any(name.startswith("mtp.") for name in source.tensors)))


def _check(source: TensorSource, table: Mapping[str, Location], cfg: ModelConfig) -> None:
    """Compare the checkpoint's tensors with the model's; one error lists everything that does not fit."""
    ignored = {"lm_head.weight"} if cfg.tied_embeddings else set()
    have = {n for n in source.tensors if n not in ignored and (cfg.mtp_layers or not n.startswith("mtp."))}
    wrong = [
        f"'{info.name}' in {info.file.name} has shape {list(info.shape)}, expected {list(table[name].shape)}"
        for name in sorted(have & table.keys())
        if (info := source.tensors[name]).shape != table[name].shape
    ]
    missing = [f"'{name}' is missing, expected shape {list(table[name].shape)}" for name in sorted(table.keys() - have)]
    extra = [f"'{source.tensors[name].name}' is not a tensor of this model" for name in sorted(have - table.keys())]
    if wrong or missing or extra:
        lines = [f"  {line}" for group in (missing, wrong, extra) for line in group]
        shown = lines[:40] + ([f"  ... and {len(lines) - 40} more"] if len(lines) > 40 else [])
        raise CheckpointError(
            f"{source.path}: {len(missing)} missing, {len(wrong)} mis-shaped and {len(extra)} unexpected tensors for the "
            "model that its config.json describes:\n" + "\n".join(shown)
        )


def check_source(source: TensorSource) -> ModelConfig:
    """The config of a checkpoint whose tensors fit it. Raises CheckpointError or ConfigError as `load_model` would."""
    cfg = config_of(source)
    _check(source, weight_map(cfg, source.tensors.__contains__), cfg)
    return cfg


def _leaf_dtype(leaf: Any, stored: list[np.dtype], dtype: jnp.dtype | None) -> np.dtype:
    """Matrices in `dtype` (None: as stored); small vectors in float32."""
    if leaf.dtype == jnp.float32 and len(stored) and dtype is None:
        return np.dtype(jnp.result_type(*set(stored)))
    return np.dtype(leaf.dtype)


def load_model(
    source: TensorSource,
    *,
    dtype: jnp.dtype | None = jnp.float32,
    compute_dtype: jnp.dtype | None = None,
    mtp: bool = True,
    weights: str | None = None,
) -> LoadedModel:
    """Read a checkpoint leaf by leaf: host memory beyond the parameters stays at one leaf.

    Args:
        dtype: of the matrices in memory; None keeps what the file holds, for every tensor (conversion).
        mtp: False leaves an MTP head unread.
        weights: None for plain arrays, or one of `mtpjax.loading.quantized_leaves.WEIGHTS`: matrices become `QuantizedTensor`s.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors (all of them in one error), or NaN/Inf (names the tensor).
    """
    cfg = config_of(source) if mtp else config_of(source).without_mtp()
    table = weight_map(cfg, source.tensors.__contains__)
    _check(source, table, cfg)
    graph, params = nnx.split(abstract_model(cfg, dtype or jnp.float32, compute_dtype=compute_dtype))
    parts: dict[Path, list[tuple[str, Location]]] = {}
    for name, where in table.items():
        parts.setdefault(where.path, []).append((name, where))

    def read(path: Path, leaf: Any) -> jax.Array | QuantizedTensor:
        if weights is not None and can_quantize(path, leaf.shape, weights):
            packed = [(where.index, read_quantized(source, name, weights)) for name, where in parts[path]]
            whole_parts = [
                (index, part) for index, part in packed if part is not None and is_block_aligned(index, part)
            ]
            if len(whole_parts) == len(packed) and can_share_layout(path, [part for _, part in whole_parts]):
                return stack_quantized(leaf.shape, whole_parts)
        stored = [source.tensors[name].dtype for name, _ in parts[path]]
        whole = _aligned(leaf.shape, _leaf_dtype(leaf, stored, dtype))
        for name, where in parts[path]:
            source.read_into(name, whole[where.index].reshape(where.shape))
        return jax.device_put(whole)

    return LoadedModel(cfg, graph, fill(params, read))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which a CPU device can take over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def fill(params: Any, make: Callable[[Path, Any], Any]) -> Any:
    """The same tree with every leaf replaced by `make(path, abstract leaf)`, one at a time."""
    made = []
    for path, leaf in flat(params).items():
        made.append((path, leaf.replace(make(path, leaf))))
    return nnx.from_flat_state(made)


def random_model(
    cfg: ModelConfig,
    *,
    seed: int = 0,
    dtype: jnp.dtype = jnp.float32,
    compute_dtype: jnp.dtype | None = None,
    scale: float = 0.02,
    weights: str | None = None,
) -> LoadedModel:
    """A model with random weights, made on the device: matrices normal with deviation `scale`, norms neutral.

    Decay rates start as in Mamba: `A` uniform in 1...16, time steps log-uniform in 0.001...0.1.

    Args:
        weights: "int4", "int8", "iq4nl" or "fp8" makes the matrices that are packed in that form of random codes; they never
            exist unpacked.
    """
    graph, params = nnx.split(abstract_model(cfg, dtype, compute_dtype=compute_dtype))

    def make(path: Path, leaf: Any) -> jax.Array | QuantizedTensor:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(repr(path).encode()))
        if weights is not None and can_quantize(path, leaf.shape, weights):
            return random_quantized(key, leaf.shape, weights, scale)
        return _random_leaf(path, key, leaf.shape, leaf.dtype, scale)

    return LoadedModel(cfg, graph, fill(params, make))


def _random_leaf(path: Path, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, scale: float) -> jax.Array:
    name = str(path[-1])
    if name == "a_log":
        return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))
    if name == "dt_bias":
        step = jnp.exp(jax.random.uniform(key, shape, minval=np.log(1e-3), maxval=np.log(1e-1)))
        return jnp.log(jnp.expm1(step))
    if name == "conv":
        return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
    if name.endswith("norm"):
        # Of all norms only DeltaNet's own is not zero-centred: with zeros its layer would put out nothing.
        return jnp.full(shape, float(path[-2:] == ("mixer", "norm")), dtype)
    return jax.jit(lambda k: (jax.random.normal(k, shape) * scale).astype(dtype))(key)


def export_tensors(
    model: LoadedModel, names: Mapping[str, tuple[str, np.dtype]] | None = None
) -> Iterator[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]:
    """The model's tensors as `(name, shape, dtype, read)`, in the published layout, for a streaming writer.

    Args:
        names: canonical name -> (name to write, dtype), e.g. those of the checkpoint the model came from. Without it:
            text-only names, fused experts, and the dtypes that the parameters have.
    """
    table = weight_map(model.cfg, names.__contains__ if names else lambda name: False)
    leaves = flat(model.params)
    for canonical, where in table.items():
        leaf = leaves[where.path][...]
        if names is not None:
            name, dtype = names[canonical]
        else:
            name = canonical if canonical.startswith(("lm_head", "mtp.")) else f"model.{canonical}"
            dtype = np.dtype(leaf.dtype)

        def read(leaf: Any = leaf, where: Location = where, dtype: np.dtype = dtype) -> np.ndarray:
            return np.asarray(leaf[where.index]).astype(dtype).reshape(where.shape)

        yield name, where.shape, dtype, read
