"""How often the model's loops run whose trip count is known only at run time: attention over the cache, and experts."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from kernels_pallas.grouped_matmul.plan import choose_window_sizes, num_places
from mtpjax.config import ModelConfig
from mtpjax.model.cache import KV_BLOCK
from scripts.benchmarks.dataflow import open_jaxpr
from scripts.benchmarks.flops import WhileTripCounts


def while_trip_counts(cfg: ModelConfig, *, rows: int, context: int, num_output_rows: int = 0) -> WhileTripCounts:
    """Return a function from a `while` of the model to its iterations, for a step of `rows` rows without padding.

    The function knows a loop by what it carries. Attention over the cache takes exactly the blocks that hold `context`
    tokens. Experts take the expected number of windows of the loop's size if every row chose its experts uniformly and
    independently, so that the rows of an expert are binomially distributed.

    Args:
        rows: batch x rows of the step.
        context: committed tokens of the longest sequence after the step.
        num_output_rows: batch x rows that the last layer returns, where these are fewer than `rows`.

    Raises (the function returned):
        ValueError: another loop, or expert windows that are not those of `rows` rows.
    """

    def trip_count(eqn: JaxprEqn) -> float:
        dtypes = (jnp.floating, jnp.uint16)  # the latter: rows of bfloat16, carried as bits
        carried = [v.aval.shape for v in eqn.outvars if any(jnp.issubdtype(v.aval.dtype, dtype) for dtype in dtypes)]
        if [len(s) for s in carried] == [5, 5, 5] and carried[0][-1] == carried[1][-1] == 1:
            return -(-context // KV_BLOCK)
        if cfg.num_experts and [s[1:] for s in carried] == [(cfg.hidden_size,)]:
            for valid_rows in filter(None, (rows, num_output_rows)):
                sizes = choose_window_sizes(valid_rows, cfg.experts_per_token, cfg.num_experts)
                size = _rows_written(eqn)
                places = num_places(valid_rows * cfg.experts_per_token, cfg.num_experts, sizes)
                if size in sizes and carried[0][0] == places:
                    chance = cfg.experts_per_token / cfg.num_experts
                    return cfg.num_experts * _expected_windows(valid_rows, chance, sizes, size)
        raise ValueError(
            f"a loop that carries {carried} is neither attention nor the experts of {rows} rows of this model"
        )

    return trip_count


def _rows_written(loop: JaxprEqn) -> int | None:
    """Return the rows of the slice that an iteration updates."""
    body = open_jaxpr(loop.params["body_jaxpr"])
    updates = [eqn.invars[1].aval.shape[0] for eqn in body.eqns if eqn.primitive.name == "dynamic_update_slice"]
    return updates[0] if len(updates) == 1 else None


def _expected_windows(rows: int, chance: float, sizes: Sequence[int], size: int) -> float:
    """Return the expected windows of one size for an expert with X ~ Binomial(rows, chance) rows.

    `kernels_pallas.grouped_matmul.plan.align_windows` cuts the rows of an expert into windows of the largest size, and
    one more for the rest.
    """
    step, largest = sizes[0], sizes[-1]
    n = np.arange(rows + 1)
    windows = (-(-(n % largest) // step) * step == size) + (n // largest if size == largest else 0)
    if chance >= 1:
        return float(windows[rows])
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(n[1:]))])
    log_p = (
        log_factorial[rows] - log_factorial - log_factorial[::-1] + n * np.log(chance) + (rows - n) * np.log1p(-chance)
    )
    return float(np.sum(np.exp(log_p) * windows))
