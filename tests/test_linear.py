"""`linear` on a CPU: what its special cases promise."""

import jax
import numpy as np
import pytest

from kernels_pallas.matmul import linear
from kernels_pallas.matmul.api import FEW_ROWS


@pytest.mark.parametrize("rows", [2, FEW_ROWS])
def test_few_rows_of_a_small_weight_are_each_what_they_are_alone(rows: int) -> None:
    """Bit for bit, as no product of all rows at once promises: verifying drafts gives the logits of plain decoding."""
    rng = np.random.default_rng(rows)
    x, w = rng.normal(size=(rows, 256)).astype(np.float32), rng.normal(size=(200, 256)).astype(np.float32)
    together, alone = (np.asarray(jax.jit(linear)(some, w)) for some in (x.reshape(1, rows, 256), x[1:2]))
    assert together.shape == (1, rows, 200)
    np.testing.assert_array_equal(together[0, 1], alone[0])
    np.testing.assert_allclose(together[0], x @ w.T, rtol=1e-4, atol=1e-4)


def test_only_few_rows_are_taken_one_by_one() -> None:
    """Eight products for eight rows; one for many rows, and one where the weight is large."""

    def products(rows: int, size: int) -> int:
        x, w = jax.ShapeDtypeStruct((rows, 64), np.float32), jax.ShapeDtypeStruct((size, 64), np.float32)
        return str(jax.make_jaxpr(linear)(x, w)).count("dot_general")

    assert (products(8, 64), products(FEW_ROWS + 1, 64), products(8, 8192)) == (8, 1, 1)
