"""The kernels for the many rows of a prompt in interpret mode, against the recurrence in float64; their place in the model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gated_delta_rule import pick_chunks
from kernels_pallas.gated_delta_rule.triton_chunks import delta_chunks
from kernels_pallas.platform import platform
from mtpjax.model import gated_deltanet as deltanet
from tests.kernels.test_packed_matmul import assert_close

kernels = jax.jit(partial(delta_chunks, interpret=True), static_argnames=("chunk", "dtype"))


def rows_of(
    rows: int, keys: int = 2, heads: int = 4, size: int = 32, width: int = 32, alike: bool = False
) -> tuple[Any, ...]:
    """Two sequences; the second begins with padding. `alike`: all keys are nearly the same, and all steps whole."""
    rng = np.random.default_rng(rows)
    q, k = rng.normal(size=(2, 2, rows, keys, size))
    if alike:
        k = 1 + 0.01 * k
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True)) for x in (q, k))
    v, state = rng.normal(size=(2, rows, heads, width)), rng.normal(size=(3, 2, heads, size, width))
    beta, g = rng.uniform(size=(2, rows, heads)), -(rng.uniform(size=(2, rows, heads)) ** 3)
    if alike:
        beta, g = np.ones_like(beta), g * 0.01
    beta[1, :7], g[1, :7] = 0, 0
    return deltanet.Rows(*(x.astype(np.float32) for x in (q / np.sqrt(size), k, v, beta, g))), state.astype(np.float32)


def stepped_through(rows: deltanet.Rows, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q, k, v, beta, g = (np.float64(x) for x in rows)
    ratio, state, out = v.shape[2] // k.shape[2], np.float64(state), np.zeros(v.shape)
    q, k = (np.repeat(x, ratio, axis=2) for x in (q, k))
    for t in range(v.shape[1]):
        state = state * np.exp(g[:, t])[..., None, None]
        d = beta[:, t, :, None] * (v[:, t] - np.einsum("bmkv,bmk->bmv", state, k[:, t]))
        state = state + k[:, t, ..., None] * d[:, :, None]
        out[:, t] = np.einsum("bmkv,bmk->bmv", state, q[:, t])
    return out, state


@pytest.mark.parametrize(
    ("rows", "chunk", "sizes"),
    [(16, 16, (2, 4, 32, 32)), (96, 32, (1, 2, 16, 32)), (192, 64, (2, 4, 32, 16)), (64, 64, (2, 2, 128, 128))],
)
@pytest.mark.parametrize("alike", [False, True])
def test_chunks_step_through_the_recurrence(rows: int, chunk: int, sizes: tuple[int, ...], alike: bool) -> None:
    given, state = rows_of(rows, *sizes, alike)
    decay = np.cumsum(given.g.reshape(2, -1, chunk, sizes[1]), axis=2).reshape(given.g.shape)
    got = kernels(*given[:4], decay, state, 1, chunk=chunk, dtype="float32")
    o, _, _, after = deltanet._in_chunks(given, jnp.asarray(state[1]))  # the plain form
    for *forms, want in zip(got, (o, after), stepped_through(given, state[1]), strict=True):
        for form in forms:
            assert_close(form, want, "float32")


def test_rows_of_padding_change_nothing() -> None:
    """Bit for bit: a sequence that is all padding leaves its state as it was."""
    given, state = rows_of(64)
    dead = given._replace(beta=np.zeros_like(given.beta), g=np.zeros_like(given.g))
    _, after = kernels(*dead[:4], dead.g, state, 2, chunk=64, dtype="float32")
    assert (np.asarray(after) == state[2]).all()


@pytest.mark.parametrize("rows", [130, 40, 16])
def test_the_model_sends_prompts_through_the_kernels(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets what the plain form makes of them, also where the rows are no whole chunks."""
    given, state = rows_of(rows)
    want = deltanet.read_rows(given, jnp.asarray(state), 1, "float32")
    asked = []
    monkeypatch.setattr(deltanet, "pick_chunks", lambda *about: asked.append(about) or kernels)
    got = deltanet.read_rows(given, jnp.asarray(state), 1, "float32")
    assert asked == [(platform(), {130: 64, 40: 32, 16: 16}[rows], 32, 32)]
    for one, other in zip(got, want, strict=True):
        assert_close(one, np.asarray(other, np.float64), "float32")
    deltanet.read_rows(given, jnp.asarray(state), 1, "float32", differentiable=True)  # kernels have no gradients
    assert len(asked) == 1


def test_which_heads_they_take() -> None:
    assert pick_chunks("cuda", 64, 128, 128) is not None and pick_chunks("cpu", 64, 128, 128) is None
    assert pick_chunks("cuda", 8, 128, 128) is None and pick_chunks("cuda", 64, 24, 128) is None
