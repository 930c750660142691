"""`mtpjax info` and the console command."""

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import mtpjax
from checkpoints import TINY, open_checkpoint, write_safetensors_directory
from mtpjax.cli import convert, info
from mtpjax.cli.main import main
from mtpjax.config import RopeScaling
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.loading.load import load_checkpoint
from mtpjax.presets import PRESETS
from tests.helpers.models import numpy_model, tiny_config

pytestmark = pytest.mark.fast


def described(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    assert info.main([str(path), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:12].strip(): line[12:] for line in lines}


def test_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    lines = described(TINY, capsys)
    assert lines["checkpoint"] == f"{TINY}: Hugging Face folder"
    assert lines["model"].startswith("8 layers (6 Gated DeltaNet, 2 attention), hidden size 256, 8 experts of 64")
    assert lines["parameters"] == "8.01 million"
    assert lines["MTP head"] == "yes: it drafts" and lines["tokenizer"] == "yes; chat template: yes"
    assert "for 1 x 2,048 tokens" in lines["GPU memory"]  # the context is cut to what the model was made for


def test_the_memory_of_a_gguf_file_is_that_of_its_packed_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figure is within a tenth of the bytes that the loader makes of the file."""
    cfg = tiny_config(moe=True, num_superblocks=1, hidden_size=256, expert_size=64, mtp_layers=0)
    write_safetensors_directory(tmp_path / "hf", config_to_hf(cfg), export_tensors(numpy_model(cfg)))
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "m.gguf"), "--type", "iq4_nl"]) == 0
    capsys.readouterr()
    lines = described(tmp_path / "m.gguf", capsys)
    assert "GGUF file (qwen35moe)" in lines["checkpoint"] and "IQ4_NL" in lines["weights"]
    assert lines["MTP head"] == "no: decoding without drafts" and lines["tokenizer"].startswith("no")
    source = open_checkpoint(tmp_path / "m.gguf")
    loaded = load_checkpoint(source, dtype=jnp.dtype("bfloat16"), quantization="packed")
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert info.gpu_weight_bytes(source, cfg) == pytest.approx(nbytes, rel=0.1)


def test_scaled_positions_are_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scaling = RopeScaling(kind="yarn", factor=4.0, original_max_position=64)
    cfg = tiny_config(moe=False, max_position=256, rope_scaling=scaling)
    write_safetensors_directory(tmp_path, config_to_hf(cfg), export_tensors(numpy_model(cfg)))
    assert described(tmp_path, capsys)["positions"] == "up to 256 (yarn RoPE: 4 times the original 64)"


def test_a_large_model_fits_no_card(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cfg = PRESETS["397b-a17b"]
    assert info.cache_bytes(cfg, 32_768, 1) / 2**30 == pytest.approx(1.2, abs=0.1)
    assert info.num_parameters(cfg) / 1e9 == pytest.approx(403, abs=1)


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([str(tmp_path / "none")]) == 2
    assert "mtpjax info: " in (printed := capsys.readouterr().err) and "none: does not exist" in printed


def test_the_console_command_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and "mtpjax COMMAND --help" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"mtpjax {mtpjax.__version__}\n"
    assert main(["speak"]) == 2
    commands = "generate, convert, info, tune, count-tokens"
    assert f"there is no command 'speak'; expected one of {commands}\n" in capsys.readouterr().err
    assert main(["info", str(TINY)]) == 0 and "Hugging Face folder" in capsys.readouterr().out


def test_a_command_that_is_called_leaves_the_collector_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen objects are never collected: the programs of a caller would stay for as long as it lives."""
    before = gc.get_freeze_count()
    assert main(["info"]) == 0 and gc.get_freeze_count() == before
    capsys.readouterr()
