"""GGUF: every block type is exact, the conventions are undone, and a damaged file is rejected with a clear message."""

import itertools
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import TINY, CheckpointError, GgufFile, open_checkpoint, write_gguf
from checkpoints.gguf import header as gguf_header
from checkpoints.gguf.block_types import repack_rows
from checkpoints.gguf.writer import encode_iq4_nl
from mtpjax import LLM, SamplingParams
from mtpjax.cli import convert
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.text.tokenizer import load_tokenizer
from tests.helpers.gguf_files import QUANTIZED_TYPES, change_entry, random_blocks, uint64
from tests.helpers.models import numpy_model, tiny_config

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "rotary_dim": 8, "linear_k_dim": 32, "linear_v_dim": 32}
SIZES |= {"expert_size": 32, "shared_expert_size": 32}


@pytest.mark.parametrize("name", QUANTIZED_TYPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 4))
def test_every_block_type_is_exact(name: str, seed: int, rows: int, blocks: int) -> None:
    """The values are those of the reference dequantiser, bit for bit, after repacking to codes, scales and offsets."""
    raw, block_type = random_blocks(name, rows, blocks, seed), QUANTIZED_TYPES[name]
    packed = repack_rows(block_type, raw)
    expected = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, name))
    np.testing.assert_array_equal(packed.dequantize().view(np.uint32), np.float32(expected).view(np.uint32))
    assert packed.codes.dtype == (np.int8 if packed.layout == "codes8" else np.uint8)
    assert packed.scale.shape == (rows, expected.shape[1] // packed.group)
    if block_type.bytes_per_block * 8 > 4 * block_type.elements_per_block:  # types of fewer bits take four bits here
        # Six-bit scales take eight bits, eight-bit ones sixteen; NVFP4 has one for 16 elements.
        assert packed.nbytes <= (1.12 if name == "NVFP4" else 1.06) * raw.nbytes
    assert packed.nbytes * 8 <= 5.2 * expected.size or packed.layout != "codes4" or packed.scale.dtype == np.float16
    for array in packed.split_super_groups(128).arrays.values():
        assert expected.shape[1] // array.shape[-1] <= 128
    np.testing.assert_array_equal(packed.split_super_groups(128).dequantize(), expected)


def save_random_model(cfg: ModelConfig, path: Path, tensor_type: str, seed: int = 0) -> Any:
    """Write a random model as GGUF and return it."""
    model = numpy_model(cfg, seed=seed)
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(model)]
    write_gguf(path, config_to_hf(cfg), tensors, tensor_type)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moe", "v_heads", "mtp"), [(True, 4, 1), (False, 6, 1), (True, 2, 0)], ids=["moe-2", "dense-3", "moe-1-no-mtp"]
)
def test_the_same_weights_give_the_same_logits(moe: bool, v_heads: int, mtp: int, tmp_path: Path) -> None:
    """A GGUF file in F32 gives the logits and drafts of the model in memory: all conventions are undone."""
    cfg = tiny_config(moe=moe, linear_v_heads=v_heads, mtp_layers=mtp, layer_pattern=(LINEAR, LINEAR, FULL))
    model = save_random_model(cfg, tmp_path / "m.gguf", "f32")
    in_memory, from_file = (
        LLM(model, num_speculative_tokens=2 * mtp, max_model_len=64),
        LLM(tmp_path / "m.gguf", dtype="float32", num_speculative_tokens=2 * mtp, max_model_len=64),
    )
    ids = np.random.default_rng(1).integers(0, 90, 40).tolist()
    np.testing.assert_allclose(from_file.logits(ids), in_memory.logits(ids), atol=1e-4)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    (a,), (b,) = (llm.generate([ids], params) for llm in (in_memory, from_file))
    assert a.token_ids == b.token_ids and a.metrics.num_accepted_tokens_per_pos == b.metrics.num_accepted_tokens_per_pos


@pytest.mark.parametrize("tensor_type", ["bf16", "q8_0", "q4_0", "iq4_nl"])
def test_values_are_those_of_the_reference_reader(tensor_type: str, tmp_path: Path) -> None:
    """The `gguf` package opens a written file and reads the same values, where GGUF has no convention of its own."""
    cfg = tiny_config(moe=True, vocab_size=128, **SIZES)
    save_random_model(cfg, tmp_path / "m.gguf", tensor_type)
    source = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(source, GgufFile)
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    expected = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}
    np.testing.assert_array_equal(source.read("embed_tokens.weight").astype(np.float32), expected["token_embd.weight"])
    fused = np.concatenate([expected["blk.1.ffn_gate_exps.weight"], expected["blk.1.ffn_up_exps.weight"]], axis=1)
    np.testing.assert_array_equal(source.read("layers.1.mlp.experts.gate_up_proj").astype(np.float32), fused)
    types = {t.name: t.tensor_type.name for t in tensors}
    assert types["blk.0.ssm_out.weight"] == tensor_type.upper() and types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_a_model_of_mixed_types_computes_the_same_packed_and_dequantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The type changes from matrix to matrix, as in "UD" files; gate and up of the same experts differ in type.

    This project writes no K-types, so the matrices are random blocks.
    """
    scales = {"Q4_K": 5e-5, "Q5_K": 2e-5, "Q6_K": 1e-5, "IQ4_XS": 1e-5, "Q8_0": 1e-3, "Q3_K": 4e-4, "Q2_K": 1e-3}
    scales |= {"IQ3_S": 1e-4, "IQ2_XS": 3e-4}
    next_type, written_types = itertools.cycle(scales), {}
    add_tensor = gguf.GGUFWriter.add_tensor

    def add_blocks(self: Any, name: str, tensor: np.ndarray, raw_dtype: Any = None) -> None:
        if raw_dtype == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % (256 // 32 * 34) == 0:
            type_name = written_types[name] = next(next_type)
            *lead, row_bytes = tensor.shape
            num_blocks = row_bytes // 34 * 32 // QUANTIZED_TYPES[type_name].elements_per_block
            blocks = random_blocks(type_name, math.prod(lead), num_blocks, len(written_types), scales[type_name])
            tensor, raw_dtype = blocks.reshape(*lead, -1), getattr(gguf.GGMLQuantizationType, type_name)
        add_tensor(self, name, tensor, raw_dtype=raw_dtype)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_blocks)
    sizes = SIZES | {"hidden_size": 256, "expert_size": 256, "shared_expert_size": 256, "linear_v_heads": 8}
    cfg = tiny_config(moe=True, layer_pattern=(LINEAR, FULL), num_superblocks=1, vocab_size=128, **sizes)
    save_random_model(cfg, tmp_path / "m.gguf", "q8_0")
    assert set(written_types.values()) == set(scales)
    assert written_types["blk.0.ffn_gate_exps.weight"] != written_types["blk.0.ffn_up_exps.weight"]
    assert "_K" in written_types["blk.0.ssm_out.weight"]  # its columns move in heads of 32; 256 share a super scale
    source = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(source, GgufFile)
    for name in source.tensors:
        if (packed := source.read_packed(name)) is not None:
            np.testing.assert_array_equal(packed.dequantize(), source.read(name), err_msg=name)
    ids = np.random.default_rng(1).integers(0, 90, 30).tolist()
    expected = LLM(tmp_path / "m.gguf", dtype="float32", num_speculative_tokens=2, max_model_len=64).logits(ids)
    packed_logits = LLM(
        tmp_path / "m.gguf", dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization="packed"
    ).logits(ids)
    assert np.isfinite(expected).all() and expected.std() > 0
    assert np.abs(packed_logits - expected).max() <= 1e-3 * np.abs(expected).max()


def test_a_split_model_is_opened_by_its_first_file(tmp_path: Path) -> None:
    """The files are those of gguf-split. An error names a file that is missing, damaged or of another model."""
    cfg = tiny_config(moe=True, vocab_size=128, **SIZES)
    save_random_model(cfg, tmp_path / "whole.gguf", "q8_0")
    whole = gguf.GGUFReader(tmp_path / "whole.gguf")

    def split(name: str, max_tensors: int) -> list[Path]:
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "qwen35moe", split_max_tensors=max_tensors)
        for key, field in whole.fields.items():
            if not key.startswith(("GGUF.", "general.architecture")):
                value_type, item_type = field.types[0], field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), value_type, sub_type=item_type)
        for tensor in whole.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return sorted(tmp_path.glob(f"{name}-*.gguf"))

    parts, other = split("m", 40), split("n", 60)
    assert [part.name for part in parts] == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    single, several = GgufFile(tmp_path / "whole.gguf"), open_checkpoint(parts[0])
    assert isinstance(several, GgufFile)
    assert single.tensors.keys() == several.tensors.keys()
    for name in single.tensors:
        np.testing.assert_array_equal(several.read(name), single.read(name))
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf: is part 2 of 3 .* Open 'm-00001-of-00003.gguf'"):
        open_checkpoint(parts[1])
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf: is missing, expected part 2 of 3"):
        open_checkpoint(parts[0])
    for damaged, message in (
        (other[0].read_bytes(), r"m-00002-of-00003.gguf: is not part 2 of 3"),
        (content[:-1000], r"m-00002-of-00003.gguf: tensor '.*' .* would occupy the bytes"),
    ):
        parts[1].write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(parts[0])
    parts[1].write_bytes(content)
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed.gguf: is part 1 of 3 .* Open 'NAME-00001-of-00003.gguf'"):
        open_checkpoint(tmp_path / "renamed.gguf")


def test_a_codebook_type_needs_the_gguf_package(
    model_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package, a file with such a type is rejected when it is opened; other files are read."""

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(gguf_header, "load_grid", missing)
    (tmp_path / "good.gguf").write_bytes(model_bytes)
    (tmp_path / "bad.gguf").write_bytes(change_entry(model_bytes, b"blk.0.ssm_out.weight", type_number=21))
    assert GgufFile(tmp_path / "good.gguf").tensors
    with pytest.raises(
        CheckpointError, match=r"bad.gguf: tensor 'blk.0.ssm_out.weight' has the type IQ3_S, .*pip install"
    ):
        open_checkpoint(tmp_path / "bad.gguf")


def test_iq4_nl_has_the_error_of_a_good_four_bit_code() -> None:
    """The relative error is measured on normal weights; zeros stay zeros."""
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    iq4_nl = gguf.GGMLQuantizationType.IQ4_NL
    decoded = gguf.quants.dequantize(encode_iq4_nl(x), iq4_nl)
    assert np.sqrt(np.mean((x - decoded) ** 2)) < 0.08
    assert not gguf.quants.dequantize(encode_iq4_nl(np.zeros((1, 32), np.float32)), iq4_nl).any()


def test_the_embedded_model_survives_the_conversion_to_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a conversion by the script, tokenizer, chat template and greedy text are those of the original folder."""
    target = tmp_path / "tiny.gguf"
    assert convert.main([str(TINY), str(target), "--type", "bf16"]) == 0 and "as gguf" in capsys.readouterr().out
    original, converted = LLM(dtype="float32", max_model_len=256), LLM(target, dtype="float32", max_model_len=256)
    for text in ("“Curiouser!” cried Alice; 1865, cafe\u0301.\n\n  x", "<|im_start|>user\nHé<|im_end|>\n"):
        assert original.tokenizer is not None and converted.tokenizer is not None
        ids = original.tokenizer.encode(text)
        assert converted.tokenizer.encode(text) == ids
        assert converted.tokenizer.decode(ids) == original.tokenizer.decode(ids)
    messages = [{"role": "user", "content": "Hello!"}]
    assert converted.chat_prompt(messages) == original.chat_prompt(messages)
    assert converted.stop_token_ids == original.stop_token_ids
    (a,), (b,) = (llm.chat(messages, SamplingParams(max_tokens=30)) for llm in (original, converted))
    assert a.text == b.text and a.finish_reason == b.finish_reason == "stop"
    assert convert.main([str(TINY), str(target)]) == 1 and "exists already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of a whole GGUF file in Q8_0."""
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    save_random_model(tiny_config(moe=True, vocab_size=128, num_superblocks=1, **SIZES), file, "q8_0")
    return file.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"GGML" + b[4:], "begins with b'GGML', expected b'GGUF'"),
        (lambda b: b[:4] + struct.pack("<I", 2) + b[8:], "version 2, supported: 3"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "big-endian"),
        (lambda b: b[:8] + uint64(2**60) + b[16:], "1,152,921,504,606,846,976 tensors"),
        (lambda b: b[:16] + uint64(2**60) + b[24:], "metadata entries, more than fit"),
        (lambda b: b[:24] + uint64(2**62) + b[32:], "metadata key 0 needs 4,611,686,018,427,387,904 bytes"),
        (lambda b: b[:2], "the magic needs 4 bytes"),
        (lambda b: b[:100], "58 tensors, more than fit into its 100 bytes"),
        (lambda b: b[:2000], "bytes at byte"),
        (lambda b: b[:-1000], "would occupy the bytes"),
        (lambda b: b.replace(b"qwen35moe", b"qwen99moe", 1), "general.architecture is 'qwen99moe'"),
        (lambda b: b.replace(b"blk.0.ssm_a", b"blk.0.ssm_x"), "'blk.0.ssm_x' is not a tensor of this model"),
        (lambda b: b.replace(b"output_norm.weight", b"output_nork.weight"), "(output_norm.weight) is missing"),
        (lambda b: change_entry(b, b"blk.0.ssm_out.weight", type_number=34), "ssm_out.weight' has the type TQ1_0"),
        (lambda b: change_entry(b, b"blk.0.ssm_out.weight", type_number=77), "ssm_out.weight' has the type number 77"),
        (lambda b: change_entry(b, b"blk.0.ssm_out.weight", offset=2**50), "would occupy the bytes"),
        (lambda b: change_entry(b, b"blk.0.ssm_out.weight", offset=0), "overlap"),
    ],
)
def test_a_damaged_file_is_rejected(
    model_bytes: bytes, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(change(model_bytes))
    with pytest.raises(CheckpointError) as caught:
        LLM(file, max_model_len=64)
    assert message in str(caught.value) and "bad.gguf" in str(caught.value)


def test_a_randomly_damaged_file_is_loaded_or_rejected(model_bytes: bytes, tmp_path: Path) -> None:
    """Seeded byte flips, most of them in the head of the file; `scripts/format_checks/fuzz_gguf.py` runs many more."""
    from scripts.format_checks.fuzz_gguf import flipped, outcome

    outcomes = {outcome(flipped(model_bytes, seed), tmp_path / "f.gguf") for seed in range(300)}
    assert outcomes == {"loaded", "loaded with a warning", "refused"}


def test_a_tokenizer_survives_the_metadata() -> None:
    """A file without a tokenizer has none; an error names an unknown pre-tokeniser."""
    from mtpjax.text.tokenizer import tokenizer_from_gguf, tokenizer_to_gguf

    tokenizer = load_tokenizer(TINY / "tokenizer.json")
    metadata = json.loads(json.dumps(tokenizer_to_gguf(tokenizer, 4100, [4095])))
    assert metadata["tokenizer.ggml.tokens"][4099] == "[PAD4099]" and metadata["tokenizer.ggml.token_type"][4099] == 5
    again = tokenizer_from_gguf(metadata, "x.gguf")
    assert again is not None and again.size == tokenizer.size == 4096
    assert tokenizer_from_gguf({}, "x.gguf") is None
    with pytest.raises(ValueError, match="x.gguf: has a tokenizer 'gpt2' / 'llama-bpe', supported"):
        tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe"}, "x.gguf")
