"""An LM head beside tied embeddings: compared a chunk at a time, used if it differs, shared if it does not."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from checkpoints import OrbaxDirectory, QuantizedDirectory, SafetensorsDirectory, write_safetensors_directory
from checkpoints.errors import CheckpointError, CheckpointWarning
from mtpjax.cli import convert
from mtpjax.loading import lm_head
from mtpjax.loading.load import load_checkpoint, load_model
from mtpjax.loading.loaded_model import LoadedModel, flatten_params
from tests.golden.forms import form_config, form_tensors
from tests.helpers.quantized_folders import FORMATS

FORM = "tied_own_head"
Change = Callable[[np.ndarray], np.ndarray]


def write(folder: Path, head: Change, dtype: Any = np.float32) -> SafetensorsDirectory:
    """Write a tied model whose LM head is `head(embedding)`; matrices of the vocabulary in `dtype`."""
    tensors = form_tensors(FORM)
    embedding = tensors["model.embed_tokens.weight"].astype(dtype)
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head(embedding)}
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()]
    write_safetensors_directory(folder, form_config(FORM), entries)
    return SafetensorsDirectory(folder)


def change_last(x: np.ndarray) -> np.ndarray:
    changed = x.copy()
    changed[-1, -1] += 1
    return changed


def load(source: Any) -> LoadedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        return load_checkpoint(source, dtype=np.float32)


@pytest.mark.parametrize(
    ("head", "own"),
    [(np.copy, False), (lambda x: x.astype(np.float64), False), (change_last, True), (lambda x: -x, True)],
)
def test_the_values_decide(head: Change, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "_CHUNK_ELEMENTS", 1000)  # 160 x 64 elements: the last chunk is shorter
    source = write(tmp_path, head, ml_dtypes.bfloat16)
    if own:
        with pytest.warns(CheckpointWarning, match=f"^{tmp_path}: tie_word_embeddings is true, but 'lm_head.weight'"):
            model = load_model(source)
    else:
        model = load_model(source)
    assert model.cfg.tied_embeddings is not own
    if own:
        want = source.read("lm_head.weight").astype(np.float32)
        np.testing.assert_array_equal(model.params["lm_head"][...], want)


def test_zeros_of_both_signs_are_equal(tmp_path: Path) -> None:
    def with_zero(x: np.ndarray) -> np.ndarray:
        x[0, 0], head = 0.0, x.copy()
        head[0, 0] = -0.0
        return head

    assert load_model(write(tmp_path, with_zero)).cfg.tied_embeddings


def test_a_quantised_head_is_the_models_own(tmp_path: Path) -> None:
    """Its values are those of another matrix, even where it was made from the embedding."""
    tensors = form_tensors(FORM)
    head, values = FORMATS["gptq"].encode(tensors["model.embed_tokens.weight"])
    tensors |= {f"lm_head.{suffix}": array for suffix, array in head.items()}
    entries = [(name, a.shape, a.dtype, lambda a=a: a.copy()) for name, a in tensors.items()]
    config = form_config(FORM) | {"quantization_config": FORMATS["gptq"].config}
    write_safetensors_directory(tmp_path, config, entries)
    model = load(QuantizedDirectory(tmp_path))
    assert not model.cfg.tied_embeddings
    np.testing.assert_array_equal(model.params["lm_head"][...], values)


def test_another_shape_is_reported_like_any_other(tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="'lm_head.weight' .* has shape"):
        load_model(write(tmp_path, lambda x: x[:-1].copy()))


def test_orbax_and_back_keep_the_head(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", change_last)
    want = flatten_params(load(source).params)
    with pytest.warns(CheckpointWarning):
        assert convert.main([str(tmp_path / "hf"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert convert.main([str(tmp_path / "orbax"), str(tmp_path / "back"), "--to", "hf"]) == 0
    for again in (OrbaxDirectory(tmp_path / "orbax"), SafetensorsDirectory(tmp_path / "back")):
        model = load(again)
        assert not model.cfg.tied_embeddings
        found = flatten_params(model.params)
        assert found.keys() == want.keys()
        for path, leaf in want.items():
            np.testing.assert_array_equal(found[path][...], leaf[...])
