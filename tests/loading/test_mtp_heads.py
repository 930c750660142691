"""MTP heads: in files of their own, with matrices of their own, incomplete, and unquantised in quantised files."""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints import (
    TINY,
    CheckpointError,
    GgufFile,
    QuantizedDirectory,
    SafetensorsDirectory,
    TrunkAndHead,
    open_checkpoint,
    open_mtp_head,
    write_safetensors_directory,
)
from mtpjax import LLM, RequestOutput, SamplingParams
from mtpjax.cli.generate import main as generate
from mtpjax.loading.draft_head import with_draft_head
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel, flatten_params
from tests.golden.weights import golden_tensors
from tests.helpers.gguf_files import GgufContents, Type, random_gguf
from tests.helpers.published_models import unfuse_experts, write
from tests.helpers.quantized_folders import FORMATS, UNQUANTIZED, PublishedFormat, Tensors, write_model
from tests.helpers.word_checkpoint import CFG, MODEL, SMALL, TENSORS, write_checkpoint

FLOAT32 = np.dtype("float32")
fast = pytest.mark.fast


def parameters(model: LoadedModel, *prefix: str) -> dict[Any, np.ndarray]:
    """Return the parameters whose path begins with `prefix`."""
    flat = flatten_params(model.params)
    return {path: np.asarray(leaf[...]) for path, leaf in flat.items() if path[: len(prefix)] == prefix}


def drafts(output: RequestOutput) -> tuple[Any, ...]:
    """Return what became of the drafts of an output, without the times."""
    return output.metrics.num_drafts, output.metrics.num_draft_tokens, output.metrics.num_accepted_tokens_per_pos


def assert_same_parameters(found: LoadedModel, expected: LoadedModel, *prefix: str) -> None:
    got, want = parameters(found, *prefix), parameters(expected, *prefix)
    assert got.keys() == want.keys() and want
    for path, array in want.items():
        np.testing.assert_array_equal(got[path], array, err_msg=str(path))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same dense model whole and in two parts, as folders and as GGUF files in float32."""
    path = tmp_path_factory.mktemp("mtp")
    write_checkpoint(path / "whole")
    write_checkpoint(path / "trunk", {n: a for n, a in TENSORS.items() if not n.startswith("mtp.")}, tokenizer=True)
    write_checkpoint(path / "head", {n: a for n, a in TENSORS.items() if n.startswith("mtp.")})
    (path / "head" / "config.json").unlink()
    assert generate_gguf(path / "whole", path / "whole.gguf")
    contents = GgufContents.read(path / "whole.gguf")
    head = contents.drop("blk.2.")
    contents.set(block_count=2, nextn_predict_layers=None)
    contents.write(path / "trunk.gguf")
    contents.set(block_count=3, nextn_predict_layers=1)
    contents.tensors = {n: t for n, t in contents.tensors.items() if not n.startswith("blk.")} | head
    contents.write(path / "head.gguf")  # with embedding, LM head and final norm, as `--mtp` writes it
    contents.tensors = head
    contents.write(path / "bare-head.gguf")
    return path


def generate_gguf(source: Path, target: Path) -> bool:
    from mtpjax.cli.convert import main

    return main([str(source), str(target), "--type", "f32"]) == 0


@fast
@pytest.mark.parametrize("head", ["head", "head.gguf", "bare-head.gguf", "whole", "whole.gguf"])
@pytest.mark.parametrize("trunk", ["trunk", "trunk.gguf", "whole"])
def test_trunk_and_head_may_be_of_either_kind(trunk: str, head: str, files: Path) -> None:
    """llama.cpp 25641, ik_llama.cpp 1698: `mtp-NAME.gguf` beside a trunk."""
    source = open_checkpoint(files / trunk)
    loaded = load_checkpoint(TrunkAndHead(source, open_mtp_head(files / head)), dtype=FLOAT32)  # type: ignore[arg-type]
    assert loaded.cfg.mtp_layers == 1
    # GGUF stores 1 + w of a norm, which rounds once.
    for path, array in parameters(MODEL, "mtp").items():
        tolerance = 1e-6 if "gguf" in head and str(path[-1]).endswith("norm") else 0
        np.testing.assert_allclose(parameters(loaded, "mtp")[path], array, rtol=0, atol=tolerance, err_msg=str(path))


@fast
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("head", r"head: holds an MTP head and no other layer.*LLM\(model, mtp='.*head'\)"),
        ("head.gguf", r"head.gguf: holds an MTP head and no other layer, expected a whole model"),
        ("bare-head.gguf", "bare-head.gguf: holds an MTP head and no other layer"),
    ],
)
def test_a_lone_head_says_what_it_is(model: str, message: str, files: Path) -> None:
    if model == "head":
        write_checkpoint(files / "lone", {n: a for n, a in TENSORS.items() if n.startswith("mtp.")})
        model, message = "lone", message.replace("head:", "lone:").replace("head'", "lone'")
    with pytest.raises(CheckpointError, match=message):
        LLM(files / model, **SMALL)


@fast
@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("trunk", r"trunk: has no tensor 'mtp\.\*'"),
        ("trunk.gguf", r"trunk.gguf: has no MTP head \(blk"),
        ("missing.gguf", "missing.gguf: does not exist"),
        ("trunk/config.json", r"config.json: is no .gguf file and no folder"),
        ("wide.gguf", r"wide.gguf: its MTP head has a matrix 'blk.4.*\[64, 128\], expected \[48, 96\] for .*trunk"),
    ],
)
def test_a_head_that_is_none_or_does_not_fit_is_named(head: str, message: str, files: Path) -> None:
    if head == "wide.gguf" and not (files / head).exists():
        random_gguf(files / head, moe=False)
    with pytest.raises(CheckpointError, match=message):
        LLM(files / "trunk", mtp=files / head, **SMALL)
    without_drafts = LLM(files / "trunk", mtp=files / head, num_speculative_tokens=0, **SMALL)
    assert without_drafts.cfg.mtp_layers == 0


@fast
def test_a_loaded_model_and_an_orbax_folder_take_no_other_head(files: Path, tmp_path: Path) -> None:
    from mtpjax.cli.convert import main

    with pytest.raises(ValueError, match="the model is already loaded"):
        LLM(MODEL, mtp=files / "head", **SMALL)
    assert main([str(files / "whole"), str(tmp_path / "orbax")]) == 0
    with pytest.raises(ValueError, match="not supported for an Orbax folder"):
        LLM(tmp_path / "orbax", mtp=files / "head", **SMALL)


@pytest.mark.slow
def test_drafts_are_those_of_the_given_head(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and accepted drafts equal those of the whole model; the command has the same option."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    whole = LLM(files / "whole", num_speculative_tokens=2, **SMALL)
    parts = LLM(files / "trunk", mtp=files / "head", num_speculative_tokens=2, **SMALL)
    (want,), (got,) = (llm.generate([[5, 6, 7]], params) for llm in (whole, parts))
    assert got.token_ids == want.token_ids and drafts(got) == drafts(want) and want.metrics.num_draft_tokens > 0
    (tmp_path / "p.jsonl").write_text('{"prompt": [5, 6, 7]}\n')
    paths = ["--model", str(files / "trunk"), "--mtp", str(files / "head"), "--input", str(tmp_path / "p.jsonl")]
    assert generate([*paths, "--max-model-len", "40", "--max-tokens", "3", "--dtype", "float32"]) == 0
    assert "drafts" in capsys.readouterr().out


@fast
@pytest.mark.parametrize("tensor_type", [Type.F32, Type.Q8_0])
def test_a_head_may_have_an_embedding_and_an_lm_head_of_its_own(tensor_type: Type, tmp_path: Path) -> None:
    """`nextn.embed_tokens`, `nextn.shared_head_head` (llama.cpp 23563): drafts use them, the trunk does not."""
    random_gguf(tmp_path / "m.gguf", moe=False, num_superblocks=1)
    contents = GgufContents.read(tmp_path / "m.gguf")
    rng = np.random.default_rng(3)
    own = {name: rng.normal(size=(128, 64)).astype(np.float32) for name in ("embed_tokens", "shared_head_head")}
    for name, values in own.items():
        contents.put(f"blk.2.nextn.{name}.weight", values, tensor_type)
    embedding, head = (contents.values(f"blk.2.nextn.{name}.weight") for name in own)
    source = open_checkpoint(contents.write(tmp_path / "own.gguf"))
    assert isinstance(source, GgufFile)
    loaded = load_checkpoint(source, dtype=FLOAT32, quantization="packed")
    x = jnp.asarray(rng.normal(size=(1, 2, 64)), jnp.float32)
    model: Any = nnx.merge(loaded.graph, loaded.params)
    np.testing.assert_allclose(model.draft_logits(x), x @ head.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.head(x), x @ contents.values("output.weight").T, rtol=1e-4, atol=1e-4)
    ids, valid = jnp.asarray([[3, 127]]), jnp.ones((1, 2), bool)
    np.testing.assert_array_equal(model._embed_for_mtp(ids, valid)[0], embedding[[3, 127]])
    np.testing.assert_array_equal(model.embed(ids, valid)[0], contents.values("token_embd.weight")[[3, 127]])
    part: Any = with_draft_head(loaded, np.asarray([1, 5], np.int32))
    part = nnx.merge(part.graph, part.params)
    np.testing.assert_allclose(part.draft_logits(x), x @ head[[1, 5]].T, rtol=1e-4, atol=1e-4)
    contents.put("blk.2.nextn.shared_head_head.weight", own["shared_head_head"][:100], tensor_type)
    with pytest.raises(CheckpointError, match=r"shared_head_head.weight' has shape \[100, 64\], expected \[128, 64\]"):
        load_checkpoint(open_checkpoint(contents.write(tmp_path / "small.gguf")), dtype=FLOAT32)


@pytest.mark.slow
def test_text_does_not_depend_on_a_head_of_its_own(tmp_path: Path) -> None:
    """With the trunk's own matrices as its own, the head drafts the same; with others it drafts differently."""
    random_gguf(tmp_path / "m.gguf", moe=False, num_superblocks=1)
    contents = GgufContents.read(tmp_path / "m.gguf")
    llm = partial(LLM, dtype="float32", num_speculative_tokens=2, max_model_len=64)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    (want,) = llm(tmp_path / "m.gguf").generate([[5, 6, 7]], params)
    contents.put("blk.2.nextn.embed_tokens.weight", contents.values("token_embd.weight"))
    contents.put("blk.2.nextn.shared_head_head.weight", contents.values("output.weight"))
    (same,) = llm(contents.write(tmp_path / "same.gguf")).generate([[5, 6, 7]], params)
    assert same.token_ids == want.token_ids and drafts(same) == drafts(want)
    contents.put("blk.2.nextn.shared_head_head.weight", -contents.values("output.weight"))
    (other,) = llm(contents.write(tmp_path / "other.gguf")).generate([[5, 6, 7]], params)
    assert other.token_ids == want.token_ids
    assert other.metrics.num_accepted_tokens_per_pos[0] <= want.metrics.num_accepted_tokens_per_pos[0]


NORMS = tuple(name for name in TENSORS if name.startswith("mtp.") and "norm" in name)


@fast
def test_a_head_without_its_norms_is_listed_and_the_trunk_loads(tmp_path: Path) -> None:
    """ms-swift 9802: a LoRA export loses exactly the norms of the head."""
    assert len(NORMS) == 7
    path = write_checkpoint(tmp_path / "hf", {n: a for n, a in TENSORS.items() if n not in NORMS})
    with pytest.raises(CheckpointError, match="7 missing, 0 mis-shaped and 0 unexpected") as caught:
        LLM(path, **SMALL)
    message = str(caught.value)
    assert all(f"'{name}' is missing" in message for name in NORMS)
    assert "8 of the 15 tensors of its MTP head are there" in message and "num_speculative_tokens=0" in message
    loaded = load_checkpoint(open_checkpoint(path), dtype=FLOAT32, mtp=False)
    assert loaded.cfg == CFG.without_mtp()
    assert_same_parameters(loaded, MODEL, "decoder")


@fast
def test_an_error_about_the_trunk_does_not_speak_of_the_head(tmp_path: Path) -> None:
    tensors = {n: a for n, a in TENSORS.items() if n not in (*NORMS, "model.norm.weight")}
    with pytest.raises(CheckpointError, match="8 missing") as caught:
        LLM(write_checkpoint(tmp_path / "hf", tensors), **SMALL)
    assert "num_speculative_tokens" not in str(caught.value)


# How a BF16 head lies in a quantised folder: in the list of what is not quantised, nowhere in it, or with its experts
# quantised and its other matrices not. Others go by the list; here the tensors decide.
HEADS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "compressed-tensors, ignored (sglang 35797)": ("nvfp4, divided", {"ignore": ["re:.*mtp.*", "lm_head"]}, ("mtp.",)),
    "gptq, not named (vllm 47828)": ("gptq v1, zeros", {"modules_in_block_to_quantize": []}, ("mtp.",)),
    "mxfp4, not excluded (sglang 36158)": ("mxfp4", {"ignore": ["lm_head"]}, ("mtp.",)),
    "mxfp4, experts quantised (sglang 38870)": ("mxfp4", {}, ("mtp.layers.0.self_attn", "mtp.layers.0.mlp.shared")),
    "fp8, not converted (atlas 200)": ("fp8", {"modules_to_not_convert": ["mtp"]}, ("mtp.",)),
}


@fast
@pytest.mark.parametrize("name", HEADS)
def test_an_unquantised_head_in_a_quantised_folder_keeps_its_bits(name: str, tmp_path: Path) -> None:
    format_name, settings, plain = HEADS[name]
    fmt = FORMATS[format_name]
    write_model(tmp_path, fmt._replace(config=fmt.config | settings), (*UNQUANTIZED, *plain), num_superblocks=1)
    expected = load_checkpoint(open_checkpoint(tmp_path / "plain"), dtype=FLOAT32)
    source = open_checkpoint(tmp_path / "packed")
    assert isinstance(source, QuantizedDirectory)
    assert_same_parameters(load_checkpoint(source, dtype=FLOAT32), expected)
    packed = load_checkpoint(source, dtype=FLOAT32, quantization="packed")
    of_head = {n: source.read_packed(n) is not None for n in source.tensors if n.startswith("mtp.")}
    assert any(of_head.values()) == ("experts quantised" in name)
    if "experts quantised" not in name:
        assert_same_parameters(packed, expected, "mtp")


def quantised_tiny(path: Path, fmt: PublishedFormat) -> Path:
    """Write the embedded model with its trunk quantised and its MTP head in BF16; to `path/plain`, the same values."""
    source = SafetensorsDirectory(TINY)
    plain: Tensors = {}
    packed: Tensors = {}
    for name, info in source.tensors.items():
        w = source.read(name)
        parts = [(info.name, w)]
        if "experts." in name and name.startswith("layers."):
            halves = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            stem = info.name.rpartition(".")[0]
            parts = [
                (f"{stem}.{e}.{half}.weight", part)
                for e, expert in enumerate(w)
                for half, part in zip(halves, np.split(expert, len(halves)), strict=True)
            ]
        for raw, part in parts:
            if part.ndim != 2 or raw.startswith("mtp.") or any(word in raw for word in UNQUANTIZED):
                plain[raw] = packed[raw] = part
                continue
            tensors, value = fmt.encode(part.astype(np.float32))
            plain[raw] = value
            packed |= {raw.removesuffix("weight") + suffix: array for suffix, array in tensors.items()}
    for folder, tensors, config in (("plain", plain, {}), ("packed", packed, {"quantization_config": fmt.config})):
        entries = [(n, a.shape, a.dtype, partial(np.ascontiguousarray, a)) for n, a in tensors.items()]
        extra = [TINY / "tokenizer_config.json"]
        write_safetensors_directory(
            path / folder, source.config | config, entries, tokenizer_file=TINY / "tokenizer.json", extra_files=extra
        )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvfp4, divided", "gptq v1, zeros", "mxfp4", "fp8"])
def test_drafts_are_accepted_as_with_the_unquantised_head(name: str, tmp_path: Path) -> None:
    """The embedded model drafts well: with a quantised trunk and the same head, the same drafts count."""
    quantised_tiny(tmp_path, FORMATS[name])
    prompts = ["Once upon a time", "The old king"]
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "prefill_buckets": (32,)}
    plain, packed = (LLM(tmp_path / kind, **settings).generate(prompts, params) for kind in ("plain", "packed"))
    for want, got in zip(plain, packed, strict=True):
        assert got.token_ids == want.token_ids and drafts(got) == drafts(want)
    accepted = sum(output.metrics.num_accepted_tokens for output in packed)
    assert accepted > 0.4 * sum(output.metrics.num_draft_tokens for output in packed)


@fast
@pytest.mark.parametrize("within", ["model.", "mtp."], ids=["trunk unfused", "head unfused"])
def test_experts_may_be_fused_in_one_part_only(within: str, tmp_path: Path) -> None:
    """miles 1317 and a merge of 397B: one tensor for each expert in the trunk or in the head, fused in the other."""
    case = "moe_r1"
    tensors = golden_tensors(case)
    whole = write(tmp_path / "fused", case, tensors)
    mixed = write(tmp_path / "mixed", case, unfuse_experts(tensors, within))
    found, expected = (load_checkpoint(open_checkpoint(path), dtype=FLOAT32) for path in (mixed, whole))
    assert_same_parameters(found, expected)
    names = set(open_checkpoint(mixed).tensors)  # type: ignore[union-attr]
    assert ("layers.0.mlp.experts.gate_up_proj" in names) == (within == "mtp.")
    assert ("mtp.layers.0.mlp.experts.gate_up_proj" in names) == (within == "model.")


@fast
@pytest.mark.parametrize("name", ["nvfp4", "float8 rows"])
def test_a_quantised_lm_head_serves_the_mtp_head(name: str, tmp_path: Path) -> None:
    unquantized = tuple(part for part in UNQUANTIZED if part != "lm_head")
    write_model(tmp_path, FORMATS[name], unquantized, num_superblocks=1)
    source = open_checkpoint(tmp_path / "packed")
    assert isinstance(source, QuantizedDirectory)
    head = SafetensorsDirectory(tmp_path / "plain").read("lm_head.weight").astype(np.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, head.shape[1])), jnp.float32)
    for quantization in (None, "packed"):
        loaded = load_checkpoint(source, dtype=FLOAT32, quantization=quantization)
        model: Any = nnx.merge(loaded.graph, loaded.params)
        for logits in (model.head(x), model.draft_logits(x)):
            np.testing.assert_allclose(logits, x @ head.T, rtol=1e-4, atol=1e-4)
