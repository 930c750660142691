"""The golden models of `tests/golden/forms.py` as folders, what they compute, and the answers of transformers."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints import SafetensorsDirectory, write_safetensors_directory
from checkpoints.errors import CheckpointWarning
from mtpjax.loading.load import load_model
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model import make_positions
from mtpjax.model.cache import KV_BLOCK, new_cache
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


@partial(jax.jit, static_argnames="graph")
def run(params: Any, tokens: jax.Array, *, graph: Any) -> tuple[jax.Array, jax.Array]:
    """Logits of one uncached chunk, and those of the MTP head over its pairs (row t, token t + 1)."""
    model = nnx.merge(graph, params)
    zero, none = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    cache = new_cache(model.cfg, 1, KV_BLOCK)
    rows, cache = model.trunk(tokens[None], cache, make_positions(model.cfg, zero, len(tokens), none, kv_len=KV_BLOCK))
    hidden = model.final_norm(rows)
    pairs = make_positions(model.cfg, zero, len(tokens) - 1, none, kv_len=KV_BLOCK)
    mtp, _ = model.mtp_step(hidden[:, :-1], tokens[None, 1:], cache, pairs)
    return model.head(hidden)[0], model.head(mtp)[0]


def agree(ours: Any, form: str, name: str, tolerance: float = TOLERANCE) -> None:
    """Stored rows within the tolerance, with the same choice in every row."""
    theirs = ANSWERS[f"{form}/{name}"]
    rows = np.asarray(ours)[STORED_ROWS]
    assert rows.shape == theirs.shape
    assert float(np.abs(rows - theirs).max()) <= tolerance
    assert np.array_equal(rows.argmax(-1), theirs.argmax(-1))
