"""Reading safetensors folders: their files, the names of their tensors, and the values in memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import CheckpointError, OrbaxDirectory, SafetensorsDirectory, open_checkpoint, read_tensor
from checkpoints.dtypes import DTYPES, is_float, non_finite
from checkpoints.names import canonical_name
from checkpoints.safetensors.header import encode_header

pytestmark = pytest.mark.fast

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
FLOATS = [dtype for dtype in DTYPES.values() if is_float(dtype)]
PREFIXES = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


def make_folder(path: Path, files: dict[str, dict[str, np.ndarray]], index: dict | None = None) -> Path:
    """Write a checkpoint with the `safetensors` package: {file name: {tensor name: array}}."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "qwen3_5_text"}')
    for name, arrays in files.items():
        save_file(arrays, path / name)
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def small_integers(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return up to 200 distinct small integers, exact in every float type from bfloat16 up."""
    return (np.arange(np.prod(shape)).reshape(shape) % 200 - 100).astype(dtype)


# Folders


def test_one_file_of_every_dtype_reads_back_bit_for_bit(tmp_path: Path) -> None:
    arrays = {name: small_integers((3, 5)).astype(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    arrays |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), BF16)}
    source = SafetensorsDirectory(make_folder(tmp_path / "m", {"model.safetensors": arrays}))
    assert source.path == tmp_path / "m"
    assert set(source.tensors) == set(arrays)
    for name, array in arrays.items():
        info, read = source.tensors[name], source.read(name)
        assert (info.shape, info.dtype, info.nbytes) == (array.shape, array.dtype, array.nbytes)
        assert read.dtype == array.dtype and read.tobytes() == array.tobytes()


def test_the_header_may_name_tensors_in_any_order(tmp_path: Path) -> None:
    offsets = {"c": (4, 6), "empty": (4, 4), "a": (0, 2), "b": (2, 4)}
    header = {name: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for name, (b, e) in offsets.items()}
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"012345")
    source = SafetensorsDirectory(tmp_path)
    assert {name: source.read(name).tobytes() for name in offsets} == {
        name: b"012345"[begin:end] for name, (begin, end) in offsets.items()
    }


def test_configs_and_tokenizer_are_found(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"model.safetensors": {"norm.weight": small_integers((2,))}})
    source = open_checkpoint(folder)
    assert source.config == {"model_type": "qwen3_5_text"}
    assert source.generation_config == {} and source.tokenizer_file is None
    (folder / "generation_config.json").write_text('{"eos_token_id": [248046, 248044]}')
    (folder / "tokenizer.json").write_text("{}")
    source = open_checkpoint(str(folder))
    assert source.generation_config == {"eos_token_id": [248046, 248044]}
    assert source.tokenizer_file == folder / "tokenizer.json"


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_and_a_file_outside_the_index_are_read(tmp_path: Path, with_index: bool) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    files = {
        first: {"model.embed_tokens.weight": small_integers((4, 2), BF16)},
        second: {"lm_head.weight": small_integers((4, 2), BF16) + 1},
        "model_extra_tensors.safetensors": {"mtp.fc.weight": small_integers((2, 4))},
    }
    index = {"model.embed_tokens.weight": first, "lm_head.weight": second} if with_index else None
    folder = make_folder(tmp_path / "m", files, index)
    (folder / "._model.safetensors").write_bytes(b"left by macOS")
    source = SafetensorsDirectory(folder)
    assert {name: info.file.name for name, info in source.tensors.items()} == {
        "embed_tokens.weight": first,
        "lm_head.weight": second,
        "mtp.fc.weight": "model_extra_tensors.safetensors",
    }
    assert np.array_equal(source.read("lm_head.weight"), small_integers((4, 2), BF16) + 1)


def test_an_orbax_folder_is_recognised_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "config.json").write_text('{"layers": 4}')
    source = open_checkpoint(tmp_path)
    assert isinstance(source, OrbaxDirectory)
    assert (source.path, source.params_path) == (tmp_path, tmp_path / "params")
    assert source.config == {"layers": 4} and source.generation_config == {} and source.tokenizer_file is None
    save_file({"norm.weight": small_integers((2,))}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\*\.safetensors and also a folder params/"):
        open_checkpoint(tmp_path)
    (tmp_path / "params").rmdir()
    with pytest.raises(CheckpointError, match="has no folder params/, found config.json, model.safetensors"):
        OrbaxDirectory(tmp_path)


# Names


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "layers.3.mlp.experts.gate_up_proj",
        "layers.0.linear_attn.A_log",
        "norm.weight",
        "lm_head.weight",
        "mtp.fc.weight",
        "mtp.layers.0.mlp.experts.7.down_proj.weight_scale_inv",
    ],
)
def test_every_prefix_leads_to_the_canonical_name(prefix: str, name: str) -> None:
    assert canonical_name(prefix + name) == name


@pytest.mark.parametrize(
    "raw",
    [
        "model.visual.blocks.0.attn.qkv.weight",
        "visual.merger.norm.weight",
        "model.vision_tower.patch_embed.proj.weight",
        "model.language_model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
    ],
)
def test_tensors_outside_the_text_model_are_ignored(raw: str) -> None:
    assert canonical_name(raw) is None


def test_an_unknown_name_is_returned_without_its_prefix() -> None:
    assert canonical_name("model.layers.0.surprise.weight") == "layers.0.surprise.weight"
    assert canonical_name("visual") == "visual" and canonical_name("model") == "model"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_tensors_of_a_file_are_found_by_canonical_name(tmp_path: Path, prefix: str) -> None:
    arrays = {f"{prefix}norm.weight": small_integers((8,)), "model.visual.pos_embed.weight": small_integers((2, 2))}
    source = SafetensorsDirectory(make_folder(tmp_path / "m", {"model.safetensors": arrays}))
    assert list(source.tensors) == ["norm.weight"]
    assert source.tensors["norm.weight"].name == f"{prefix}norm.weight"
    assert np.array_equal(source.read("norm.weight"), small_integers((8,)))


# Reading into the memory of the caller


@pytest.mark.parametrize("chunk_bytes", [1, 24, 1 << 20])
@pytest.mark.parametrize("target", [np.float32, np.float64, np.float16, BF16, FP8])
@pytest.mark.parametrize("stored", [np.float32, np.float64, np.float16, BF16, FP8])
def test_floats_are_converted_like_astype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Any, target: Any, chunk_bytes: int
) -> None:
    monkeypatch.setattr(read_tensor, "CHUNK_BYTES", chunk_bytes)
    array = (np.random.default_rng(0).standard_normal((3, 7)) * 3).astype(stored)
    source = SafetensorsDirectory(make_folder(tmp_path / "m", {"model.safetensors": {"norm.weight": array}}))
    stack = np.full((3, 3, 7), 9, target)
    source.read_into("norm.weight", stack[1])
    assert stack[1].tobytes() == array.astype(target).tobytes()
    assert (stack[0] == 9).all() and (stack[2] == 9).all()


def test_conversion_needs_memory_for_a_few_chunks(tmp_path: Path) -> None:
    shape = (1 << 12, 1 << 12)  # 32 MiB in the file, 64 MiB in memory
    (tmp_path / "config.json").write_text("{}")
    header = encode_header([("norm.weight", shape, np.dtype(BF16))])
    with open(tmp_path / "model.safetensors", "wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + 2 * shape[0] * shape[1])
    source = SafetensorsDirectory(tmp_path)
    as_float32 = np.ones(shape, np.float32)
    as_stored = np.ones(shape, BF16)
    tracemalloc.start()
    source.read_into("norm.weight", as_float32)
    source.read_into("norm.weight", as_stored)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20, f"{peak:,} bytes"
    assert not as_float32.any() and not as_stored.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_non_finite_agrees_with_numpy_on_every_bit_pattern(dtype: np.dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32)
    if dtype.itemsize <= 2:
        all_values = bits[: 1 << 8 * dtype.itemsize].astype(f"u{dtype.itemsize}").view(dtype)
    else:
        all_values = np.array([0, 1, -1e30, np.inf, -np.inf, np.nan], dtype)
    with np.errstate(invalid="ignore"):
        expected = ~np.isfinite(all_values.astype(np.float64))
    assert np.array_equal(non_finite(all_values), expected)


@pytest.mark.parametrize("target", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("stored", [np.float32, BF16, np.float16])
def test_nan_and_infinity_are_rejected_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Any, target: Any
) -> None:
    monkeypatch.setattr(read_tensor, "CHUNK_BYTES", 16)
    array = np.ones((4, 9), stored)
    array[2, 5], array[3, 0], array[3, 8] = np.nan, np.inf, -np.inf
    source = SafetensorsDirectory(make_folder(tmp_path / "m", {"model.safetensors": {"model.norm.weight": array}}))
    out = np.zeros((4, 9), target)
    with pytest.raises(CheckpointError) as caught:
        source.read_into("norm.weight", out)
    for part in ("model.safetensors", "'model.norm.weight'", "3 NaN or infinite", "of 36", "index [2, 5]"):
        assert part in str(caught.value)
    source.read_into("norm.weight", out, check_finite=False)
    assert np.array_equal(out, array.astype(target), equal_nan=True)


def test_values_too_large_for_the_target_type_are_rejected(tmp_path: Path) -> None:
    array = np.array([[1.0, 70000.0], [-1e30, 0.0]], np.float32)
    source = SafetensorsDirectory(make_folder(tmp_path / "m", {"model.safetensors": {"norm.weight": array}}))
    with pytest.raises(CheckpointError, match=r"\(float32\) has 2 values of 4, .*\[0, 1\].*large for float16"):
        source.read_into("norm.weight", np.empty((2, 2), np.float16))
    source.read_into("norm.weight", np.empty((2, 2), BF16))


def test_a_wrong_target_or_name_is_rejected(tmp_path: Path) -> None:
    arrays = {"layers.0.qweight": small_integers((2, 6), np.int32), "norm.weight": small_integers((2, 6))}
    source = SafetensorsDirectory(make_folder(tmp_path / "m", {"model.safetensors": arrays}))
    with pytest.raises(CheckpointError, match=r"'norm.weight' has shape \[2, 6\], expected \[3, 4\]"):
        source.read_into("norm.weight", np.empty((3, 4), np.float32))
    for target in (np.float32, np.int16, np.int8):
        with pytest.raises(CheckpointError, match=f"'layers.0.qweight' has dtype int32, .*{target.__name__}"):
            source.read_into("layers.0.qweight", np.empty((2, 6), target))
    with pytest.raises(CheckpointError, match="'norm.weight' has dtype float32, .* as int32"):
        source.read_into("norm.weight", np.empty((2, 6), np.int32))
    with pytest.raises(ValueError, match="C-contiguous"):
        source.read_into("norm.weight", np.empty((6, 2), np.float32).T)
    frozen = np.zeros((2, 6), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        source.read_into("norm.weight", frozen)
    with pytest.raises(CheckpointError, match=r"no tensor 'norm.weights' among its 2. .*norm.weight"):
        source.read("norm.weights")
    as_int64 = np.empty((2, 6), np.int64)
    source.read_into("layers.0.qweight", as_int64)
    assert np.array_equal(as_int64, arrays["layers.0.qweight"])
