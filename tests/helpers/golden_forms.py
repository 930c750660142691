"""The golden models of `tests/golden/forms.py` as folders, what they compute, and the answers of transformers."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import SafetensorsDirectory, write_safetensors_directory
from checkpoints.errors import CheckpointWarning
from mtpjax.loading.load import load_model
from mtpjax.loading.loaded_model import LoadedModel
from tests.golden.forms import STORED_ROWS, TIED_FORMS, form_config, form_tensors

ANSWERS = dict(np.load(Path(__file__).parent.parent / "golden" / "forms.npz"))
TOLERANCE = 1e-4


def write_form(folder: Path, form: str, **config: Any) -> Path:
    """Write the folder of a form, its config changed by `config`."""
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in form_tensors(form).items()]
    write_safetensors_directory(folder, form_config(form) | config, entries)
    return folder


def load_form(folder: Path, form: str, **config: Any) -> LoadedModel:
    """Write the folder of a form and load it in float32."""
    source = SafetensorsDirectory(write_form(folder, form, **config))
    with warnings.catch_warnings():
        if form in TIED_FORMS:
            warnings.simplefilter("ignore", CheckpointWarning)
        return load_model(source)


def agree(ours: Any, form: str, name: str, tolerance: float = TOLERANCE) -> None:
    """Stored rows within the tolerance, with the same choice in every row."""
    theirs = ANSWERS[f"{form}/{name}"]
    rows = np.asarray(ours)[STORED_ROWS]
    assert rows.shape == theirs.shape
    assert float(np.abs(rows - theirs).max()) <= tolerance
    assert np.array_equal(rows.argmax(-1), theirs.argmax(-1))
