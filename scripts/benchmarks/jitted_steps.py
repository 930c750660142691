"""The programs of generation, jitted with the engine's donation, for benchmarks and compile checks."""

from __future__ import annotations

import jax

from mtpjax.decoding import speculative, steps

prefill = jax.jit(steps.prefill, static_argnames=steps.PREFILL_STATIC, donate_argnames=steps.PREFILL_DONATED)
forward_hidden = jax.jit(
    steps.forward_hidden, static_argnames=steps.FORWARD_HIDDEN_STATIC, donate_argnames=steps.FORWARD_HIDDEN_DONATED
)
decode = jax.jit(
    speculative.decode, static_argnames=speculative.DECODE_STATIC, donate_argnames=speculative.DECODE_DONATED
)
insert_requests = jax.jit(speculative.insert_requests, donate_argnames=speculative.INSERT_DONATED)
