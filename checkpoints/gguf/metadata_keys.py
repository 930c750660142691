"""Metadata keys of a GGUF file: each is used, harmless for a reason, refused for its value, or named in a warning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.known_keys import warn_of_unknown_keys

# Keys behind the architecture that `config_from_metadata` and `settle_metadata` read.
_USED = (
    "block_count",
    "nextn_predict_layers",
    "full_attention_interval",
    "attention.recurrent_layers",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "embedding_length",
    "context_length",
    "feed_forward_length",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "rope.freq_base",
    "rope.dimension_count",
    "ssm.conv_kernel",
    "ssm.state_size",
    "ssm.group_count",
    "ssm.time_step_rank",
    "ssm.inner_size",
)
_SHAPES_TELL = "the shapes of the tensors tell it"
_TEXT_ONLY = "about images, and positions of text are the same in every section"
# Keys behind the architecture without an effect, and why.
_HARMLESS = {
    "vocab_size": _SHAPES_TELL,
    "expert_shared_count": _SHAPES_TELL,
    "rope.dimension_sections": _TEXT_ONLY,
    "rope.mrope_section": _TEXT_ONLY,
    "rope.mrope_interleaved": _TEXT_ONLY,
    "mrope_sections": _TEXT_ONLY,
    "mrope_interleaved": _TEXT_ONLY,
    "image_token_id": _TEXT_ONLY,
    "vision_start_token_id": _TEXT_ONLY,
    "vision_end_token_id": _TEXT_ONLY,
    "n_deepstack_layers": _TEXT_ONLY,
}
# Prefixes of keys behind the architecture: the first is read as a whole, the second is about images.
_ROPE_SCALING, _VISION = "rope.scaling.", "vision."
# Prefixes of other keys without an effect, and why.
_HARMLESS_PREFIXES = {
    "general.": "describes the file and where it comes from",
    "quantize.": "describes how the file was quantised; every tensor names its own type",
    "imatrix.": "describes how the file was quantised",
    "split.": "read with the parts of the model",
    "tokenizer.ggml.": "the tokens, their types and merges are read; the others are names of ids that no text needs",
    "clip.": _TEXT_ONLY,
    "adapter.": "describes an adapter that is merged already; a separate one has no whole model",
}
_USED_KEYS = ("tokenizer.chat_template",)
_HARMLESS_KEYS = {"tokenizer.huggingface.json": "the same tokenizer again"}
# Values with which a key changes nothing, by the end of the key: the model's only behaviour. Others are refused.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "expert_weights_norm": (True,),
    "norm_top_k_prob": (True,),
    "expert_gating_func": (0, 1),  # none given, softmax
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "ssm.v_head_reordered": (True,),
}
_ADDED = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}


def check_value_types(file: Path, metadata: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a value of a type that the key cannot have, or one that asks for another model."""
    architecture = metadata.get("general.architecture")

    def expect(key: str, is_right: Callable[[Any], bool], expected: str) -> None:
        if key in metadata and not is_right(metadata[key]):
            shown = repr(metadata[key])
            shown = shown if len(shown) <= 60 else shown[:60] + "..."
            raise CheckpointError(f"{file}: the metadata {key} is {shown}, expected {expected}. {REDOWNLOAD}")

    expect("general.architecture", lambda value: isinstance(value, str), "a text")
    expect(f"{architecture}.rope.scaling.type", lambda value: isinstance(value, str), "a text such as 'yarn'")
    expect(f"{architecture}.attention.recurrent_layers", _is_list_of(bool), "a list with true or false for each layer")
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"):
        expect(key, lambda value: isinstance(value, str), "a text")
    for name in ("bos", "eos", "eot"):
        expect(f"tokenizer.ggml.{name}_token_id", _is_id, "the id of a token")
    for key in ("tokens", "merges"):
        expect(f"tokenizer.ggml.{key}", _is_list_of(str), "a list of texts")
    expect("tokenizer.ggml.token_type", _is_list_of(int), "a list of numbers")
    for name, values in _ONLY_VALUES.items():
        only = " or ".join(dict.fromkeys(map(repr, values)))
        expect(f"{architecture}.{name}", values.__contains__, f"{only}, as the model has it")
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if tokens is not None and types is not None and len(types) != len(tokens):
        raise CheckpointError(
            f"{file}: tokenizer.ggml.token_type has {len(types):,} entries, expected {len(tokens):,}, one for each "
            f"token. {REDOWNLOAD}"
        )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list_of(item: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(entry, item) for entry in value)


def is_harmless_metadata(key: str) -> bool:
    """Return whether a key may have any value: it is in no list of what is read or refused."""
    behind = key.partition(".")[2]
    return behind in _HARMLESS or key in _HARMLESS_KEYS or any(key.startswith(start) for start in _HARMLESS_PREFIXES)


def warn_of_unknown_metadata(file: Path, metadata: Mapping[str, Any]) -> None:
    """Warn of metadata without an effect on this program that might have one elsewhere; see `warn_of_unknown_keys`.

    Warns:
        CheckpointWarning: keys that no reader here knows, or a beginning of text that is never added.
    """
    prefix = f"{metadata.get('general.architecture')}."
    used = {*(prefix + key for key in (*_USED, *_ONLY_VALUES)), *_USED_KEYS}
    used |= {key for key in metadata if key.startswith((prefix + _ROPE_SCALING, "general.sampling."))}
    harmless = {prefix + key: reason for key, reason in _HARMLESS.items()} | _HARMLESS_KEYS
    harmless |= {key: _TEXT_ONLY for key in metadata if key.startswith(prefix + _VISION)}
    for key in metadata:
        reason = next((why for start, why in _HARMLESS_PREFIXES.items() if key.startswith(start)), None)
        if reason is not None and metadata[key] == _ADDED.get(key, metadata[key]):
            harmless.setdefault(key, reason)
    warn_of_unknown_keys(f"{file}: its metadata have", metadata, used, harmless, stacklevel=5)
