"""Angles of scaled RoPE: the formula written out, and both implementations of the op that takes them."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import norm_rope_update_cache
from kernels_pallas.attention.shapes import AttentionShape, norm_rope_update_cache_inputs
from mtpjax.config import RopeScaling, yarn_attention_factor
from mtpjax.model import make_positions
from mtpjax.model.rope import rope_angles, scaled_frequencies
from tests.helpers.attention import random_inputs
from tests.helpers.models import tiny_config
from tests.helpers.numerics import assert_close

pytestmark = pytest.mark.fast
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position=262_144, attention_factor=yarn_attention_factor(4.0))
LINEAR = RopeScaling(kind="linear", factor=4.0, original_max_position=262_144)


def test_yarn_of_a_published_model() -> None:
    """64 rotated channels, theta 1e7, 262,144 positions times 4, as the card of Qwen3.8-27B has it."""
    found = scaled_frequencies(64, 1e7, YARN)
    for i, frequency in enumerate(found):
        plain = 1e7 ** (-2 * i / 64)
        # Channels that turn 32 times or more within 262,144 positions keep their frequency: 14.24 channels, rounded
        # down; those that turn less than once, after 21.12 channels, rounded up, turn a quarter as fast.
        divided = min(max((i - 14) / (22 - 14), 0), 1)
        assert frequency == pytest.approx(plain * (1 - divided) + plain / 4 * divided, rel=1e-6)
    turns = 262_144 / (2 * math.pi) * 1e7 ** (-np.array([14.24, 21.12]) / 32)
    np.testing.assert_allclose(turns, [32, 1], rtol=0.005)
    assert YARN.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert YARN.max_position == 1_048_576


def test_linear_divides_positions() -> None:
    positions = jnp.array([[0, 4, 400, 4000]])
    scaled, plain = rope_angles(positions, 8, 100.0, LINEAR), rope_angles(positions // 4, 8, 100.0)
    for one, other in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_attention_factor_multiplies_both() -> None:
    cos, sin = rope_angles(jnp.arange(9)[None], 8, 100.0, YARN)
    np.testing.assert_allclose(np.asarray(cos) ** 2 + np.asarray(sin) ** 2, YARN.attention_factor**2, rtol=1e-5)


def test_without_a_scaling_angles_keep_their_bits() -> None:
    positions = jnp.arange(300)[None]
    frequency = 1e7 ** (-jnp.arange(0, 64, 2, dtype=jnp.float32) / 64)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    cos, sin = rope_angles(positions, 64, 1e7)
    assert np.array_equal(cos, jnp.cos(angle)) and np.array_equal(sin, jnp.sin(angle))


@pytest.mark.parametrize("scaling", [YARN, LINEAR], ids=["yarn", "linear"])
def test_the_kernel_rotates_as_the_formula(scaling: RopeScaling) -> None:
    cfg = tiny_config(moe=False, head_dim=16, rotary_dim=6, rope_theta=100.0, rope_scaling=scaling)
    positions = make_positions(cfg, jnp.array([3, 50]), 4, jnp.zeros(2, jnp.int32), kv_len=64)
    shape = AttentionShape(layers=1, q_heads=4, kv_heads=2, head_dim=16, rotary_dim=6, kv_len=64, batch=2)
    specs = norm_rope_update_cache_inputs(shape, 4, "float32", num_partial_sums=4)
    where = np.asarray(positions.positions), np.asarray(positions.valid)
    projections, k_norm, q_norm, _, *others = random_inputs(specs, *where)
    update: Any = partial(jax.jit, static_argnames="implementation")(
        partial(norm_rope_update_cache, eps=1e-6, dtype="float32")
    )
    found = [
        update(projections, k_norm, q_norm, positions.rope, *others, implementation=how) for how in ("xla", "triton")
    ]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert_close(one, other, "float32")
