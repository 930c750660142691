"""`argmax` and `map_rows`: other programs on a CPU than on a GPU, and the same results."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.platform import override_platform
from kernels_pallas.row_ops import argmax, map_rows

pytestmark = pytest.mark.fast


@pytest.fixture(params=["cpu", "cuda"])
def platform_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Functions that the test jits are traced for this platform; they run on the device that there is."""
    with override_platform(request.param):
        yield request.param


def test_argmax_is_the_first_index_of_the_largest_value(platform_name: str) -> None:
    logits = np.random.default_rng(0).integers(0, 5, (50, 3, 12)).astype(np.float32)  # full of ties
    logits[0], logits[1, :, :6] = -np.inf, -np.inf
    assert np.array_equal(jax.jit(lambda x: argmax(x))(logits), logits.argmax(-1))


@pytest.mark.parametrize("batch, num_rows", [(3, 4), (1, 5), (6, 1)])
def test_map_rows_gives_every_row_the_entry_of_its_sequence(platform_name: str, batch: int, num_rows: int) -> None:
    rng = np.random.default_rng(1)
    x, index = rng.normal(size=(batch, num_rows, 7)).astype(np.float32), rng.integers(0, 7, (batch, num_rows))
    scale = rng.normal(size=batch).astype(np.float32)
    shapes = []

    def pick(rows: tuple[jax.Array, jax.Array], sequences: tuple[jax.Array, None]) -> jax.Array:
        (x, index), (scale, _) = rows, sequences
        shapes.append(x.shape)
        return scale * jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]

    got = jax.jit(lambda rows, sequences: map_rows(pick, rows, sequences))((x, index), (scale, None))
    assert np.array_equal(got, scale[:, None] * np.take_along_axis(x, index[..., None], axis=2)[..., 0])
    assert shapes == [(batch if platform_name == "cpu" else batch * num_rows, 7)]
