"""GGUF: every block type exact, the conventions undone, a damaged file refused in words."""

import itertools
import json
import math
import struct
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
from checkpoints.gguf.header import TYPES
from checkpoints.gguf.writer import encode_iq4_nl
from mtpjax import LLM, SamplingParams
from mtpjax.cli import convert
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.weight_map import export_tensors
from mtpjax.text.tokenizer import load_tokenizer
from tests.helpers.models import numpy_model, tiny_config

HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
}  # fmt: skip
QUANTISED = {t.name: t for t in TYPES.values() if t.repack is not None}
SIZES: dict[str, Any] = {
    "hidden_size": 64, "head_dim": 32, "rotary_dim": 8, "linear_k_dim": 32, "linear_v_dim": 32, "expert_size": 32,
    "shared_expert_size": 32,
}  # fmt: skip


def random_blocks(name: str, rows: int, blocks: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Random bytes whose half-precision scales are finite, about `scale`."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, QUANTISED[name].size), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        raw[..., at : at + 2] = (scale * rng.normal(size=(rows, blocks, 1))).astype("<f2").view(np.uint8)
    if name == "IQ1_M":  # the half is the high nibbles of the last four words
        raw[..., -1] &= 0xBF
    if name == "MXFP4":
        raw[..., 0] = rng.integers(0, 160, (rows, blocks))
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", QUANTISED)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 4))
def test_every_block_type_is_exact(name: str, seed: int, rows: int, blocks: int) -> None:
    """Bit for bit the values of the reference dequantiser, after repacking into codes, scales and offsets."""
    raw = random_blocks(name, rows, blocks, seed)
    packed = repack_rows(QUANTISED[name], raw)
    wanted = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, name))
    np.testing.assert_array_equal(packed.dequantize().view(np.uint32), np.float32(wanted).view(np.uint32))
    assert packed.codes.dtype == (np.int8 if packed.layout == "codes8" else np.uint8)
    assert packed.scale.shape == (rows, wanted.shape[1] // packed.group)
    if QUANTISED[name].size * 8 > 4 * QUANTISED[name].elements:  # fewer than four bits take four
        assert packed.nbytes <= 1.06 * raw.nbytes  # six-bit scales take eight, eight-bit powers of two sixteen
    assert packed.nbytes * 8 <= 5.2 * wanted.size or packed.layout != "codes4" or packed.scale.dtype == np.float16
    for array in packed.finer(128).arrays.values():
        assert wanted.shape[1] // array.shape[-1] <= 128
    np.testing.assert_array_equal(packed.finer(128).dequantize(), wanted)


def save(cfg: ModelConfig, path: Path, kind: str, seed: int = 0) -> Any:
    """A random model as GGUF; returns the model."""
    model = numpy_model(cfg, seed=seed, stack=1)
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(model, 1)]
    write_gguf(path, config_to_hf(cfg), tensors, kind)
    return model


@pytest.mark.parametrize(
    ("moe", "v_heads", "mtp"), [(True, 4, 1), (False, 6, 1), (True, 2, 0)], ids=["moe-2", "dense-3", "moe-1-no-mtp"]
)
def test_the_same_weights_give_the_same_logits(moe: bool, v_heads: int, mtp: int, tmp_path: Path) -> None:
    """As a model in memory and through a GGUF file in F32: head order, gains, decay and taps come back, drafts too."""
    cfg = tiny_config(moe=moe, linear_v_heads=v_heads, mtp_layers=mtp, layer_pattern=(LINEAR, LINEAR, FULL))
    model = save(cfg, tmp_path / "m.gguf", "f32")
    ours, theirs = LLM(model, num_speculative_tokens=2 * mtp, max_model_len=64), LLM(tmp_path / "m.gguf", dtype="float32", num_speculative_tokens=2 * mtp, max_model_len=64)
    ids = np.random.default_rng(1).integers(0, 90, 40).tolist()
    np.testing.assert_allclose(theirs.logits(ids), ours.logits(ids), atol=1e-4)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    (a,), (b,) = (llm.generate([ids], params) for llm in (ours, theirs))
    assert a.token_ids == b.token_ids and a.metrics.accepted_per_position == b.metrics.accepted_per_position


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0", "iq4_nl"])
def test_what_is_read_is_what_the_file_says(kind: str, tmp_path: Path) -> None:
    """Every tensor that has no convention of its own equals the reference reader's values; the package opens our file."""
    cfg = tiny_config(moe=True, vocab_size=128, **SIZES)
    save(cfg, tmp_path / "m.gguf", kind)
    source = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(source, GgufFile)
    theirs = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    np.testing.assert_array_equal(source.read("embed_tokens.weight").astype(np.float32), theirs["token_embd.weight"])
    fused = np.concatenate([theirs["blk.1.ffn_gate_exps.weight"], theirs["blk.1.ffn_up_exps.weight"]], axis=1)
    np.testing.assert_array_equal(source.read("layers.1.mlp.experts.gate_up_proj").astype(np.float32), fused)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ssm_out.weight"] == kind.upper() and types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_a_model_of_k_types_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in "UD" files, the type changes from matrix to matrix: packed the model computes what it computes dequantised.

    Nothing here writes K-types, so the matrices are random blocks; gate and up of the same experts differ in type.
    """
    sizes = {
        "Q4_K": 5e-5, "Q5_K": 2e-5, "Q6_K": 1e-5, "IQ4_XS": 1e-5, "Q8_0": 1e-3, "Q3_K": 4e-4, "Q2_K": 1e-3, "IQ3_S": 1e-4,
        "IQ2_XS": 3e-4,
    }  # fmt: skip
    kinds, written = itertools.cycle(sizes), {}
    add = gguf.GGUFWriter.add_tensor

    def add_blocks(self: Any, name: str, tensor: np.ndarray, raw_dtype: Any = None) -> None:
        if raw_dtype == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % (256 // 32 * 34) == 0:
            kind = written[name] = next(kinds)
            *lead, row = tensor.shape
            elements = row // 34 * 32
            blocks = random_blocks(
                kind, math.prod(lead), elements // QUANTISED[kind].elements, len(written), sizes[kind]
            )
            tensor, raw_dtype = blocks.reshape(*lead, -1), getattr(gguf.GGMLQuantizationType, kind)
        add(self, name, tensor, raw_dtype=raw_dtype)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_blocks)
    wide = {"hidden_size": 256, "expert_size": 256, "shared_expert_size": 256, "vocab_size": 128, "linear_v_heads": 8}
    save(tiny_config(moe=True, layer_pattern=(LINEAR, FULL), num_superblocks=1, **SIZES | wide), tmp_path / "m.gguf", "q8_0")
    assert set(written.values()) == set(sizes)
    assert written["blk.0.ffn_gate_exps.weight"] != written["blk.0.ffn_up_exps.weight"]
    assert "_K" in written["blk.0.ssm_out.weight"]  # its columns move by heads of 32, and share a scale by 256
    source = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(source, GgufFile)
    for name in source.tensors:
        if (packed := source.read_packed(name)) is not None:
            np.testing.assert_array_equal(packed.dequantize(), source.read(name), err_msg=name)
    ids = np.random.default_rng(1).integers(0, 90, 30).tolist()
    want = LLM(tmp_path / "m.gguf", dtype="float32", num_speculative_tokens=2, max_model_len=64).logits(ids)
    got = LLM(tmp_path / "m.gguf", dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization="packed").logits(ids)
    assert np.isfinite(want).all() and want.std() > 0
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()


def test_a_model_in_several_files(tmp_path: Path) -> None:
    """As gguf-split leaves it: opened by its first part; what is missing, foreign or damaged is named."""
    cfg = tiny_config(moe=True, vocab_size=128, **SIZES)
    save(cfg, tmp_path / "whole.gguf", "q8_0")
    whole = gguf.GGUFReader(tmp_path / "whole.gguf")

    def split(name: str, size: int) -> list[Path]:
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "qwen35moe", split_max_tensors=size)
        for key, field in whole.fields.items():
            if not key.startswith(("GGUF.", "general.architecture")):
                kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), kind, sub_type=inner)
        for tensor in whole.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return sorted(tmp_path.glob(f"{name}-*.gguf"))

    parts, other = split("m", 40), split("n", 60)
    assert [part.name for part in parts] == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    one, several = open_checkpoint(tmp_path / "whole.gguf"), open_checkpoint(parts[0])
    assert one.tensors.keys() == several.tensors.keys()
    for name in one.tensors:
        np.testing.assert_array_equal(several.read(name), one.read(name))
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf: is part 2 of 3 .* Open 'm-00001-of-00003.gguf'"):
        open_checkpoint(parts[1])
    content = parts[1].read_bytes()
    for change, said in (
        (lambda: parts[1].unlink(), r"m-00002-of-00003.gguf: is missing, part 2 of 3"),
        (lambda: parts[1].write_bytes(other[0].read_bytes()), r"m-00002-of-00003.gguf: is not part 2 of 3"),
        (lambda: parts[1].write_bytes(content[:-1000]), r"m-00002-of-00003.gguf: tensor '.*' .* would lie at bytes"),
    ):
        change()
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(parts[0])
    parts[1].write_bytes(content)
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed.gguf: is part 1 of 3 .* Open 'NAME-00001-of-00003.gguf'"):
        open_checkpoint(tmp_path / "renamed.gguf")


def test_lists_of_points_are_those_of_the_gguf_package(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, a file that needs one is refused when it is opened; others are read."""

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(gguf_header, "points", missing)
    (tmp_path / "good.gguf").write_bytes(whole)
    (tmp_path / "bad.gguf").write_bytes(retyped(whole, b"blk.0.ssm_out.weight", kind=21))
    assert open_checkpoint(tmp_path / "good.gguf").tensors
    with pytest.raises(
        CheckpointError, match=r"bad.gguf: tensor 'blk.0.ssm_out.weight' has the type IQ3_S, .*pip install"
    ):
        open_checkpoint(tmp_path / "bad.gguf")


def test_iq4_nl_keeps_four_bits_worth() -> None:
    """On normal weights the relative error is that of a good four-bit code; zeros stay zeros; exact values stay exact."""
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.IQ4_NL
    back = gguf.quants.dequantize(encode_iq4_nl(x), kind)
    assert np.sqrt(np.mean((x - back) ** 2)) < 0.08
    assert not gguf.quants.dequantize(encode_iq4_nl(np.zeros((1, 32), np.float32)), kind).any()


def test_the_embedded_model_through_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted by the script: tokenizer, chat template and greedy text are those of the folder it was made from."""
    target = tmp_path / "tiny.gguf"
    assert convert.main([str(TINY), str(target), "--type", "bf16"]) == 0 and "as gguf" in capsys.readouterr().out
    ours, theirs = LLM(dtype="float32", max_model_len=256), LLM(target, dtype="float32", max_model_len=256)
    for text in ("“Curiouser!” cried Alice; 1865, cafe\u0301.\n\n  x", "<|im_start|>user\nHé<|im_end|>\n"):
        ids = ours.tokenizer.encode(text)  # type: ignore[union-attr]
        assert theirs.tokenizer.encode(text) == ids  # type: ignore[union-attr]
        assert theirs.tokenizer.decode(ids) == ours.tokenizer.decode(ids)  # type: ignore[union-attr]
    talk = [{"role": "user", "content": "Hello!"}]
    assert theirs.chat_prompt(talk) == ours.chat_prompt(talk)
    assert theirs.stop_token_ids == ours.stop_token_ids
    (a,), (b,) = (llm.chat(talk, SamplingParams(max_tokens=30)) for llm in (ours, theirs))
    assert a.text == b.text and a.finish_reason == b.finish_reason == "stop"
    assert convert.main([str(TINY), str(target)]) == 1 and "exists already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    save(tiny_config(moe=True, vocab_size=128, num_superblocks=1, **SIZES), file, "q8_0")
    return file.read_bytes()


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b"GGML" + b[4:], "begins with b'GGML', expected b'GGUF'"),
        (lambda b: b[:4] + struct.pack("<I", 2) + b[8:], "version 2, supported: 3"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "big-endian"),
        (lambda b: b[:8] + number(2**60) + b[16:], "1,152,921,504,606,846,976 tensors"),
        (lambda b: b[:16] + number(2**60) + b[24:], "metadata entries, more than fit"),
        (lambda b: b[:24] + number(2**62) + b[32:], "metadata key 0 needs 4,611,686,018,427,387,904 bytes"),
        (lambda b: b[:2], "the magic needs 4 bytes"),
        (lambda b: b[:100], "58 tensors, more than fit into its 100 bytes"),
        (lambda b: b[:2000], "bytes at byte"),
        (lambda b: b[:-1000], "would lie at bytes"),
        (lambda b: b.replace(b"qwen35moe", b"qwen99moe", 1), "architecture 'qwen99moe'"),
        (lambda b: b.replace(b"blk.0.ssm_a", b"blk.0.ssm_x"), "'blk.0.ssm_x' is not a tensor of this model"),
        (lambda b: b.replace(b"output_norm.weight", b"output_nork.weight"), "'norm.weight' is missing"),
        (lambda b: retyped(b, b"blk.0.ssm_out.weight", kind=34), "ssm_out.weight' has the type TQ1_0"),
        (lambda b: retyped(b, b"blk.0.ssm_out.weight", kind=77), "ssm_out.weight' has the type number 77"),
        (lambda b: retyped(b, b"blk.0.ssm_out.weight", offset=2**50), "would lie at bytes"),
        (lambda b: retyped(b, b"blk.0.ssm_out.weight", offset=0), "overlap"),
    ],
)
def test_a_damaged_file_is_refused(whole: bytes, change: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(change(whole))
    with pytest.raises(CheckpointError) as caught:
        LLM(file, max_model_len=64)
    assert said in str(caught.value) and "bad.gguf" in str(caught.value)


def retyped(raw: bytes, name: bytes, kind: int | None = None, offset: int | None = None) -> bytes:
    """The file with another type number or offset of one matrix."""
    at = raw.index(number(len(name)) + name) + 8 + len(name) + 4 + 16
    old_kind, old_offset = struct.unpack_from("<IQ", raw, at)
    entry = struct.pack("<IQ", old_kind if kind is None else kind, old_offset if offset is None else offset)
    return raw[:at] + entry + raw[at + 12 :]


def test_random_damage_ends_in_a_load_or_one_of_our_errors(whole: bytes, tmp_path: Path) -> None:
    """Seeded byte flips, most of them in the head of the file. `scripts/format_checks/fuzz_gguf.py` runs many more."""
    from scripts.format_checks.fuzz_gguf import flipped, outcome

    found = {outcome(flipped(whole, seed), tmp_path / "f.gguf") for seed in range(300)}
    assert found == {"loaded", "refused"}


def test_a_tokenizer_survives_the_metadata() -> None:
    """Also one whose chat template is absent; an unknown pre-tokeniser is named."""
    from mtpjax.text.tokenizer import tokenizer_from_gguf, tokenizer_to_gguf

    tokenizer = load_tokenizer(TINY / "tokenizer.json")
    metadata = json.loads(json.dumps(tokenizer_to_gguf(tokenizer, 4100, [4095])))
    assert metadata["tokenizer.ggml.tokens"][4099] == "[PAD4099]" and metadata["tokenizer.ggml.token_type"][4099] == 5
    again = tokenizer_from_gguf(metadata, "x.gguf")
    assert again is not None and again.size == tokenizer.size == 4096
    assert tokenizer_from_gguf({}, "x.gguf") is None
    with pytest.raises(ValueError, match="x.gguf: has a tokenizer 'gpt2' / 'llama-bpe', supported"):
        tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe"}, "x.gguf")
