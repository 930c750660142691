"""Damaged and incomplete checkpoints: each is rejected with a message that names the problem."""

import json
import os
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save, save_file

from checkpoints import CheckpointError, SafetensorsDirectory, open_checkpoint
from checkpoints.safetensors.header import read_header

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def make_file(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with a header that may be damaged: raw bytes, or an object for JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    """Return a header entry for the data bytes `begin` to `end`."""
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def error_message(tmp_path: Path, content: bytes) -> str:
    """Return the message of the error for a checkpoint of this one file."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    return str(caught.value)


# One file

DAMAGED_HEADERS = {
    "not_json": (make_file(b"{broken"), "not valid JSON"),
    "not_utf8": (make_file(b'{"\xff":0}'), "not valid JSON"),
    "not_an_object": (make_file([1]), "header starts with b'['"),
    "empty_header": (make_file(b""), "header starts with b''"),
    "deeply_nested": (make_file(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "endless_number": (make_file(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "same_name_twice": (make_file(b'{"a":0,"a":1}'), "key 'a' occurs twice"),
    "metadata_no_table": (make_file({"__metadata__": 7}), "__metadata__"),
    "metadata_no_strings": (make_file({"__metadata__": {"step": 7}}), "__metadata__"),
    "entry_no_table": (make_file({"a": 5}), "'a' has no table of dtype, shape and data_offsets"),
    "entry_incomplete": (make_file({"a": {"dtype": "U8", "shape": [1]}}), "'a' has no table"),
    "unknown_dtype": (
        make_file({"a": entry(0, 4, dtype="F4")}, b"1234"),
        "'a' has dtype 'F4', expected one of BF16",
    ),
    "dtype_no_string": (make_file({"a": entry(0, 4, dtype=["U8"])}, b"1234"), "'a' has dtype ['U8']"),
    "shape_no_list": (make_file({"a": entry(0, 4, shape=4)}, b"1234"), "'a' has shape 4"),
    "shape_negative": (make_file({"a": entry(0, 4, shape=[-2, -2])}, b"1234"), "'a' has shape [-2, -2]"),
    "shape_fraction": (make_file({"a": entry(0, 4, shape=[4.0])}, b"1234"), "'a' has shape [4.0]"),
    "shape_bool": (make_file({"a": entry(0, 1, shape=[True])}, b"1"), "'a' has shape [True]"),
    "shape_huge": (make_file({"a": entry(0, 4, shape=[1 << 62, 1 << 62])}, b"1234"), "impossible shape"),
    "shape_huge_but_empty": (make_file({"a": entry(0, 0, shape=[0, 1 << 62, 1 << 62])}), "impossible shape"),
    "shape_of_65_axes": (make_file({"a": entry(0, 1, shape=[1] * 65)}, b"1"), "'a' has shape [1, 1"),
    "offsets_three": (
        make_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}),
        "data_offsets [0, 1",
    ),
    "offsets_swapped": (make_file({"a": entry(4, 0, shape=[4])}, b"1234"), "'a' has data_offsets [4, 0]"),
    "offsets_negative": (make_file({"a": entry(-4, 0)}, b"1234"), "'a' has data_offsets [-4, 0]"),
    "wrong_size": (
        make_file({"a": entry(0, 4, shape=[2], dtype="F32")}, b"1234"),
        "that is 8 bytes, but .* hold 4",
    ),
    "overlap": (
        make_file({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"),
        "'b' begins 2 bytes before the end of 'a'",
    ),
    "gap": (make_file({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"), "between 'a' and 'b' are 2 bytes"),
    "gap_in_front": (make_file({"a": entry(2, 4)}, b"1234"), "between the header and 'a' are 2 bytes"),
    "outside": (make_file({"a": entry(0, 1 << 40)}, b"1234"), "1,099,511,627,772 bytes are missing, from 'a' on"),
    "too_long": (make_file({"a": entry(0, 4)}, b"123456"), "2 bytes after 'a' belong to no tensor"),
    "length_2_to_60": (
        (1 << 60).to_bytes(8, "little") + b"{}",
        "claims a header of 1,152,921,504,606,846,976",
    ),
    "length_of_7_bytes": (b"1234567", "has 7 bytes, too short"),
    "length_past_the_end": ((5).to_bytes(8, "little") + b"{}", "only 2 follow; 3 bytes are missing"),
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "no_tensors": (make_file({}), "no weights of a text model"),
    "vision_only": (make_file({"model.visual.a": entry(0, 1)}, b"1"), "no weights of a text model"),
}


@pytest.mark.parametrize("case", DAMAGED_HEADERS)
def test_a_damaged_header_is_rejected(tmp_path: Path, case: str) -> None:
    content, expected = DAMAGED_HEADERS[case]
    message = error_message(tmp_path, content)
    start, _, end = expected.partition(" .* ")
    assert start in message and end in message, message


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    content = save({"model.norm.weight": np.ones(64, np.float32)})
    message = error_message(tmp_path, content[:-100])
    assert "100 bytes are missing, from 'model.norm.weight' on" in message and "truncated" in message


def test_a_header_or_config_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    save_file({"norm.weight": np.ones(2)}, tmp_path / "model.safetensors")
    with open(tmp_path / "config.json", "wb") as stream:
        stream.truncate(100_000_001)  # a hole: takes no space on the disk
    with pytest.raises(CheckpointError, match=r"config\.json: has 100,000,001 bytes, expected at most 100,000,000"):
        open_checkpoint(tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="header of 100,000,001 bytes, expected at most 100,000,000"):
        read_header(tmp_path / "model.safetensors")


def test_two_names_of_one_weight_are_rejected(tmp_path: Path) -> None:
    arrays = {"model.norm.weight": np.ones(2), "model.language_model.norm.weight": np.ones(2)}
    message = error_message(tmp_path, save(arrays))
    assert all(repr(name) in message for name in (*arrays, "norm.weight"))


def test_the_same_tensor_in_two_files_is_rejected(tmp_path: Path) -> None:
    save_file({"norm.weight": np.ones(2)}, tmp_path / "consolidated.safetensors")
    message = error_message(tmp_path, save({"norm.weight": np.ones(2)}))
    assert "consolidated.safetensors" in message and "model.safetensors" in message


def test_a_file_that_changes_after_opening_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    save_file({"norm.weight": np.ones(64, np.float32)}, file)
    source = SafetensorsDirectory(tmp_path)
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="ends inside 'norm.weight'"):
        source.read("norm.weight")
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.read("norm.weight")


def test_bytes_other_than_0_and_1_are_rejected_as_bool(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(make_file({"a": entry(0, 3, dtype="BOOL")}, b"\0\1\2"))
    with pytest.raises(CheckpointError, match="'a' is BOOL"):
        SafetensorsDirectory(tmp_path).read("a")


# The folder


def write_shards(tmp_path: Path, weight_map: object = None) -> Path:
    """Write a checkpoint of two shards; `weight_map` replaces that of the index."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"model.norm.weight": np.ones(2)}, tmp_path / SHARDS[0])
    save_file({"lm_head.weight": np.ones(2)}, tmp_path / SHARDS[1])
    if weight_map is None:
        weight_map = {"model.norm.weight": SHARDS[0], "lm_head.weight": SHARDS[1]}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_a_missing_shard_is_named_with_its_index(tmp_path: Path) -> None:
    (write_shards(tmp_path) / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX}: names '{SHARDS[1]}', which does not exist .1 of 2"):
        open_checkpoint(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"has 1 files model-\*-of-00002.safetensors, expected 2"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.norm.weight": SHARDS[1], "lm_head.weight": SHARDS[1]})
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}: lacks 'model.norm.weight', which {INDEX}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [[], {"a": 5, "b": "x"}, {"a": ["x"]}, {"a": "../x"}, {"a": "/etc/passwd"}])
def test_a_damaged_index_is_rejected(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(write_shards(tmp_path, weight_map))


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "[" * 100_000, "\udcff"])
def test_a_damaged_config_is_rejected(tmp_path: Path, text: str) -> None:
    (write_shards(tmp_path) / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_path_without_a_checkpoint_is_rejected_with_advice(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nothing")
    assert "does not exist" in message(tmp_path / ("x" * 5000))
    for name, expected in {
        "a.gguf": "the version needs 4 bytes at byte 4, but the file has only 4",
        "a.safetensors": "single file",
        "a.bin": "unknown",
    }.items():
        (tmp_path / name).write_bytes(b"GGUF")
        assert name in message(tmp_path / name) and expected in message(tmp_path / name)
    without_config = message(tmp_path)
    assert "has no config.json; found a.bin, a.gguf, a.safetensors" in without_config and "GGUF" in without_config
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert "config.json but no weights; found a.bin, a.gguf, config.json" in message(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors: cannot be read" in message(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "model.safetensors: cannot be read" in message(tmp_path)


# Random damage


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    """A damaged header raises CheckpointError, or the reference reader reads the same names and shapes from it."""
    arrays = {
        "model.embed_tokens.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "model.norm.weight": np.ones(3, ml_dtypes.bfloat16),
        "mtp.fc.weight": np.zeros((2, 2), np.int8),
    }
    content = save(arrays, {"format": "pt"})
    header_end = 8 + int.from_bytes(content[:8], "little")
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    rng = random.Random(0)
    num_opened = 0
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            damaged[rng.randrange(header_end)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            source = SafetensorsDirectory(tmp_path)
        except CheckpointError:
            continue
        num_opened += 1
        reference = {name: tensor["shape"] for name, tensor in safetensors.deserialize(bytes(damaged))}
        assert {info.name: list(info.shape) for info in read_header(file)} == reference
        for name, info in source.tensors.items():
            source.read_into(name, np.empty(info.shape, info.dtype), check_finite=False)
    assert 10 < num_opened < 590


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    content = save({"model.norm.weight": np.ones(5, np.float32), "lm_head.weight": np.ones(3, np.float16)})
    file = tmp_path / "model.safetensors"
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_header(file)
