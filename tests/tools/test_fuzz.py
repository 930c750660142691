"""The fuzzers of checkpoints and input lines: some cases of each, and a planted fault of each kind is found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import known_keys, write_gguf, write_safetensors_directory
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.text import messages
from mtpjax.text.chat_template import ChatTemplate
from scripts.format_checks import fuzz_keys, fuzz_lines
from scripts.format_checks.key_documents import read_document
from tests.helpers.models import PACKABLE_SIZES, numpy_model, tiny_config
from tests.helpers.quantized_folders import FORMATS, write_model

TEMPLATE = Path(__file__).parents[1] / "text" / "templates" / "qwen3_6.jinja"
MODEL = numpy_model(tiny_config(moe=True, num_superblocks=1, **PACKABLE_SIZES))


def write_folder(path: Path) -> Path:
    entries = [(name, shape, dtype, read) for name, shape, dtype, read in export_tensors(MODEL)]
    write_safetensors_directory(path, config_to_hf(MODEL.cfg), entries)
    advice = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [127], "transformers_version": "5.0"}
    (path / "generation_config.json").write_text(json.dumps(advice))
    return path


def write_gguf_file(path: Path) -> Path:
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(MODEL)]
    write_gguf(path.with_suffix(".gguf"), config_to_hf(MODEL.cfg), tensors, "q8_0")
    return path.with_suffix(".gguf")


def write_quantized(path: Path) -> Path:
    write_model(path, FORMATS["nvfp4, divided"], num_superblocks=1)
    return path / "packed"


@pytest.mark.parametrize("write", [write_folder, write_gguf_file, write_quantized])
def test_what_is_read_is_what_is_written(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "model")
    (tmp_path / "copy").mkdir()
    copy = read_document(path).write(tmp_path / "copy")
    assert fuzz_keys.fingerprint(copy)[:2] == fuzz_keys.fingerprint(path)[:2]


@pytest.mark.parametrize("write", [write_folder, write_gguf_file, write_quantized])
def test_every_change_of_a_checkpoint_is_right_or_named(write: Callable[[Path], Path], tmp_path: Path) -> None:
    report = fuzz_keys.fuzz(write(tmp_path / "model"), 60)
    assert not report.bad, report.bad
    assert report.counts["error"] > 10 and report.counts["warning"] > 3


def test_silence_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no warnings of unknown keys, the fuzzer must complain."""
    monkeypatch.setattr(known_keys, "unknown_keys", lambda *args: [])
    report = fuzz_keys.fuzz(write_folder(tmp_path / "model"), 60)
    assert any(outcome == "bad: no effect, in silence" for outcome, _, _ in report.bad)


def test_a_message_without_the_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise ValueError("something is wrong")

    document = read_document(write_folder(tmp_path / "model"))
    monkeypatch.setattr(fuzz_keys, "fingerprint", fail)
    assert fuzz_keys.run_case(document, ("hidden_size",), None).outcome == "bad: error without the name"


@pytest.mark.parametrize("form", fuzz_lines.LINES)
def test_every_change_of_a_line_is_right_or_named(form: str) -> None:
    report = fuzz_lines.fuzz(form, ChatTemplate(TEMPLATE.read_text(), str(TEMPLATE), {}), 500)
    assert not report.bad, report.bad
    assert report.counts["error"] > 100 and report.counts["warning"] > 20 and report.counts["other"] > 100


def test_an_ignored_key_of_a_message_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_warn_of_unread_keys", lambda *args: None)
    report = fuzz_lines.fuzz("own", ChatTemplate(TEMPLATE.read_text(), str(TEMPLATE), {}), 200)
    assert any(outcome == "bad: no effect, in silence" for outcome, _, _ in report.bad)
