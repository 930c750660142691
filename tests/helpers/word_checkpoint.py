"""A tiny checkpoint whose tokenizer knows words, for tests of what users of `LLM` see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import write_safetensors_directory
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from tests.helpers.models import numpy_model, tiny_config

CFG = tiny_config(moe=False, num_superblocks=1, max_position=512)  # 96 ids, the last is its stop token
MODEL = numpy_model(CFG, seed=1, scale=0.5)
TENSORS = {name: read() for name, _, _, read in export_tensors(MODEL)}
WORDS = [f"w{i}" for i in range(90)]  # fewer than there are ids: the matrix of a published checkpoint is padded too
SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 40, "max_num_seqs": 2, "prefill_buckets": (16,)}


def write_checkpoint(
    path: Path, tensors: dict[str, np.ndarray] = TENSORS, *, tokenizer: bool = False, **config: Any
) -> Path:
    """Write a Hugging Face folder, with a tokenizer of 90 words if asked. `config` changes its config.json."""
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()]
    write_safetensors_directory(path, config_to_hf(CFG) | config, entries)
    if tokenizer:
        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.save(str(path / "tokenizer.json"))
    return path
