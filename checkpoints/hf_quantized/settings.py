"""Where the quantisation settings of a folder are, which of them matter, and the formats that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.folder import CONFIG, read_json_file
from checkpoints.hf_quantized.errors import UnsupportedQuantizationError
from checkpoints.hf_quantized.formats import WeightFormat, formats_from_config
from checkpoints.known_keys import warn_of_unknown_keys

HF_QUANT_CONFIG = "hf_quant_config.json"  # where modelopt wrote its settings at first, and still writes them, too

# The settings that `formats_from_config` reads, by method.
_USED: dict[str, tuple[str, ...]] = {
    "fp8": ("weight_block_size",),
    "gptq": ("bits", "desc_act", "checkpoint_format"),
    "auto-round": ("bits", "desc_act", "data_type", "packing_format"),
    "awq": ("bits", "version"),
    "compressed-tensors": ("config_groups", "format", "transform_config", "sparsity_config"),
    "modelopt": ("quant_algo", "quantized_layers"),
}
_TENSORS = "the tensors of each weight tell it"
_ACTIVATIONS = "about activations or the cache, which are not quantised here"
_HISTORY = "says how the weights were found, not what they are"
# Settings without an effect, and why. All methods together: none has a name that means something else in another one.
_HARMLESS: dict[str, str] = {
    **dict.fromkeys(
        (
            "ignore",
            "ignored_layers",
            "modules_to_not_convert",
            "modules_to_convert",
            "modules_in_block_to_quantize",
            "exclude_modules",
            "extra_config",
            "dynamic",
            "block_name_to_quantize",
            "to_quant_block_names",
            "group_size",
            "sym",
            "zero_point",
            "lm_head",
            "weight_bits",
            "fmt",
            "scale_fmt",
            "quant_type",
            "is_mx_format",
            "pack_dtype",
            "meta",
            "global_compression_ratio",
            "has_zero_point",
            "super_bits",
            "super_group_size",
            "moe_quant_algo",
            "config_groups",
            "format",
            "pre_quant_scale",
        ),
        _TENSORS,
    ),
    **dict.fromkeys(
        (
            "activation_scheme",
            "kv_cache_scheme",
            "kv_cache_quant_algo",
            "act_bits",
            "act_group_size",
            "act_sym",
            "act_dynamic",
            "act_data_type",
            "input_scale",
        ),
        _ACTIVATIONS,
    ),
    **dict.fromkeys(
        (
            "quantization_status",
            "quant_library",
            "version",
            "autoround_version",
            "producer",
            "quantizer",
            "damp_percent",
            "damp_auto_increment",
            "static_groups",
            "true_sequential",
            "act_group_aware",
            "mse",
            "iters",
            "lr",
            "minmax_lr",
            "nsamples",
            "seqlen",
            "batch_size",
            "low_gpu_mem_usage",
            "gradient_accumulate_steps",
            "enable_minmax_tuning",
            "enable_norm_bias_tuning",
            "enable_quanted_input",
            "amp",
            "scale_dtype",
            "low_cpu_mem_usage",
            "quant_lm_head",
            "dataset",
            "tokenizer",
            "model_seqlen",
            "model_name_or_path",
            "model_file_base_name",
            "backend",
            "use_exllama",
            "exllama_config",
            "max_input_length",
            "do_fuse",
            "fuse_max_seq_len",
            "modules_to_fuse",
            "model_decoder_layers",
            "version_config",
            "offline",
            "method",
            "run_compressed",
            "is_fx",
            "desc",
        ),
        _HISTORY,
    ),
}
# Keys of a group of compressed-tensors and of its "weights": those that `formats_from_config` reads, and others.
_GROUP_USED = ("format", "weights")
_WEIGHTS_USED = ("type", "num_bits", "strategy", "group_size", "symmetric", "block_structure")
_GROUP_HARMLESS: dict[str, str] = {
    "targets": _TENSORS,
    **dict.fromkeys(("input_activations", "output_activations"), _ACTIVATIONS),
}
_WEIGHTS_HARMLESS: dict[str, str] = {
    **dict.fromkeys(("actorder", "scale_dtype", "zp_dtype"), _TENSORS),
    **dict.fromkeys(("dynamic", "observer", "observer_kwargs"), _HISTORY),
}
# Settings that say again what the tensors of a weight tell.
_SAID_TWICE = ("bits", "desc_act", "checkpoint_format", "format", "symmetric", "strategy", "weight_block_size")
_COMMON = ("quant_method", "rotation_config")


def quantization_config(config: Mapping[str, Any]) -> Any:
    """Return `quantization_config` of a config.json, which may be inside `text_config`; None if there is none."""
    for section in (config, config.get("text_config")):
        settings = section.get("quantization_config") if isinstance(section, Mapping) else None
        if settings:
            return settings
    return None


def quantization_settings(folder: Path, config: Mapping[str, Any] | None = None) -> Any:
    """Return the quantisation settings of a folder without null values, or None if it is not quantised.

    They are `quantization_config` of config.json, or else what modelopt wrote into `hf_quant_config.json`.

    Args:
        config: the content of config.json; None: read here if the file exists.
    """
    if config is None:
        config = read_json_file(folder / CONFIG) if (folder / CONFIG).exists() else {}
    settings = _without_nulls(quantization_config(config))
    if settings or not (file := folder / HF_QUANT_CONFIG).is_file():
        return settings or None
    content = read_json_file(file)
    section = _without_nulls(content.get("quantization", content))
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{file}: 'quantization' is {section!r}, expected an object. {REDOWNLOAD}")
    return {"quant_method": "modelopt", **section} if "quant_algo" in section else None


def _without_nulls(value: Any) -> Any:
    """Return a JSON value with all entries of objects left out whose value is null: they are as good as absent."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return value


def _check_objects(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a group, its weights or the settings of a layer are no JSON object."""

    def expect(place: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            where = f"{folder}: quantization_config: {place}"
            raise CheckpointError(f"{where} is {value!r}, expected an object. {REDOWNLOAD}")

    for table in ("config_groups", "quantized_layers"):
        entries = settings.get(table, {})
        expect(table, entries)
        for name, entry in entries.items():
            expect(f"{table}: {name}", entry)
            expect(f"{table}: {name}: weights", entry.get("weights", {}))
    for table in ("sparsity_config", "transform_config"):
        expect(table, settings.get(table, {}))


def read_formats(folder: Path, settings: Any) -> tuple[WeightFormat, ...]:
    """Return the formats that the settings of a folder describe.

    Raises:
        CheckpointError: they are not supported; names the folder, the key and the expected values.

    Warns:
        CheckpointWarning: they have keys that nothing here knows.
    """
    if not isinstance(settings, Mapping):
        settings = {"quant_method": settings}
    _check_objects(folder, settings)
    try:
        formats = formats_from_config(settings)
    except UnsupportedQuantizationError as error:
        method = settings.get("quant_method")
        raise CheckpointError(
            f"{folder}: is quantised (quant_method {method!r}), and {error}; use the BF16 files of the same model"
        ) from None
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: quantization_config cannot be understood ({type(error).__name__}: {error}). {REDOWNLOAD}"
        ) from None
    used = (*_COMMON, *_USED.get(settings["quant_method"], ()))
    warn_of_unknown_keys(f"{folder}: quantization_config has", settings, used, _HARMLESS, stacklevel=5)
    for name, group in settings.get("config_groups", {}).items():
        place = f"{folder}: quantization_config: config_groups: {name}"
        warn_of_unknown_keys(f"{place} has", group, _GROUP_USED, _GROUP_HARMLESS, stacklevel=5)
        weights = group.get("weights", {})
        warn_of_unknown_keys(f"{place}: weights has", weights, _WEIGHTS_USED, _WEIGHTS_HARMLESS, stacklevel=5)
    return formats


def is_harmless_setting(key: str) -> bool:
    """Return whether a key of the settings may have another value without an effect: the tensors decide."""
    harmless = _HARMLESS | _GROUP_HARMLESS | _WEIGHTS_HARMLESS
    return key in harmless or key in _SAID_TWICE
