"""The folder of the embedded model: its shape, the files beside the weights, and the export in BF16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints import write_safetensors_directory
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.loading.loaded_model import LoadedModel
from scripts.tiny_model import data
from scripts.tiny_model.loss import MTP_WEIGHTS, ROWS

HELD_OUT_WINDOWS = 32  # for the held-out loss of every save
LAYERS = 8
RECOMMENDED_SAMPLING = {"do_sample": True, "temperature": 0.7, "min_p": 0.05, "presence_penalty": 1.5}


def tiny_config(vocab_size: int, stop_tokens: tuple[int, ...], layers: int = LAYERS) -> ModelConfig:
    """Return the shape of the embedded model: every part of Qwen3.5-MoE, small."""
    return ModelConfig(
        hidden_size=256,
        num_layers=layers,
        layer_pattern=(LINEAR, LINEAR, LINEAR, FULL),
        q_heads=4,
        kv_heads=2,
        head_dim=64,
        rotary_dim=16,
        rope_theta=1e7,
        linear_k_heads=2,
        linear_v_heads=4,
        linear_k_dim=64,
        linear_v_dim=64,
        conv_width=4,
        vocab_size=vocab_size,
        num_experts=8,
        experts_per_token=2,
        expert_size=64,
        shared_expert_size=128,
        tied_embeddings=True,
        max_position=2048,
        stop_token_ids=stop_tokens,
    )


def _as_dtype(read: Callable[[], np.ndarray], dtype: np.dtype) -> np.ndarray:
    return read().astype(dtype)


def export(out: Path, model: LoadedModel, side_files: Path) -> None:
    """Replace `out` by the checkpoint of `model` in BF16, with every file of the folder `side_files`.

    As in published checkpoints, the decay rates and the norm behind DeltaNet stay float32.
    """

    def tensors() -> Iterator[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]:
        for name, shape, _, read in export_tensors(model):
            is_float32 = name.endswith(("A_log", "linear_attn.norm.weight"))
            dtype = np.dtype(np.float32 if is_float32 else ml_dtypes.bfloat16)
            yield name, shape, dtype, partial(_as_dtype, read, dtype)

    stops = list(model.cfg.stop_token_ids)
    new, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    write_safetensors_directory(
        new,
        config_to_hf(model.cfg) | {"dtype": "bfloat16"},
        tensors(),
        generation_config={"eos_token_id": stops, "pad_token_id": stops[1], **RECOMMENDED_SAMPLING},
        extra_files=sorted(side_files.iterdir()),
    )
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    new.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def training_texts(
    documents: list[data.Document], without: Sequence[str]
) -> tuple[list[data.Document], list[data.Document]]:
    """Return the texts that the tokenizer is trained on, and those that the model is trained on.

    The tokenizer would learn the few words of the small talk by heart, so it reads the other texts. It reads them all,
    whatever names are in `without`, because weights that one run hands to the next must mean the same tokens.

    Raises:
        SystemExit: a name in `without` is not the name of a text.
    """
    training = [document for document in documents if document.split == "train"]
    if unknown := set(without) - {document.name for document in training}:
        raise SystemExit(
            f"--without {min(unknown)!r}: no text to train on has this name. manifest.json lists the names."
        )
    return [d for d in training if d.name != data.SMALL_TALK], [d for d in training if d.name not in without]


def prepare(
    documents: list[data.Document], side_files: Path, layers: int = LAYERS, without: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, ModelConfig]:
    """Train the tokenizer and write all files but the weights to `side_files`.

    Returns:
        the tokens to train on, some held-out windows, and the config.
    """
    tokenizer_texts, model_texts = training_texts(documents, without)
    tokenizer = data.train_tokenizer(document.text for document in tokenizer_texts)
    vocab = tokenizer.get_vocab()
    ids = {name: vocab[name] for name in data.SPECIAL}
    cfg = tiny_config(tokenizer.get_vocab_size(), (ids["<|im_end|>"], ids["<|endoftext|>"]), layers)
    tokenizer.save(str(side_files / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": cfg.max_position,
        "chat_template": data.CHAT_TEMPLATE,
    }
    (side_files / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    manifest = data.manifest(documents, cfg, ids)
    (side_files / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    data.write_json_lines(side_files / "prompts.jsonl", data.demo_prompts(documents))
    held_out = data.pack([d for d in documents if d.split == "held-out" and d.domain == "books"], tokenizer)
    width = ROWS + 1 + len(MTP_WEIGHTS)
    windows = data.windows(held_out, width, max(ROWS, len(held_out) // HELD_OUT_WINDOWS))[:HELD_OUT_WINDOWS]
    return data.pack(model_texts, tokenizer), windows, cfg
