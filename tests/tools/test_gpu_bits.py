"""The part "bits" of the GPU suite: it finds a row whose bits depend on its neighbours, and names the first op."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.matmul import triton as matmul_triton
from kernels_pallas.matmul.tiling import Operands
from kernels_pallas.norm import api as norm_api
from kernels_pallas.norm import reference as norm_reference
from kernels_pallas.platform import override_platform
from mtpjax.loading.random_init import random_model
from mtpjax.model import attention as attention_layer
from scripts.gpu import bits_ops
from scripts.gpu.bits_model import BitChecks, count_differing
from scripts.gpu.bits_ops import check_op, op_cases
from scripts.gpu.kernels import SMOKE
from scripts.gpu.suite_bits import TOY_CONFIG, TOY_SIZES


@pytest.fixture
def interpreted_gpu() -> Iterator[None]:
    """Trace programs for a CUDA device and interpret every kernel in them."""
    jax.clear_caches()  # JAX does not know for which platform a program was traced, nor that a test patched it
    with override_platform("cuda", (9, 0), interpret=True):
        yield
    jax.clear_caches()


def cases(*names: str, rows: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Iterator[tuple[str, Any]]:
    size = replace(SMOKE, hidden=512)  # of which there is more than one way to add four steps
    yield from ((name, case) for name, case in op_cases(size, ("iq4_nl",), dtype, rows) if name in names)


@pytest.mark.usefixtures("interpreted_gpu")
def test_rows_of_the_ops_have_the_same_bits_among_others() -> None:
    found = [check_op(name, case) for name, case in cases("norm", "linear iq4_nl", rows=(1, 5, 70))]
    assert [each.check for each in found] == ["norm", "linear iq4_nl"]
    assert all(each.same and each.total > 0 for each in found)


@pytest.mark.usefixtures("interpreted_gpu")
def test_a_split_that_follows_the_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original, rows = matmul_triton.choose_tiling, []

    def choose_tiling(count: int, *args: Any) -> Any:
        rows.append(count)
        return original(count, *args)

    monkeypatch.setattr(matmul_triton, "choose_tiling", choose_tiling)
    monkeypatch.setattr(Operands, "num_splits", property(lambda self: 1 if rows[-1] > 16 else 2))
    ((name, case),) = cases("linear iq4_nl", rows=(5, 70))
    found = check_op(name, case)
    assert found.differing > 100 and found.where is not None and found.where.startswith("5 rows")


@pytest.mark.usefixtures("interpreted_gpu")
def test_a_sum_whose_order_follows_the_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As XLA does with a sum that is left to it. In float32: rounding to bfloat16 hides most of it."""
    monkeypatch.setattr(norm_api, "resolve_implementation", lambda implementation: "xla")
    ((name, case),) = cases("norm", rows=(4, 70), dtype=jnp.float32)
    assert check_op(name, case).same

    def sum_features(x: jax.Array) -> jax.Array:
        parts = (x[..., :99], x[..., 99:]) if x.shape[0] > 16 else (x,)
        return sum(jnp.sum(part, axis=-1, keepdims=True) for part in parts)  # type: ignore[return-value]

    monkeypatch.setattr(norm_reference, "sum_features", sum_features)
    ((name, case),) = cases("norm", rows=(4, 70), dtype=jnp.float32)
    assert check_op(name, case).differing > 0


@pytest.mark.usefixtures("interpreted_gpu")
def test_a_short_prompt_that_is_read_as_a_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, case),) = cases("attention, prompt", rows=(5, 40))
    assert check_op(name, case).same
    original = bits_ops.attention
    monkeypatch.setattr(bits_ops, "attention", lambda *args, is_prompt: original(*args))
    ((name, case),) = cases("attention, prompt", rows=(5, 40))
    assert check_op(name, case).differing > 0


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted_gpu")
def test_the_first_array_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two layers gets keys that depend on the number of rows."""
    model = random_model(TOY_CONFIG, quantization="int8", scale=0.3, dtype=jnp.bfloat16)
    checks = BitChecks(model, jnp.bfloat16, replace(TOY_SIZES, prompts=(30, 12)))
    reference = checks.caches(True, (64,), one_by_one=True)
    assert checks.compare_caches("prompts", reference, checks.caches(True, (64,))).same
    original = attention_layer.linears_split_k

    def linears_split_k(x: jax.Array, *weights: Any) -> Any:
        return original(x * (1 + 0.01 * (x.shape[0] > 1)), *weights)

    monkeypatch.setattr(attention_layer, "linears_split_k", linears_split_k)
    jax.clear_caches()
    checks = BitChecks(model, jnp.bfloat16, replace(TOY_SIZES, prompts=(30, 12)))
    found = checks.compare_caches("prompts", reference, checks.caches(True, (64,)))
    assert found.where is not None and found.where.startswith("keys of layer 1 of prompt 0")


def test_counting_compares_bits() -> None:
    zero = np.zeros(3, np.float32)
    assert count_differing(zero, zero) == 0 and count_differing(zero, -zero) == 3
    assert count_differing(jnp.ones(2, jnp.bfloat16).__array__(), jnp.zeros(2, jnp.bfloat16).__array__()) == 2


@pytest.mark.minutes
@pytest.mark.slow
def test_the_part_runs_at_a_toy_size(tmp_path: Path) -> None:
    """Every op, prompts, windows and texts; nothing differs."""
    command = [sys.executable, "-m", "scripts.gpu.suite_part", "bits", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--seconds", "600"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_bits.json").read_text())
    assert found["complete"] and not found["failed"] and not found["not_measured"]
    kinds = {row["check"].split(",")[0].split()[0] for row in found["rows"]}
    assert {"norm", "linear", "experts", "attention", "int8:"} <= kinds
    assert sum(row["total"] for row in found["rows"]) > 100_000
