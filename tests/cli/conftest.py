"""Fixtures of the tests of `mtpjax generate`: a checkpoint of words, one compiled model, a job on a file of lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import write_safetensors_directory
from mtpjax import LLM
from mtpjax.cli import generate
from mtpjax.engine import scheduler
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from tests.helpers.batch_job import SETTINGS
from tests.helpers.models import numpy_model, tiny_config

CFG = tiny_config(moe=False, num_superblocks=1, max_position=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint whose vocabulary is 96 words."""
    path = tmp_path_factory.mktemp("batch") / "model"
    write_safetensors_directory(path, config_to_hf(CFG), export_tensors(numpy_model(CFG, seed=1, scale=0.5)))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    """Load it with the settings of the jobs."""
    return LLM(folder, num_speculative_tokens=2, max_model_len=40, max_num_seqs=3, max_prefill_seqs=2)


@pytest.fixture
def job(llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`job(lines, *options)` runs the command on a file of these lines with one compiled model; answers go to
    out.jsonl.
    """

    def compiled_model(model: Path, **arguments: Any) -> LLM:
        for name in ("max_num_seqs", "max_prefill_seqs"):  # fewer for fewer lines
            arguments[name] = max(arguments[name], {"max_num_seqs": 3, "max_prefill_seqs": 2}[name])
        expected = {
            "num_speculative_tokens": 2,
            "mtp": None,
            "mtp_prompt_tokens": 9,
            "draft_vocab_size": None,
            "dtype": "auto",
            "quantization": None,
            "hf_overrides": None,
            "max_model_len": 40,
            "max_num_seqs": 3,
            "max_prefill_seqs": 2,
            "acceptance": "coupled",
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": 20,
            "prefix_cache_gb": None,
            "prefix_cache_dir": None,
        }
        assert (model.name, arguments) == ("model", expected)
        return llm

    def run(lines: list[Any], *options: str, name: str = "in.jsonl") -> int:
        data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
        (tmp_path / name).write_bytes(data)
        paths = ["--model", "model", "--input", str(tmp_path / name), "--output", str(tmp_path / "out.jsonl")]
        return generate.main([*paths, *SETTINGS, "--max-tokens", "6", *options])

    monkeypatch.setattr(generate, "LLM", compiled_model)
    monkeypatch.setattr(scheduler, "LOOKAHEAD_BATCHES", 2)  # six prompts
    return run
