"""Compare how this program reads quantised Hugging Face folders with the libraries that write them, tensor by tensor.

    pip install torch transformers compressed-tensors llmcompressor nvidia-modelopt auto-round gptqmodel autoawq
    python -m scripts.format_checks.check_formats [--only gptqmodel] [--out docs/benchmarks/formats.json]

Each library packs the matrices of two random models on a CPU. The folder is read, its values are compared bit by bit
with the library's own in float32, and its logits, computed with packed weights, with those of a plain folder of the
library's values. Then libraries quantise the whole models, in the form that transformers gives them, and the logits of
their folders are compared with those of their own models. A missing library is reported and left out; a folder with its
sources on `PYTHONPATH` serves as well as an installation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.torch import save_file

from checkpoints import TINY, CheckpointError, QuantizedDirectory, open_checkpoint
from mtpjax import LLM
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.loading.random_init import random_model
from mtpjax.loading.weight_map import check_source
from scripts.benchmarks.results import describe, write_json
from scripts.format_checks.cases import CASES
from scripts.format_checks.packing import Case, Packed
from scripts.format_checks.pipelines import Pipeline, pipelines

NOT_QUANTIZED = (  # parts of names
    "norm",
    "conv1d",
    "gate.weight",
    "in_proj_a",
    "in_proj_b",
    "embed_tokens",
    "lm_head",
    "mtp.fc",
    "A_log",
    "dt_bias",
)
IDS = np.random.default_rng(0).integers(0, 250, 48).tolist()
MODEL_KINDS = ("moe", "dense")


def model_config(moe: bool) -> ModelConfig:
    """Return a model of two layers and an MTP head, whose rows and columns all formats can cut into groups of 128."""
    mlp: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "expert_size": 128, "shared_expert_size": 128}
    if not moe:
        mlp = {"mlp_size": 384}
    return ModelConfig(
        hidden_size=256,
        num_layers=2,
        layer_pattern=(LINEAR, FULL),
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
        vocab_size=256,
        stop_token_ids=(255,),
        **mlp,
    )


def random_weights(cfg: ModelConfig) -> dict[str, torch.Tensor]:
    """Return random bfloat16 weights by published name, with a tensor for each matrix of an expert.

    A quarter of the columns has one sign only, so that asymmetric formats get zero points at the ends of their range.
    """
    out = {}
    for name, shape, _, read in export_tensors(random_model(cfg, scale=0.08)):
        weight = torch.from_numpy(read().astype(np.float32).copy()).to(torch.bfloat16)
        if is_matrix(name) or len(shape) == 3 and "experts" in name:
            weight[..., : weight.shape[-2] // 4, :] = weight[..., : weight.shape[-2] // 4, :].abs()
        if name.endswith("gate_up_proj"):
            for e, pair in enumerate(weight):
                prefix = f"{name.removesuffix('gate_up_proj')}{e}"
                for projection, matrix in zip(("gate_proj", "up_proj"), pair.chunk(2), strict=True):
                    out[f"{prefix}.{projection}.weight"] = matrix.clone()
        elif len(shape) == 3 and name.endswith("down_proj"):
            out |= {
                f"{name.removesuffix('down_proj')}{e}.down_proj.weight": matrix.clone()
                for e, matrix in enumerate(weight)
            }
        else:
            out[name] = weight
    return out


def is_matrix(name: str) -> bool:
    """Return whether the weight is a matrix that is quantised."""
    return name.endswith(".weight") and not any(part in name for part in NOT_QUANTIZED)


def write(folder: Path, cfg: ModelConfig, tensors: dict[str, torch.Tensor], **extra: Any) -> Path:
    """Write a checkpoint; `extra` are further entries of config.json."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_hf(cfg) | extra))
    return folder


def compare(folder: Path, cfg: ModelConfig, weights: dict[str, torch.Tensor], packed: Packed) -> dict[str, Any]:
    """Compare every quantised tensor and the logits of one model."""
    plain = write(folder / "plain", cfg, {n: packed.values.get(n, w).float() for n, w in weights.items()})
    source = open_checkpoint(write(folder / "packed", cfg, packed.tensors, quantization_config=packed.config))
    assert isinstance(source, QuantizedDirectory)
    num_equal, num_packed, worst, layouts = 0, 0, 0.0, set()
    for raw, value in packed.values.items():
        name, want = raw.removeprefix("model."), value.numpy()
        got = source.read(name)
        num_equal += np.array_equal(got, want)
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
        if (array := source.read_packed(name)) is not None:
            num_packed += 1
            layouts.add(array.layout)
    wanted = LLM(plain, dtype="float32", max_model_len=64).logits(IDS)
    return {
        "tensors": len(packed.values),
        "equal": int(num_equal),
        "kept_packed": num_packed,
        "layouts": sorted(layouts),
        "largest_difference": worst,
        "logits_difference": logits_difference(folder / "packed", wanted),
    }


def logits_difference(folder: Path, wanted: np.ndarray) -> float:
    """Return the largest difference of this program's logits, with packed weights, relative to the largest logit."""
    logits = LLM(folder, dtype="float32", max_model_len=64, quantization="packed").logits(IDS)
    return float(np.abs(logits - wanted).max() / np.abs(wanted).max())


def installed_version(library: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def check(case: Case) -> dict[str, Any]:
    """Check one format with both models.

    "skipped" and "failed" say why the library packed nothing, "refused" why this program does not read the folder.
    """
    row: dict[str, Any] = {"library": case.library, "version": installed_version(case.library), "format": case.name}
    for kind in MODEL_KINDS:
        cfg = model_config(kind == "moe")
        weights = random_weights(cfg)
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # the libraries print a lot
                packed = case.make(weights, is_matrix)
        except ImportError as error:
            return row | {"skipped": f"{type(error).__name__}: {error}"}
        except Exception as error:  # of a library; the other libraries are still checked
            return row | {"failed": f"{type(error).__name__}: {error}"}
        with tempfile.TemporaryDirectory() as folder:
            try:
                row[kind] = compare(Path(folder), cfg, weights, packed)
            except CheckpointError as error:
                return row | {"refused": str(error).replace(folder, "").lstrip("/")}
    return row


def check_whole(pipeline: Pipeline) -> dict[str, Any]:
    """Check a checkpoint that a library made of a whole model: that it has the tensors of the model, and its logits."""
    row: dict[str, Any] = {
        "library": pipeline.library,
        "version": installed_version(pipeline.library),
        "format": pipeline.name,
    }
    for kind in MODEL_KINDS:
        cfg = model_config(kind == "moe")
        weights = {
            name: torch.from_numpy(read().astype(np.float32).copy())
            for name, _, _, read in export_tensors(random_model(cfg, scale=0.08))
        }
        with tempfile.TemporaryDirectory() as folder:
            plain, target = write(Path(folder, "plain"), cfg, weights), Path(folder, "packed")
            try:
                with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                    wanted = pipeline.make(plain, target, IDS)
            except ImportError as error:
                return row | {"skipped": f"{type(error).__name__}: {error}"}
            except Exception as error:
                return row | {"failed": f"{type(error).__name__}: {error}"}
            try:
                source = open_checkpoint(target)
                assert isinstance(source, QuantizedDirectory)
                check_source(source)
            except CheckpointError as error:
                return row | {"refused": str(error).replace(folder, "").lstrip("/")}
            row[kind] = {
                "kept_packed": sum(source.read_packed(name) is not None for name in source.tensors),
                "logits_difference": None if wanted is None else logits_difference(target, wanted.numpy()),
            }
    return row


def show(row: dict[str, Any]) -> str:
    """Return a line of either table."""
    title = f"{row['library']:19}{row['version'] or '-':9}{row['format']:30}"
    if why := row.keys() & {"skipped", "failed", "refused"}:
        return f"{title}{min(why)}: {row[min(why)]}"
    both = [row[kind] for kind in MODEL_KINDS]
    num_packed = sum(model["kept_packed"] for model in both)
    differences = [model["logits_difference"] for model in both]
    logits = "not compared" if None in differences else f"{max(differences):.1e}"
    if "tensors" not in both[0]:
        return f"{title}{num_packed:>9}{logits:>14}"
    tensors, equal = (sum(model[key] for model in both) for key in ("tensors", "equal"))
    difference = max(model["largest_difference"] for model in both)
    layouts = ", ".join(sorted({layout for model in both for layout in model["layouts"]})) or "unpacked"
    return f"{title}{f'{equal}/{tensors}':>9}{difference:10.1e}{logits:>10}  {layouts} ({num_packed} packed)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", help="names of libraries or of formats")
    parser.add_argument("--out", default="docs/benchmarks/formats.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'library':19}{'version':9}{'format':30}{'equal':>9}{'tensors':>10}{'logits':>10}  in memory")
    rows = []

    def is_chosen(case: Case | Pipeline) -> bool:
        return not args.only or bool({case.library, case.name} & {*args.only})

    for case in filter(is_chosen, CASES):
        rows.append(check(case))
        print(show(rows[-1]), flush=True)
    print(f"\n{'whole models by':28}{'':30}{'packed':>9}{'logits':>14}")
    whole = []
    for pipeline in filter(is_chosen, pipelines(TINY / "tokenizer.json")):
        whole.append(check_whole(pipeline))
        print(show(whole[-1]), flush=True)
    libraries = {
        name: installed_version(name) for name in ("llmcompressor", *dict.fromkeys(case.library for case in CASES))
    }
    write_json(
        args.out,
        {"run": describe(), "libraries": libraries, "positions": len(IDS), "rows": rows, "whole_models": whole},
    )
    wrong = [row for row in rows for kind in MODEL_KINDS if kind in row and row[kind]["equal"] < row[kind]["tensors"]]
    if wrong or any(row.keys() & {"failed", "refused"} for row in rows + whole):
        raise SystemExit("check_formats: values differ, a library failed, or a folder is refused")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
