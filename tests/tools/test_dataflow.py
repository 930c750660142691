"""Looking into a traced program: arrays of inner programs are found, values that no output depends on are not read."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

from scripts.benchmarks.dataflow import Mask, arrays, inputs_read
from tests.helpers.programs import abstract


@pytest.mark.parametrize("wrapper", ["scan", "while", "cond", "jit", "remat", "custom_vjp"])
def test_arrays_of_inner_programs_are_found(wrapper: str) -> None:
    @jax.custom_vjp
    def custom(x: Array) -> Array:
        return inner(x)

    def inner(x: Array) -> Array:
        with jax.named_scope("deep"):
            return jnp.sum(x[:, None] * jnp.ones((1, 7)))

    custom.defvjp(lambda x: (inner(x), x), lambda x, g: (x * g,))
    programs: dict[str, Any] = {
        "scan": lambda x: lax.scan(lambda c, _: (c + inner(x), None), jnp.zeros(()), None, length=3)[0],
        "while": lambda x: lax.while_loop(lambda c: c < 9.0, lambda c: c + inner(x), jnp.zeros(())),
        "cond": lambda x: lax.cond(x[0] > 0, inner, lambda y: y[0], x),
        "jit": jax.jit(inner),
        "remat": jax.checkpoint(inner),
        "custom_vjp": custom,
    }
    jaxpr = jax.make_jaxpr(programs[wrapper])(abstract(5))
    products = [a for a in arrays(jaxpr) if a.shape == (5, 7) and a.made_by == "mul"]
    assert len(products) == 1
    assert any(wrapper in name for name in products[0].scope)
    assert "deep" in products[0].scope[-1]


def test_dead_values_of_a_while_loop_are_not_read() -> None:
    def body(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        used, counter, dead, feeds_dead = carry
        return used + counter, counter + 1, dead * feeds_dead, feeds_dead

    def f(used: Array, counter: Array, dead: Array, feeds_dead: Array, consts: Array) -> tuple[Array, Array]:
        used, counter, dead, _ = lax.while_loop(lambda c: c[1] < 4, body, (used, counter, dead, feeds_dead))
        return used, (dead * consts)[:0]

    closed = jax.make_jaxpr(f)(*[abstract(3), abstract(), abstract(3), abstract(3), abstract(3)])
    assert inputs_read(closed) == (True, True, False, False, False)

    def until(x: Array, n: Array, step: Array) -> Array:
        """Only the test of the loop reads n, and only n reads step."""
        return lax.while_loop(lambda c: c[1] < 4, lambda c: (c[0] * 2, c[1] + c[2], c[2]), (x, n, step))[0]

    assert inputs_read(jax.make_jaxpr(until)(abstract(3), abstract(), abstract())) == (True, True, True)


def test_dead_values_of_a_scan_are_not_read() -> None:
    def scan(a: Array, b: Array, c: Array, xs: Array) -> dict[str, Array]:
        carry = lambda state, x: ((state[0] + state[1], state[1] * c[0], state[2] + x), state[2])  # noqa: E731
        (first, _, _), ys = lax.scan(carry, (a, b, a), xs)
        return {"first": first, "scanned": ys}

    def read_for(output: str) -> Mask:
        f = lambda *args: scan(*args)[output]  # noqa: E731
        return inputs_read(jax.make_jaxpr(f)(abstract(), abstract(), abstract(2), abstract(5)))

    assert read_for("first") == (True, True, True, False)
    assert read_for("scanned") == (True, False, False, True)
