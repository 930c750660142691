"""A GGUF file as a checkpoint: its metadata as a config, its tensors by canonical name, dequantised as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import not_finite
from checkpoints.errors import CheckpointError
from checkpoints.folder import unreadable
from checkpoints.gguf.block_types import repack_rows, unpack_rows
from checkpoints.gguf.header import GgufTensor, read_gguf_header
from checkpoints.gguf.names import Heads, converted, names
from checkpoints.packed_array import PackedArray, concatenated
from checkpoints.source import TensorInfo

ARCHITECTURES = {"qwen35moe": "qwen3_5_moe_text", "qwen35": "qwen3_5_text"}
PIECE_ELEMENTS = 1 << 20  # values dequantised at a time
_IGNORED = ("rope_freqs.weight",)


class GgufFile:
    """A `TensorSource` over one GGUF file of the architecture `qwen35moe` or `qwen35`, with or without its MTP block.

    Opening reads metadata and the table of tensors, no weights. Values are those of ggml's own dequantiser in float32,
    in the conventions of the published checkpoints (`checkpoints/gguf_names.py`). Raises CheckpointError for a file that
    is damaged, of another architecture, or has tensors of an unsupported type.
    """

    kind = "gguf"
    tokenizer_file = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata, stored = read_parts(self.path)
        self.config = _config(self.path, self.metadata, stored)
        self.generation_config = {"eos_token_id": _stops(self.metadata)}
        cfg = self.config
        self._heads = Heads(
            cfg["linear_num_key_heads"],
            cfg["linear_num_value_heads"],
            cfg["linear_key_head_dim"],
            cfg["linear_value_head_dim"],
        )
        self._parts: dict[str, tuple[tuple[GgufTensor, ...], str]] = {}
        used = set(_IGNORED)
        for name, (theirs, how) in names(cfg["layer_types"], cfg["mtp_num_hidden_layers"] > 0).items():
            if all(t in stored for t in theirs):
                self._parts[name] = (tuple(stored[t] for t in theirs), how)
                used.update(theirs)
        for name, tensor in stored.items():
            if name not in used:
                self._parts[name] = ((tensor,), "")  # the loader lists it as unexpected
        table = {name: _info(*entry) for name, entry in self._parts.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(table)

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """Dequantise tensor `name` (canonical) into `out`: the shape of `tensors[name]`, any float dtype.

        Raises CheckpointError when there is no such tensor, the shape differs, the file ends early, or a value is NaN or
        infinite.
        """
        if name not in self._parts:
            raise CheckpointError(f"{self.path}: has no tensor {name!r} among its {len(self.tensors):,}.")
        parts, how = self._parts[name]
        if out.shape != self.tensors[name].shape:
            raise CheckpointError(
                f"{self.path}: {name!r} has shape {list(self.tensors[name].shape)}, expected {list(out.shape)}."
            )
        if how == "gate and up":
            half = parts[0].shape[1]
            targets = [out[:, :half], out[:, half:]]
        else:
            targets = [out]
        for part, target in zip(parts, targets, strict=True):
            if how in ("", "gate and up"):
                self._stream(part, target)
            else:
                whole = np.empty(part.shape, np.float32)
                self._stream(part, whole)
                target[...] = converted(whole, how, self._heads, to_gguf=False)
            if check_finite and not_finite(target).any():
                raise CheckpointError(
                    f"{part.file}: {part.name!r} has NaN or infinite values, expected none. Download it again."
                )

    def read(self, name: str) -> NDArray[Any]:
        """Tensor `name` (canonical) as a new array of the shape and dtype in `tensors`; raises as `read_into`."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name!r} among its {len(self.tensors):,}.")
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_into(name, out)
        return out

    def read_packed(self, name: str) -> PackedArray | None:
        """Tensor `name` (canonical) packed as in the file, exactly; None where it is plain or a vector.

        Value heads are put in the published order: rows, and columns by whole blocks of 32, move without requantising.
        """
        parts, how = self._parts[name]
        heads = self._heads
        if any(p.type.repack is None for p in parts) or how not in ("", "gate and up", "rows", "value rows", "columns"):
            return None
        if how == "columns" and heads.value_dim % 32:
            return None

        def whole(part: GgufTensor) -> PackedArray:
            rows = concatenated([repack_rows(part.type, raw) for _, raw in self._pieces(part)], axis=0)
            return rows.each(lambda x: x.reshape(*part.shape[:-1], -1))

        if how == "gate and up":
            return concatenated([whole(part) for part in parts], axis=1)
        packed = whole(parts[0])
        if how == "columns":
            size = heads.values * heads.value_dim  # of which an entry of codes or scales may hold several

            def columns(x: NDArray[Any]) -> NDArray[Any]:
                per_head = heads.value_dim * x.shape[1] // size
                return np.ascontiguousarray(heads.reorder(np.ascontiguousarray(x.T), per_head, to_gguf=False).T)

            return packed.finer(heads.value_dim).each(columns)
        return packed.each(lambda x: converted(x, how, heads, to_gguf=False))

    def _stream(self, tensor: GgufTensor, out: NDArray[Any]) -> None:
        """Values of a tensor as stored, some rows at a time, into `out` of the same shape (views are welcome)."""
        flat = out.reshape(-1, *out.shape[-1:]) if out.ndim == 1 or out.flags.c_contiguous else None
        for start, raw in self._pieces(tensor):
            with np.errstate(invalid="ignore", over="ignore"):
                values = unpack_rows(tensor.type, raw)
            if flat is not None:
                flat[start : start + len(values)] = values
                continue
            per = tensor.shape[-2]
            for row, value in enumerate(values, start):
                out[row // per, row % per] = value

    def _pieces(self, tensor: GgufTensor) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """First row and bytes `[rows, bytes of a row]` of the pieces of a tensor."""
        width = tensor.shape[-1]
        rows, row_bytes = (
            int(np.prod(tensor.shape[:-1], dtype=np.int64)),
            width // tensor.type.elements * tensor.type.size,
        )
        step = max(1, PIECE_ELEMENTS // width)
        try:
            with open(tensor.file, "rb", buffering=0) as stream:
                stream.seek(tensor.offset)
                for start in range(0, rows, step):
                    count = min(step, rows - start)
                    raw = np.fromfile(stream, np.uint8, count * row_bytes)
                    if raw.size != count * row_bytes:
                        raise CheckpointError(
                            f"{tensor.file}: ends inside {tensor.name!r}; it was longer when it was opened. Download it again."
                        )
                    yield start, raw.reshape(count, row_bytes)
        except OSError as error:
            raise unreadable(tensor.file, error) from error


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors by name of a GGUF file, or of all files of one that was split, found beside the first.

    Raises:
        CheckpointError: a part is missing, is none of this model, or is not the first; or as `read_gguf_header`.
    """
    metadata, tensors = read_gguf_header(path)
    count, number = metadata.get("split.count", 0), metadata.get("split.no", 0)
    stored = {tensor.name: tensor for tensor in tensors}
    if not isinstance(count, int) or count < 2:
        return metadata, stored
    ending = f"-of-{count:05d}.gguf"
    stem = path.name.removesuffix(f"-{number + 1:05d}{ending}")
    if number != 0 or stem == path.name:
        first = f"{stem if stem != path.name else 'NAME'}-00001{ending}"
        raise CheckpointError(
            f"{path}: is part {number + 1} of {count} of a split model. Open '{first}', with all parts beside it."
        )
    for other in range(1, count):
        file = path.with_name(f"{stem}-{other + 1:05d}{ending}")
        if not file.is_file():
            raise CheckpointError(
                f"{file}: is missing, part {other + 1} of {count} of the model that '{path.name}' begins."
            )
        theirs, more = read_gguf_header(file)
        if (theirs.get("split.no"), theirs.get("split.count")) != (other, count) or any(t.name in stored for t in more):
            raise CheckpointError(f"{file}: is not part {other + 1} of {count} of the model that '{path.name}' begins.")
        stored |= {tensor.name: tensor for tensor in more}
    wanted = metadata.get("split.tensors.count", len(stored))
    if wanted != len(stored):
        raise CheckpointError(
            f"{path}: its {count} parts have {len(stored)} tensors, expected {wanted}. Download them again."
        )
    return metadata, stored


def _info(parts: tuple[GgufTensor, ...], how: str) -> TensorInfo:
    first = parts[0]
    shape = first.shape
    if how == "gate and up":
        shape = (shape[0], sum(part.shape[1] for part in parts), *shape[2:]) if len(shape) == 3 else shape
    elif how == "row":
        shape = (1, *shape) if len(shape) == 1 else shape
    elif how == "convolution":
        shape = (shape[0], 1, *shape[1:])
    dtype = first.type.dtype if first.type.dtype is not None and how != "norm" else np.dtype(np.float32)
    return TensorInfo(
        " + ".join(p.name for p in parts), shape, dtype, first.file, first.offset, sum(p.nbytes for p in parts)
    )


def _config(file: Path, metadata: Mapping[str, Any], stored: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """The metadata as the flat config.json of the same model."""
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: has the architecture {arch!r}, supported: {', '.join(map(repr, ARCHITECTURES))}."
        )

    def get(key: str, kind: type | tuple[type, ...] = int, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(
                f"{file}: the metadata {arch}.{key} is {value!r}, expected a number. Is the file complete?"
            )
        return value

    def count(key: str, default: Any = None) -> int:
        """A whole number above zero; a list a layer counts by its largest."""
        value = get(key, (int, list), default)
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) or max(numbers) < 1:
            raise CheckpointError(f"{file}: the metadata {arch}.{key} is {value!r}, expected a number above zero.")
        return max(numbers)

    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{file}: has no tensor 'token_embd.weight'. Is it a whole model, not a part of one?")
    mtp = get("nextn_predict_layers", int, 0)
    layers, every = count("block_count") - mtp, count("full_attention_interval", 4)
    if not 0 < layers <= 10_000:
        raise CheckpointError(
            f"{file}: {arch}.block_count is {layers + mtp} with {mtp} MTP blocks, expected 1 to 10,000 layers."
        )
    recurrent = metadata.get(f"{arch}.attention.recurrent_layers") or [(i + 1) % every != 0 for i in range(layers)]
    head_dim, values = count("attention.key_length"), count("ssm.time_step_rank")
    stops = _stops(metadata)
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[arch],
        "hidden_size": count("embedding_length"),
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent[:layers]],
        "num_attention_heads": count("attention.head_count"),
        "num_key_value_heads": count("attention.head_count_kv"),
        "head_dim": head_dim,
        "attn_output_gate": True,
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon', float, 1e-6):.6g}"),
        "rope_parameters": {
            "rope_type": metadata.get(f"{arch}.rope.scaling.type", "default").replace("none", "default"),
            "rope_theta": float(get("rope.freq_base", (int, float))),
            "partial_rotary_factor": count("rope.dimension_count", head_dim) / head_dim,
        },
        "linear_num_key_heads": count("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_key_head_dim": count("ssm.state_size"),
        "linear_value_head_dim": count("ssm.inner_size") // values,
        "linear_conv_kernel_dim": count("ssm.conv_kernel"),
        "vocab_size": stored["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in stored,
        "max_position_embeddings": count("context_length"),
        "mtp_num_hidden_layers": mtp,
        "eos_token_id": stops,
    }
    if arch == "qwen35moe":
        config |= {
            "num_experts": count("expert_count"),
            "num_experts_per_tok": count("expert_used_count"),
            "moe_intermediate_size": count("expert_feed_forward_length"),
            "shared_expert_intermediate_size": count("expert_shared_feed_forward_length"),
        }
    else:
        config["intermediate_size"] = count("feed_forward_length")
    return config


def _stops(metadata: Mapping[str, Any]) -> list[int]:
    """Tokens that end a text: eos and end of turn by number, <|endoftext|> by name."""
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and "<|endoftext|>" in tokens:
        found.append(tokens.index("<|endoftext|>"))
    return list(dict.fromkeys(t for t in found if isinstance(t, int) and not isinstance(t, bool)))


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file that is named like GGUF, or has no ending of another format and begins like it."""
    file = Path(path)
    if not file.is_file() or file.suffix in (".safetensors", ".bin", ".pt"):
        return False
    if file.suffix == ".gguf":
        return True
    try:
        with open(file, "rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False
