"""Writing safetensors folders: the files read back, here and in `safetensors`, and an error leaves no file behind."""

import json
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from checkpoints import CheckpointError, SafetensorsDirectory, write_safetensors_directory

pytestmark = pytest.mark.fast

INDEX = "model.safetensors.index.json"
ARRAYS: dict[str, np.ndarray] = {
    "model.norm.weight": np.arange(3, dtype=np.float32),
    "model.layers.0.a": np.arange(5, dtype=np.int8),
    "model.layers.0.b": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    "lm_head.weight": np.array(7, np.int64),
    "mtp.empty": np.zeros((0, 3), np.float32),
}


def entries(arrays: dict[str, np.ndarray]) -> list[tuple]:
    """Return the arrays as name, shape, dtype and function, the argument of `write_safetensors_directory`."""
    return [(name, array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()]


def test_small_models_are_one_file_that_safetensors_reads(tmp_path: Path) -> None:
    write_safetensors_directory(tmp_path / "a" / "m", {"größe": 1}, entries(ARRAYS))
    folder = tmp_path / "a" / "m"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == {"größe": 1}
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    write_safetensors_directory(tmp_path / "m", {}, entries(ARRAYS))
    source = SafetensorsDirectory(tmp_path / "m")
    assert min(info.offset for info in source.tensors.values()) % 8 == 0
    assert all(info.offset % info.dtype.itemsize == 0 for info in source.tensors.values())


def test_low_precision_types_survive(tmp_path: Path) -> None:
    types = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu)
    arrays = {f"layers.{i}.w": np.array([[0.5, 1, 2, 4]]).astype(dtype) for i, dtype in enumerate(types)}
    write_safetensors_directory(tmp_path / "m", {}, entries(arrays))
    source = SafetensorsDirectory(tmp_path / "m")
    for name, array in arrays.items():
        assert source.read(name).dtype == array.dtype and np.array_equal(source.read(name), array)
    raw = dict(safetensors.deserialize((tmp_path / "m" / "model.safetensors").read_bytes()))
    assert [raw[name]["dtype"] for name in arrays] == ["BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"]


def test_large_models_are_split_in_the_given_order(tmp_path: Path) -> None:
    arrays = {"norm.weight": np.full(50, 9, np.int8)}  # larger than a shard
    arrays |= {f"layers.{i}.w": np.full(10, i, np.int8) for i in range(5)}
    write_safetensors_directory(tmp_path / "m", {}, entries(arrays), max_shard_bytes=25)
    shards = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == sorted([*shards, INDEX, "config.json"])
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 100}
    assert [index["weight_map"][name] for name in arrays] == [shards[i] for i in (0, 1, 1, 2, 2, 3)]
    source = SafetensorsDirectory(tmp_path / "m")
    assert all(np.array_equal(source.read(name), array) for name, array in arrays.items())


def test_other_files_are_copied(tmp_path: Path) -> None:
    tokenizer, template = tmp_path / "my_tokenizer.json", tmp_path / "chat_template.jinja"
    tokenizer.write_text('{"version": "1.0"}')
    template.write_text("{{ messages }}")
    write_safetensors_directory(
        tmp_path / "m",
        {},
        entries(ARRAYS),
        generation_config={"top_k": 20},
        tokenizer_file=tokenizer,
        extra_files=[template],
    )
    source = SafetensorsDirectory(tmp_path / "m")
    assert source.generation_config == {"top_k": 20}
    assert source.tokenizer_file is not None and source.tokenizer_file.read_text() == tokenizer.read_text()
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    arrays: list[weakref.ref] = []

    def make() -> np.ndarray:
        assert all(reference() is None for reference in arrays)
        array = np.zeros((64, 64), np.float32)
        arrays.append(weakref.ref(array))
        return array

    tensors = [(f"layers.{i}.w", (64, 64), np.float32, make) for i in range(4)]
    write_safetensors_directory(tmp_path / "m", {}, iter(tensors))
    assert len(arrays) == 4


def test_an_existing_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_safetensors_directory(tmp_path / "m", {}, entries(ARRAYS))  # empty: allowed
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="m: already exists and is not empty"):
        write_safetensors_directory(tmp_path / "m", {}, entries({"norm.weight": np.ones(3)}))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="already exists and is a file"):
        write_safetensors_directory(tmp_path / "file", {}, entries(ARRAYS))


def test_a_folder_that_fills_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def make() -> np.ndarray:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "precious").touch()
        return np.ones(3)

    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        write_safetensors_directory(tmp_path / "m", {}, [("norm.weight", (3,), np.float64, make)])
    assert [file.name for file in tmp_path.rglob("*")] == ["m", "precious"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_half_written_remains(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> np.ndarray:
        raise error("no more")

    tensors = [*entries(ARRAYS), ("mtp.fc.weight", (3,), np.float32, fail)]
    with pytest.raises(error, match="no more"):
        write_safetensors_directory(tmp_path / "m", {}, tensors, max_shard_bytes=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (("a", (2,), np.float64, lambda: np.ones(3)), r"'a' has shape \[3\] .* expected \[2\]"),
        (("a", (3,), np.float32, lambda: np.ones(3)), "dtype float64, .* and float32 as announced"),
        (("a", (3,), np.complex64, lambda: np.ones(3)), "'a' has dtype complex64, expected one of"),
        (("a", (3,), ">f4", lambda: np.ones(3)), "'a' has dtype >f4, expected one of"),
        (("a", (-1,), np.float32, lambda: np.ones(3)), r"'a' has shape \[-1\]"),
        (("lm_head.weight", (3,), np.float64, lambda: np.ones(3)), "two tensors are named 'lm_head.weight'"),
        (("__metadata__", (3,), np.float64, lambda: np.ones(3)), "safetensors reserves the name"),
    ],
)
def test_a_tensor_that_cannot_be_stored_is_rejected(tmp_path: Path, tensor: tuple, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_safetensors_directory(tmp_path / "m", {}, [*entries(ARRAYS), tensor])
    assert list(tmp_path.iterdir()) == []


def test_copies_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config\.json would be a second config\.json"):
        write_safetensors_directory(tmp_path / "m", {}, entries(ARRAYS), extra_files=[file])
    with pytest.raises(CheckpointError, match="would be a second model-extra.safetensors"):
        write_safetensors_directory(tmp_path / "m", {}, entries(ARRAYS), extra_files=["model-extra.safetensors"])
    with pytest.raises(CheckpointError, match="would be a second test_writer.py"):
        write_safetensors_directory(tmp_path / "m", {}, entries(ARRAYS), extra_files=[__file__, __file__])
    with pytest.raises(CheckpointError, match="gone.json: cannot be copied to .*, as it is not a file"):
        write_safetensors_directory(tmp_path / "m", {}, entries(ARRAYS), tokenizer_file=tmp_path / "gone.json")
    assert list(tmp_path.iterdir()) == []
