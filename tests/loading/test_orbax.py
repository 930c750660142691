"""Orbax folders: the model in one is that of the files, damage is named, and memory does not grow with the model."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import CheckpointError, OrbaxDirectory, SafetensorsDirectory
from mtpjax.loading import orbax_io, orbax_save
from mtpjax.loading.load import load_model
from mtpjax.loading.loaded_model import flatten_params
from mtpjax.loading.orbax_restore import orbax_tensors, restore_orbax
from mtpjax.loading.orbax_save import ORIGIN, save_orbax
from tests.golden.weights import golden_tensors
from tests.helpers.published_models import (
    PublishedModel,
    dense_tied,
    dense_without_mtp,
    moe_separate_experts,
    write,
)


def save(folder: Path, model: PublishedModel) -> Path:
    """Write a model to `folder/hf` and save it in the Orbax folder that is returned."""
    save_orbax(folder / "orbax", SafetensorsDirectory(write(folder / "hf", *model())))
    return folder / "orbax"


@pytest.mark.parametrize("model", [moe_separate_experts, dense_without_mtp])
def test_the_model_of_an_orbax_folder_is_that_of_the_files(
    model: PublishedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax_io, "BATCH_BYTES", 400_000)  # in several groups
    orbax = OrbaxDirectory(save(tmp_path, model))
    for dtype in (jnp.float32, jnp.bfloat16):
        for mtp in (True, False):
            expected = load_model(SafetensorsDirectory(tmp_path / "hf"), dtype=dtype, mtp=mtp)
            restored = restore_orbax(orbax, dtype=dtype, mtp=mtp)
            assert restored.cfg == expected.cfg and restored.graph == expected.graph
            leaves, expected_leaves = (flatten_params(model.params) for model in (restored, expected))
            assert list(leaves) == list(expected_leaves)
            for path, leaf in leaves.items():
                assert leaf[...].dtype == expected_leaves[path][...].dtype
                assert np.array_equal(np.asarray(leaf[...]), np.asarray(expected_leaves[path][...])), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), dense_tied)


def test_without_its_list_of_names_a_folder_loads_but_cannot_be_converted_back(saved: Path) -> None:
    file = saved / ORIGIN
    text = file.read_text()
    try:
        for broken, message in (
            (None, "cannot be read"),
            ('{"tensors": {"norm.weight": ["norm.weight", "int3"]}}', "cannot be read"),
            (text.replace("layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.bias"), "2 names do not fit"),
        ):
            file.unlink() if broken is None else file.write_text(broken)
            with pytest.raises(CheckpointError, match=f"{ORIGIN}: {message}"):
                list(orbax_tensors(OrbaxDirectory(saved)))
            restore_orbax(OrbaxDirectory(saved), dtype=jnp.float32)
    finally:
        file.write_text(text)


def test_a_tree_that_does_not_fit_its_config_is_an_error_that_lists_all_that_differs(saved: Path) -> None:
    file = saved / "config.json"
    text = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(text) | {"intermediate_size": 80, "tie_word_embeddings": False}))
        with pytest.raises(CheckpointError) as caught:
            restore_orbax(OrbaxDirectory(saved), dtype=jnp.float32)
    finally:
        file.write_text(text)
    message = str(caught.value)
    assert "16 weights do not fit" in message  # gate, up and down of 4 layers and the MTP head, and the LM head
    assert "'lm_head' is missing, expected shape [160, 64]" in message
    assert "'decoder.blocks.0.layers.3.mlp.up' has shape [1, 96, 64], expected shape [1, 80, 64]" in message


@pytest.mark.parametrize("damage", ["truncated", "no metadata", "no data"])
def test_a_damaged_tree_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One read after the other: of several reads that fail at once, Orbax reports all but the first to a closed loop.
    monkeypatch.setattr(orbax_io, "BATCH_BYTES", 1)
    params = save(tmp_path, dense_tied) / "params"
    largest = max((f for f in params.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "no metadata":
        (params / "_METADATA").unlink()
    else:
        largest.unlink()
    with pytest.raises(CheckpointError, match=str(params)):
        restore_orbax(OrbaxDirectory(tmp_path / "orbax"), dtype=jnp.float32)


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_io, "BATCH_BYTES", 50_000)
    sizes: list[int] = []
    peaks: list[int] = []
    freed: list[int] = []

    def watched(make: Callable[[], NDArray[Any]]) -> orbax_io.LazyLeaf:
        def make_watched() -> NDArray[Any]:
            array = make()
            weakref.finalize(array, freed.append, array.nbytes)
            sizes.append(array.nbytes)
            peaks.append(sum(sizes) - sum(freed))
            return array

        return orbax_io.LazyLeaf(make_watched)

    monkeypatch.setattr(orbax_save, "LazyLeaf", watched)
    save(tmp_path, lambda: ("dense_r2", golden_tensors("dense_r2")))
    assert max(peaks) <= 50_000 + max(sizes) < sum(sizes) / 8
