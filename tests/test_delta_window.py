"""The kernel for the rows of a verify window in interpret mode, against the recurrence in float64; its place in the model."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from test_kernels import assert_close

from kernels_pallas.deltanet import pick
from kernels_pallas.deltanet.triton import delta_window
from kernels_pallas.target import target
from mtpjax.model import deltanet

window = jax.jit(partial(delta_window, interpret=True))


def rows_of(rows: int, keys: int = 2, heads: int = 4, size: int = 32, width: int = 64) -> tuple[Any, ...]:
    """Three sequences; of the second the first rows are padding, and the third is idle."""
    rng = np.random.default_rng(rows)
    u, state = rng.normal(size=(3, rows, 2 * keys * size + heads * width)), rng.normal(size=(2, 3, heads, size, width))
    beta, g = rng.uniform(size=(3, rows, heads)), -rng.uniform(size=(3, rows, heads)) ** 2 * 3
    for row, dead in ((1, rows // 2), (2, rows)):
        for x in (beta, g):
            x[row, :dead] = 0
    return *(x.astype(np.float32) for x in (u, beta, g, state)), np.int32(1)


def stepped_through(u, beta, g, states, layer) -> tuple[np.ndarray, ...]:
    """In float64, a row after the other: outputs, updates, keys."""
    u, beta, g, state = (np.float64(x) for x in (u, beta, g, states[layer]))
    (batch, rows, channels), (heads, size, width) = u.shape, state.shape[1:]
    keys = (channels - heads * width) // (2 * size)
    q, k = (u[..., i * keys * size : (i + 1) * keys * size].reshape(batch, rows, keys, size) for i in range(2))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    v, single = u[..., 2 * keys * size :].reshape(batch, rows, heads, width), k
    q, k = (np.repeat(x, heads // keys, axis=2) for x in (q / np.sqrt(size), k))
    out, updates = np.zeros_like(v), np.zeros_like(v)
    for t in range(rows):
        state = state * np.exp(g[:, t])[..., None, None]
        updates[:, t] = beta[:, t, :, None] * (v[:, t] - np.einsum("bmkv,bmk->bmv", state, k[:, t]))
        state = state + k[:, t, ..., None] * updates[:, t, :, None]
        out[:, t] = np.einsum("bmkv,bmk->bmv", state, q[:, t])
    return out, updates, single


@pytest.mark.parametrize(("rows", "sizes"), [(1, (2, 4, 32, 64)), (5, (2, 4, 32, 64)), (9, (2, 2, 16, 16)), (16, (1, 3, 64, 32))])
def test_a_window_steps_through_the_recurrence(rows: int, sizes: tuple[int, ...]) -> None:
    args = rows_of(rows, *sizes)
    for got, want in zip(window(*args), stepped_through(*args), strict=True):
        assert_close(got, want, "float32")


def test_a_window_is_invariant_to_later_rows_and_to_the_batch_bit_for_bit() -> None:
    args = rows_of(5)
    rows, (state, layer) = args[:3], args[3:]
    whole = window(*args)
    for n in (1, 3):
        for got, want in zip(window(*(x[:, :n] for x in rows), state, layer), whole, strict=True):
            assert (np.asarray(got) == np.asarray(want[:, :n])).all()
    for got, want in zip(window(*(x[1:2] for x in rows), state[:, 1:2], layer), whole, strict=True):
        assert (np.asarray(got) == np.asarray(want[1:2])).all()


def test_the_model_sends_verify_windows_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets what the chunked form makes of them; what it does not take goes on in chunks."""
    args = rows_of(5)
    plain = deltanet.delta_window(*args)
    asked = []
    monkeypatch.setattr(deltanet, "pick", lambda *about: asked.append(about) or window)
    for got, want in zip(deltanet.delta_window(*args), plain, strict=True):
        assert_close(got, np.asarray(want, np.float64), "float32")
    assert asked == [(target(), 5, 32, 64)]
    assert pick("cuda", 5, 128, 128) is not None
    for about in (("cpu", 5, 128, 128), ("cuda", 17, 128, 128), ("cuda", 5, 24, 128), ("cuda", 5, 128, 8)):
        assert pick(*about) is None


def test_a_window_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="17 rows of heads of 32 x 64; expected at most 16 rows"):
        delta_window(*rows_of(17))
