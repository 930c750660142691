"""Where each published tensor lies in the parameter tree, and whether a checkpoint holds the tensors of its config."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, replace

from checkpoints import CheckpointError, OrbaxDirectory, TensorSource
from mtpjax.config import FULL, ModelConfig
from mtpjax.hf_config import config_from_hf, config_to_hf
from mtpjax.loading.lm_head import has_own_lm_head
from mtpjax.loading.loaded_model import ParamPath, param_shapes
from mtpjax.loading.split_projections import split_projections
from mtpjax.model.params import ONLY_LAYER

MAX_LISTED = 40  # lines of an error that lists all that does not fit

# Attribute of the module -> published name behind the prefix of the module.
_ATTENTION = {
    "q": "q_proj.weight",
    "k": "k_proj.weight",
    "v": "v_proj.weight",
    "o": "o_proj.weight",
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
}
_DELTANET = {
    "in_qkv": "in_proj_qkv.weight",
    "in_z": "in_proj_z.weight",
    "in_b": "in_proj_b.weight",
    "in_a": "in_proj_a.weight",
    "conv": "conv1d.weight",
    "a_log": "A_log",
    "dt_bias": "dt_bias",
    "norm": "norm.weight",
    "out": "out_proj.weight",
}
_MLP = {"gate": "gate_proj.weight", "up": "up_proj.weight", "down": "down_proj.weight"}
_LAYER_NORMS = {"input_norm": "input_layernorm.weight", "post_norm": "post_attention_layernorm.weight"}
_MTP = {
    "embed_norm": "pre_fc_norm_embedding.weight",
    "hidden_norm": "pre_fc_norm_hidden.weight",
    "fc": "fc.weight",
    "norm": "norm.weight",
}

# Tensors of an MTP head that does not share the embedding and the LM head of the trunk; see `own_mtp_tensors.py`.
OWN_MTP_TENSORS = ("mtp.embed_tokens.weight", "mtp.lm_head.weight")

LeafIndex = tuple[int | slice, ...]


@dataclass(frozen=True)
class TensorLocation:
    """Where one published tensor lies: `index` into the leaf at `path`; `shape` is the published shape."""

    path: ParamPath
    index: LeafIndex
    shape: tuple[int, ...]


def weight_map(cfg: ModelConfig, has_tensor: Callable[[str], bool] = lambda name: False) -> dict[str, TensorLocation]:
    """Return the location of every tensor of the model by canonical name (`checkpoints/names.py`).

    Args:
        has_tensor: whether the checkpoint holds a name. Decides for each layer whether its experts are fused (the
            default) or one tensor each.
    """
    builder = _WeightMapBuilder(cfg, has_tensor)
    builder.add("embed_tokens.weight", ("embedding",))
    builder.add("norm.weight", ("norm",))
    if not cfg.tied_embeddings:
        builder.add("lm_head.weight", ("lm_head",))
    for layer in range(cfg.num_layers):
        block, layer_of_block = divmod(layer, len(cfg.layer_pattern))
        path = ("decoder", "blocks", block, "layers", layer_of_block)
        builder.add_layer(f"layers.{layer}", path, cfg.layer_pattern[layer_of_block], (ONLY_LAYER,))
    if cfg.mtp_layers:
        builder.add_all("mtp", ("mtp",), _MTP, ())
        builder.add_layer("mtp.layers.0", ("mtp", "layer"), FULL, ())
    return builder.locations


class _WeightMapBuilder:
    """Collects `locations`. `layer_index` is the index into the layer axis of a module, or () if it has none."""

    def __init__(self, cfg: ModelConfig, has_tensor: Callable[[str], bool]) -> None:
        self.cfg, self.has_tensor = cfg, has_tensor
        self.shapes = param_shapes(cfg)
        self.locations: dict[str, TensorLocation] = {}

    def add(self, name: str, path: ParamPath, index: LeafIndex = (), shape: tuple[int, ...] | None = None) -> None:
        """Add the location of `name`. Its shape is that of the leaf behind `index` unless `shape` is given."""
        self.locations[name] = TensorLocation(path, index, shape or self.shapes[path][len(index) :])

    def add_all(self, prefix: str, path: ParamPath, names: Mapping[str, str], index: LeafIndex) -> None:
        for attribute, name in names.items():
            self.add(f"{prefix}.{name}", (*path, attribute), index)

    def add_layer(self, prefix: str, path: ParamPath, kind: str, layer_index: LeafIndex) -> None:
        self.add_all(prefix, path, _LAYER_NORMS, layer_index)
        mixer = (*path, "mixer")
        if kind == FULL:
            self.add_all(f"{prefix}.self_attn", mixer, _ATTENTION, layer_index)
        else:
            self.add_all(f"{prefix}.linear_attn", mixer, _DELTANET, layer_index)
            # Published with an axis of size 1 for the inputs of a channel, as Conv1d has it.
            conv_shape = (self.cfg.conv_channels, 1, self.cfg.conv_width)
            self.add(f"{prefix}.linear_attn.{_DELTANET['conv']}", (*mixer, "conv"), layer_index, conv_shape)
        mlp = (*path, "mlp")
        if not self.cfg.num_experts:
            self.add_all(f"{prefix}.mlp", mlp, _MLP, layer_index)
            return
        self.add(f"{prefix}.mlp.gate.weight", (*mlp, "router"), layer_index)
        self.add(f"{prefix}.mlp.shared_expert_gate.weight", (*mlp, "shared_gate"), layer_index)
        self.add_experts(f"{prefix}.mlp.experts", mlp)
        self.add_all(f"{prefix}.mlp.shared_expert", (*mlp, "shared"), _MLP, layer_index)

    def add_experts(self, prefix: str, path: ParamPath) -> None:
        """Add the experts of a layer, whose stacks have a layer axis in every module."""
        if not self.has_tensor(f"{prefix}.0.gate_proj.weight"):
            self.add(f"{prefix}.gate_up_proj", (*path, "gate_up"), (ONLY_LAYER,))
            self.add(f"{prefix}.down_proj", (*path, "down"), (ONLY_LAYER,))
            return
        size, shape = self.cfg.expert_size, (self.cfg.expert_size, self.cfg.hidden_size)
        gate_rows, up_rows = slice(0, size), slice(size, 2 * size)
        for expert in range(self.cfg.num_experts):
            name = f"{prefix}.{expert}"
            self.add(f"{name}.gate_proj.weight", (*path, "gate_up"), (ONLY_LAYER, expert, gate_rows), shape)
            self.add(f"{name}.up_proj.weight", (*path, "gate_up"), (ONLY_LAYER, expert, up_rows), shape)
            self.add(f"{name}.down_proj.weight", (*path, "down"), (ONLY_LAYER, expert))


def group_by_leaf(locations: Mapping[str, TensorLocation]) -> dict[ParamPath, list[tuple[str, TensorLocation]]]:
    """Return for each leaf the tensors that it holds, with their locations."""
    tensors_of: dict[ParamPath, list[tuple[str, TensorLocation]]] = {}
    for name, location in locations.items():
        tensors_of.setdefault(location.path, []).append((name, location))
    return tensors_of


def read_config(source: TensorSource | OrbaxDirectory) -> ModelConfig:
    """Return the config of a checkpoint as its config.json, or its metadata, says. Raises ConfigError."""
    file = source.path if source.path.is_file() else source.path / "config.json"
    return config_from_hf(source.config, source=str(file))


def checkpoint_config(source: TensorSource) -> ModelConfig:
    """Return the config of a checkpoint. Its tensors decide whether there is an MTP head, and an LM head of its own.

    Raises:
        ConfigError: config.json is not that of a supported model.
        CheckpointError: a file cannot be read.
    """
    cfg = read_config(source)
    has_mtp = any(name.startswith("mtp.") for name in source.tensors)
    tied = cfg.tied_embeddings and not has_own_lm_head(source)
    return replace(cfg, mtp_layers=int(has_mtp), tied_embeddings=tied)


def check_tensors(
    source: TensorSource,
    locations: Mapping[str, TensorLocation],
    cfg: ModelConfig,
    beside: Collection[str] = (),
) -> None:
    """Compare the tensors of a checkpoint with those of the model.

    Args:
        beside: names of further tensors that may be there; they are read elsewhere.

    Raises:
        CheckpointError: missing, mis-shaped or unexpected tensors, all of them in one error. If they are all of the MTP
            head, it says how to do without.
    """
    ignored = {"lm_head.weight"} if cfg.tied_embeddings else set()
    present = {n for n in source.tensors if n not in ignored and (cfg.mtp_layers or not n.startswith("mtp."))}
    misshaped = {n for n in present & locations.keys() if source.tensors[n].shape != locations[n].shape}
    wrong = [
        f"'{info.name}' in {info.file.name} has shape {list(info.shape)}, expected {list(locations[name].shape)}"
        for name in sorted(misshaped)
        if (info := source.tensors[name])
    ]
    file_names = getattr(source, "file_names", {})
    missing = [
        f"'{name}'{f' ({file_names[name]})' if name in file_names else ''} is missing, "
        f"expected shape {list(locations[name].shape)}"
        for name in sorted(locations.keys() - present)
    ]
    extra = [
        f"'{source.tensors[name].name}' is not a tensor of this model"
        for name in sorted(present - locations.keys() - set(beside))
    ]
    if wrong or missing or extra:
        raise CheckpointError(
            f"{source.path}: {len(missing)} missing, {len(wrong)} mis-shaped and {len(extra)} unexpected tensors for "
            f"the model that its config.json describes:\n{format_list([*missing, *wrong, *extra])}\n{_sizes(cfg)}"
            f"{_without_head(present, locations, misshaped | (present ^ locations.keys()) - set(beside))}"
        )


def _sizes(cfg: ModelConfig) -> str:
    """Return the numbers of a config, one of which may be what is wrong."""
    sizes = [f"{key} {value}" for key, value in config_to_hf(cfg).items() if type(value) is int]
    return "Its config.json says: " + ", ".join(sizes)


def _without_head(present: Set[str], locations: Mapping[str, TensorLocation], wrong: Set[str]) -> str:
    """Return the end of the error if all names in `wrong` are of the MTP head; else nothing."""
    if not all(name.startswith("mtp.") for name in wrong):
        return ""
    head = [name for name in locations if name.startswith("mtp.")]
    return (
        f"\n{sum(name in present for name in head)} of the {len(head)} tensors of its MTP head are there. Without the "
        "head the model loads: num_speculative_tokens=0 (--num-speculative-tokens 0), or mtp= with another head."
    )


def format_list(lines: list[str]) -> str:
    """Return the lines of an error, indented; at most `MAX_LISTED`, then how many more there are."""
    shown = [f"  {line}" for line in lines[:MAX_LISTED]]
    return "\n".join(shown + ([f"  ... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []))


def check_source(source: TensorSource) -> ModelConfig:
    """Return the config of a checkpoint whose tensors fit it.

    Raises:
        CheckpointError, ConfigError: as `load_model` would.
    """
    cfg = checkpoint_config(source)
    source = split_projections(source, cfg)
    check_tensors(source, weight_map(cfg, source.tensors.__contains__), cfg, beside=OWN_MTP_TENSORS)
    return cfg
