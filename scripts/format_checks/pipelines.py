"""Whole checkpoints of the libraries that quantise a model of transformers, with their own folder, names and config.

Each of `pipelines` makes the folder `target` from the float32 folder `plain` on a CPU. It returns logits `[T, V]` of
the library's own quantised model in float32, or None if that model does not run on a CPU or also quantises activations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

IGNORED = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_[ab]$"]
Make = Callable[[Path, Path, Sequence[int]], torch.Tensor | None]


class Pipeline(NamedTuple):
    name: str
    library: str  # name of its distribution
    make: Make


def _load(folder: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float()


def llm_compressor(plain: Path, target: Path, ids: Sequence[int], scheme: str) -> torch.Tensor:
    """Quantise with a preset scheme of llm-compressor."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = _load(plain)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=IGNORED))
    logits = _logits(model, ids)
    model.save_pretrained(target, save_compressed=True)
    return logits


def modelopt(plain: Path, target: Path, ids: Sequence[int], name: str) -> torch.Tensor | None:
    """Quantise with a config of modelopt.

    The INT8 export rounds a few elements to the other neighbour than its model does, so logits differ by 1e-4. There
    are no logits for NVFP4, which modelopt simulates on a GPU only, and for configs that quantise activations.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = _load(plain)
    mtq.quantize(model, getattr(mtq, f"{name}_CFG"), lambda m: _logits(m, ids))
    logits = None if "NVFP4" in name or "DEFAULT" in name else _logits(model, ids)
    export_hf_checkpoint(model, export_dir=str(target))
    return logits


def auto_round(plain: Path, target: Path, ids: Sequence[int], tokenizer: Path, **settings: Any) -> None:
    """Quantise with auto-round, which includes the MTP head.

    Its own kernels need a further package on a CPU, so there are no logits.
    """
    from auto_round import AutoRound
    from transformers import PreTrainedTokenizerFast

    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    rounder = AutoRound(_load(plain), hf_tokenizer, iters=0, disable_opt_rtn=True, device_map="cpu", **settings)
    rounder.quantize_and_save(str(target), format="auto_round")
    for config in target.glob("*/config.json"):  # it makes a folder of its own inside
        for file in config.parent.iterdir():
            file.rename(target / file.name)


def pipelines(tokenizer: Path) -> list[Pipeline]:
    """Return all pipelines. `tokenizer` is a tokenizer.json, which auto-round requires."""
    compressor = ("W4A16", "W4A16_ASYM", "W8A16", "NVFP4A16", "MXFP4A16")
    return [
        *(Pipeline(name, "llmcompressor", partial(llm_compressor, scheme=name)) for name in compressor),
        *(
            Pipeline(name, "nvidia-modelopt", partial(modelopt, name=name))
            for name in (
                "NVFP4_DEFAULT",
                "W4A16_NVFP4",
                "FP8_DEFAULT",
                "FP8_2D_BLOCKWISE_WEIGHT_ONLY",
                "INT8_WEIGHT_ONLY",
            )
        ),
        Pipeline("W4A16", "auto-round", partial(auto_round, tokenizer=tokenizer, scheme="W4A16")),
        Pipeline(
            "W4A16, asymmetric", "auto-round", partial(auto_round, tokenizer=tokenizer, scheme="W4A16", sym=False)
        ),
    ]
