"""GGUF files as other converters write them: whose metadata are wrong, with other names, types, factors and parts."""

import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from checkpoints import CheckpointError, CheckpointWarning, GgufFile, open_checkpoint
from checkpoints.gguf.header import TENSOR_TYPES
from checkpoints.gguf.names import Convention, convert_tensor
from checkpoints.gguf.other_types import describe_type
from mtpjax.config import FULL, LINEAR
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.weight_map import check_source
from tests.helpers.gguf_files import (
    QUANTIZED_TYPES,
    GgufContents,
    Type,
    assert_same,
    change_entry,
    random_blocks,
    random_gguf,
)
from tests.helpers.quantized_encoders import encode_nvfp4

pytestmark = pytest.mark.fast
MTP = "blk.4."  # behind the four layers


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with an MTP head, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    random_gguf(path)
    return path


def ollama(contents: GgufContents) -> None:
    """Change names, metadata and parts to those of Ollama's own converter."""
    contents.rename(".ssm_dt.bias", ".ssm_dt")
    heads = contents.metadata[f"{contents.architecture}.attention.head_count_kv"]
    contents.set(
        attention__head_count_kv=[0, heads, 0, heads],
        full_attention_interval=None,
        rope__dimension_sections=[2, 1, 1],
        rope__mrope_interleaved=True,
        rope__mrope_section=[2, 1, 1],
        mrope_sections=[2, 1, 1],
        ssm__v_head_reordered=True,
        norm_top_k_prob=True,
        vision__block_count=1,
        vision__image_mean=[0.5, 0.5, 0.5],
        image_token_id=248056,
    )
    for name in ("v.blk.0.attn_q.weight", "v.pos_embed.weight", "mm.0.weight", "mtp.fc.weight"):
        contents.put(name, np.ones((4, 4)))


def test_a_blob_of_ollama_is_the_same_model(original: Path, tmp_path: Path) -> None:
    """llama.cpp 25334, 22954: no ending, other spellings, and images and an MTP head in the same file."""
    contents = GgufContents.read(original)
    head = contents.drop(MTP)
    contents.set(block_count=4, nextn_predict_layers=None)
    ollama(contents)
    blob = contents.write(tmp_path / "sha256-83c54730")
    with pytest.warns(
        CheckpointWarning, match=r"4 tensors have no effect, .* v\.\* \(2\), mm\.\* \(1\), mtp\.\* \(1\)"
    ):
        assert_same(blob, original, without="mtp.")
    contents.tensors |= head
    contents.set(block_count=5, nextn_predict_layers=1)
    for name in [name for name in contents.tensors if name.startswith(("v.", "mm.", "mtp."))]:
        del contents.tensors[name]
    assert_same(contents.write(tmp_path / "sha256-93c83617"), original)
    contents.set(ssm__v_head_reordered=False)
    with pytest.raises(CheckpointError, match="ssm.v_head_reordered is False, expected True"):
        open_checkpoint(contents.write(tmp_path / "sha256-0"))


def test_fused_gate_and_up_stay_packed(tmp_path: Path) -> None:
    """llama.cpp 19139, --fuse-gate-up-exps: the rows of the gate, then those of up."""
    random_gguf(tmp_path / "two.gguf", "q8_0")
    contents = GgufContents.read(tmp_path / "two.gguf")
    for block in range(5):
        names = [f"blk.{block}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        fused = np.concatenate([contents.tensors.pop(name)[0] for name in names], axis=1)
        contents.tensors[f"blk.{block}.ffn_gate_up_exps.weight"] = (fused, Type.Q8_0)
    assert_same(contents.write(tmp_path / "one.gguf"), tmp_path / "two.gguf")
    found, expected = GgufFile(tmp_path / "one.gguf"), GgufFile(tmp_path / "two.gguf")
    for name in ("layers.0.mlp.experts.gate_up_proj", "mtp.layers.0.mlp.experts.gate_up_proj"):
        packed, wanted = found.read_packed(name), expected.read_packed(name)
        assert packed is not None and wanted is not None and packed.arrays.keys() == wanted.arrays.keys()
        for field, array in wanted.arrays.items():
            np.testing.assert_array_equal(packed.arrays[field], array)


def nvfp4_values(blocks: np.ndarray, factor: float) -> np.ndarray:
    """Return E2M1 times (E4M3 times the factor), each product rounded to float32, with the package's own tables."""
    quant = gguf.quants.NVFP4
    raw = blocks.reshape(-1, 36)
    scale = quant.ue4m3_to_fp32(raw[:, :4]).astype(np.float32) * np.float32(factor)
    nibbles = raw[:, 4:].reshape(-1, 4, 8)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    values = np.asarray(quant.kvalues, np.float32)[codes] * scale[..., None]
    return values.reshape(*blocks.shape[:-1], -1)


@pytest.mark.parametrize("ending", [".scale", ".weight.scale"])
def test_nvfp4_has_a_second_factor(ending: str, original: Path, tmp_path: Path) -> None:
    """llama.cpp 19769, lucebox 146: a factor for a matrix or an expert, under both names; of inputs, none is read."""
    contents = GgufContents.read(original)
    experts = np.linspace(0.5, 2.5, 8, dtype=np.float32)
    expected: dict[str, np.ndarray] = {}

    def replace(name: str, factor: Any) -> np.ndarray:
        values = contents.values(f"{name}.weight")
        blocks = random_blocks("NVFP4", int(np.prod(values.shape[:-1])), values.shape[-1] // 64, len(expected))
        blocks = blocks.reshape(*values.shape[:-1], -1)
        contents.tensors[f"{name}.weight"] = (blocks, Type.NVFP4)
        contents.put(name + ending, np.atleast_1d(factor))
        contents.put(f"{name}.input_scale", np.ones(1))
        many = np.broadcast_to(factor, values.shape[:1]) if values.ndim == 3 else [factor]
        parts = blocks if values.ndim == 3 else blocks[None]
        exact = np.stack([nvfp4_values(part, f) for part, f in zip(parts, many, strict=True)])
        plain = gguf.quants.dequantize(blocks, Type.NVFP4).reshape(exact.shape)
        rounded = plain * np.reshape(np.asarray(many, np.float32), (-1, 1, 1))
        assert (np.abs(exact - rounded) <= np.spacing(np.abs(rounded))).all()
        return exact if values.ndim == 3 else exact[0]

    expected["layers.1.self_attn.q_proj.weight"] = replace("blk.1.attn_q", np.float32(0.0123))
    expected["mtp.fc.weight"] = replace("blk.4.nextn.eh_proj", np.float32(3.3))
    gate, up = (replace(f"blk.0.ffn_{part}_exps", experts) for part in ("gate", "up"))
    expected["layers.0.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
    source = open_checkpoint(contents.write(tmp_path / "m.gguf"))
    assert isinstance(source, GgufFile)
    check_source(source)
    for name, values in expected.items():
        np.testing.assert_array_equal(source.read(name), values, err_msg=name)
        packed = source.read_packed(name)
        assert packed is not None and packed.layout == "codes4"
        np.testing.assert_array_equal(packed.dequantize(), values, err_msg=name)


def test_nvfp4_of_a_folder_and_of_its_conversion_are_the_same_bits(original: Path, tmp_path: Path) -> None:
    """The converter moves codes and E4M3 scales of modelopt as they are: elements j and j + 8 of 16 share a byte."""
    contents = GgufContents.read(original)
    tensors, value = encode_nvfp4(contents.values("blk.1.attn_q.weight"))
    pairs = tensors["weight"]
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1, 4, 2, 8)
    qs = (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(*codes.shape[:2], 32)
    scales = tensors["weight_scale"].view(np.uint8).reshape(*codes.shape[:2], 4)
    blocks = np.concatenate([scales, qs], axis=-1).reshape(len(pairs), -1)
    contents.tensors["blk.1.attn_q.weight"] = (blocks, Type.NVFP4)
    contents.put("blk.1.attn_q.scale", tensors["weight_scale_2"].reshape(1))
    source = open_checkpoint(contents.write(tmp_path / "m.gguf"))
    np.testing.assert_array_equal(source.read("layers.1.self_attn.q_proj.weight"), value)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("blk.1.attn_q.scale", np.ones(3), r"'blk.1.attn_q.scale' is F32 \[3\], expected one number, as the factor"),
        ("blk.0.ffn_up_exps.scale", np.ones(7), "one for each of 8 experts"),
        ("blk.0.nothing.scale", np.ones(1), "'blk.0.nothing.scale' is not a tensor of this model"),
        ("blk.1.attn_q.scale", np.array([np.nan]), "'blk.1.attn_q.scale' is NaN"),
    ],
)
def test_a_wrong_factor_is_named(name: str, values: np.ndarray, message: str, original: Path, tmp_path: Path) -> None:
    contents = GgufContents.read(original)
    contents.put(name, values)
    contents.write(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(open_checkpoint(tmp_path / "m.gguf"), dtype=np.dtype("float32"))


def test_two_factors_of_one_weight_are_refused(original: Path, tmp_path: Path) -> None:
    contents = GgufContents.read(original)
    contents.put("blk.1.attn_q.scale", np.ones(1))
    contents.put("blk.1.attn_q.weight.scale", np.ones(1))
    with pytest.raises(CheckpointError, match="two factors"):
        open_checkpoint(contents.write(tmp_path / "m.gguf"))


def test_the_head_falls_back_to_the_final_norm(original: Path, tmp_path: Path) -> None:
    """As llama.cpp does where `nextn.shared_head_norm` is missing (23563)."""
    contents = GgufContents.read(original)
    contents.drop(MTP + "nextn.shared_head_norm")
    source = open_checkpoint(contents.write(tmp_path / "m.gguf"))
    assert isinstance(source, GgufFile)
    check_source(source)
    np.testing.assert_array_equal(source.read("mtp.norm.weight"), source.read("norm.weight"))


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (34, "TQ1_0"),
        (41, "Q1_0"),
        (42, "Q2_0"),
        (45, "a type of a fork of llama.cpp, such as TURBO3_0, TQ3_1S"),
        (139, "IQ4_K of ik_llama.cpp"),
        (212, "Q4_K_R4 of ik_llama.cpp"),
        (99, "number 99"),
    ],
)
def test_a_type_that_is_not_read_has_its_name_in_the_error(number: int, name: str, tmp_path: Path) -> None:
    random_gguf(tmp_path / "m.gguf", "q8_0")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(change_entry(raw, b"blk.0.ssm_out.weight", type_number=number))
    with pytest.raises(CheckpointError, match=f"'blk.0.ssm_out.weight' has the type .*{name}") as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert "Use another file" in str(caught.value) and number not in TENSOR_TYPES


def test_no_type_that_is_read_is_described_as_unknown() -> None:
    """The package's own numbers: each is read, or has the package's name in the error."""
    for tensor_type in Type:
        if tensor_type not in TENSOR_TYPES:
            assert tensor_type.name in describe_type(tensor_type), tensor_type
        else:
            assert TENSOR_TYPES[tensor_type].name == tensor_type.name


def test_every_tensor_is_read_by_its_own_type(tmp_path: Path) -> None:
    """The type changes from tensor to tensor, through all that are read (llama.cpp 26264, sparkinfer 224).

    Among them gates of DeltaNet in Q8_0, whose heads are reordered after unpacking (candle 3821).
    """
    sizes: dict[str, Any] = {"hidden_size": 256, "expert_size": 256, "shared_expert_size": 256, "linear_v_heads": 8}
    random_gguf(tmp_path / "f32.gguf", num_superblocks=1, layer_pattern=(LINEAR, FULL), **sizes)
    contents = GgufContents.read(tmp_path / "f32.gguf")
    types = itertools.cycle(QUANTIZED_TYPES)
    used: set[str] = set()
    for seed, (name, (data, _)) in enumerate(list(contents.tensors.items())):
        if name.endswith(("ssm_alpha.weight", "ssm_beta.weight")):
            contents.put(name, data, Type.Q8_0)
        elif data.ndim > 1 and data.shape[-1] % 256 == 0 and "_inp" not in name:
            type_name = next(types)
            used.add(type_name)
            count = data.shape[-1] // QUANTIZED_TYPES[type_name].elements_per_block
            blocks = random_blocks(type_name, int(np.prod(data.shape[:-1])), count, seed, 1e-3)
            contents.tensors[name] = (blocks.reshape(*data.shape[:-1], -1), getattr(Type, type_name))
    assert used == set(QUANTIZED_TYPES)
    source = open_checkpoint(contents.write(tmp_path / "m.gguf"))
    assert isinstance(source, GgufFile)
    check_source(source)
    for name, (parts, convention) in source.stored.items():
        values = [contents.values(part.name).reshape(part.shape) for part in parts]
        if convention is Convention.GATE_UP:
            expected = np.concatenate(values, axis=1)
        else:
            expected = convert_tensor(values[0], convention, source.heads, to_gguf=False)
        np.testing.assert_array_equal(source.read(name), expected.astype(np.float32), err_msg=name)
        if (packed := source.read_packed(name)) is not None:
            np.testing.assert_array_equal(packed.dequantize(), source.read(name), err_msg=name)


def test_the_norm_before_the_experts_has_one_name(original: Path, tmp_path: Path) -> None:
    """It is `post_attention_norm`; a file with `ffn_norm` is of another architecture."""
    contents = GgufContents.read(original)
    contents.rename(".post_attention_norm.weight", ".ffn_norm.weight")
    source = open_checkpoint(contents.write(tmp_path / "m.gguf"))
    with pytest.raises(
        CheckpointError, match=r"post_attention_layernorm(.|\n)*'blk.0.ffn_norm.weight' is not a tensor"
    ):
        check_source(source)  # type: ignore[arg-type]
