"""Checkpoints in the forms in which models are published: dtypes, names, fused or separate experts, MTP or none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints import SafetensorsDirectory, write_safetensors_directory
from tests.golden.weights import golden_config, golden_tensors

BF16 = ml_dtypes.bfloat16
Tensors = dict[str, np.ndarray]
# Zeros of both signs, small numbers, which careless arithmetic flushes to zero, and a large one.
BITS = {2: [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x7B7F], 4: [0x00000000, 0x80000000, 0x00000001, 0x7F000000]}


def cast(tensors: Tensors, dtype: Any, **others: Any) -> Tensors:
    """Return the tensors as `dtype`; a tensor whose name contains a key of `others` gets the dtype there.

    The first values of each become `BITS`.
    """
    converted = {}
    for name, array in tensors.items():
        tensor_dtype = next((other for part, other in others.items() if part in name), dtype)
        converted[name] = array.astype(tensor_dtype)
        codes = converted[name].reshape(-1).view(f"u{np.dtype(tensor_dtype).itemsize}")
        if codes.size > 8:
            codes[: len(BITS[codes.itemsize])] = BITS[codes.itemsize]
    return converted


def unfuse_experts(tensors: Tensors, *within: str) -> Tensors:
    """Return one tensor per matrix of an expert, in the layers whose names begin with `within`."""
    unfused: Tensors = {}
    for name, array in tensors.items():
        stem, dot, kind = name.partition(".experts.")
        if not dot or not name.startswith(within):
            unfused[name] = array
            continue
        for number, expert in enumerate(array):
            parts = (
                zip(("gate_proj", "up_proj"), np.split(expert, 2), strict=True)
                if "gate" in kind
                else [("down_proj", expert)]
            )
            unfused |= {f"{stem}.experts.{number}.{part}.weight": values.copy() for part, values in parts}
    return unfused


def rename(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors with names that begin with `prefix` in place of "model.", as in a multimodal checkpoint."""
    return {name.replace("model.", prefix, 1) if name.startswith("model.") else name: a for name, a in tensors.items()}


def moe_fused() -> tuple[str, Tensors]:
    """As Qwen3.5 is published: decay rates and DeltaNet norms in float32."""
    tensors = cast(golden_tensors("moe_r1"), BF16, A_log=np.float32, **{"linear_attn.norm": np.float32})
    return "moe_r1", rename(tensors, "model.language_model.")


def moe_separate_mtp_experts() -> tuple[str, Tensors]:
    """As Qwen3.5 is published, too: fused experts in the trunk, separate ones in the MTP head."""
    return "moe_r1", cast(unfuse_experts(golden_tensors("moe_r1"), "mtp."), BF16)


def moe_separate_experts() -> tuple[str, Tensors]:
    """Separate experts, with three dtypes in one stack of experts."""
    mixed = {"experts.3.": np.float32, "experts.5.up": np.float16, "dt_bias": np.float32}
    return "moe_r3", cast(unfuse_experts(golden_tensors("moe_r3"), "model.", "mtp."), BF16, **mixed)


def dense_tied() -> tuple[str, Tensors]:
    return "dense_r1", cast(golden_tensors("dense_r1"), np.float16)


def dense_without_mtp() -> tuple[str, Tensors]:
    """Eight layers, two repeats of the pattern, float32."""
    tensors = cast(golden_tensors("dense_r2"), np.float32, down_proj=BF16)
    return "dense_r2", {name: a for name, a in tensors.items() if not name.startswith("mtp.")}


PublishedModel = Callable[[], tuple[str, Tensors]]
MODELS: list[PublishedModel] = [
    moe_fused,
    moe_separate_mtp_experts,
    moe_separate_experts,
    dense_tied,
    dense_without_mtp,
]


def write(path: Path, case: str, tensors: Tensors, **config: Any) -> Path:
    """Write the tensors with the config of a golden case, changed by `config`; return `path`."""
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()]
    write_safetensors_directory(path, golden_config(case) | config, entries, generation_config={"eos_token_id": [7]})
    return path


def contents(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Return dtype and bytes of all tensors of a folder by published name."""
    source = SafetensorsDirectory(folder)
    return {info.name: (info.dtype.name, source.read(name).tobytes()) for name, info in source.tensors.items()}
