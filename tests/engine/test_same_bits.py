"""bfloat16 on a CPU: what a sequence remembers, its logits and its text have the same bits in any company."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.gated_delta_rule import api as delta_api
from scripts.gpu.bits_model import BitChecks, Difference, ModelSizes
from tests.helpers.models import cpu_only, numpy_model, rounded_to_bfloat16, tiny_config

pytestmark = cpu_only

SIZES = ModelSizes(
    prompts=(70, 33, 12),
    chunks=(128, 64),
    mtp_prompt_tokens=16,
    windows=(1, 2, 5),
    window_batches=(1, 3),
    drafts=(0, 3),
    batches=(1, 4),
    new_tokens=16,
)
Checks = Iterator[tuple[str, Callable[[], Difference]]]


@pytest.fixture(params=[True, False], ids=["moe", "dense"])
def checks(request: pytest.FixtureRequest) -> BitChecks:
    model = rounded_to_bfloat16(numpy_model(tiny_config(moe=request.param, num_superblocks=1)))
    return BitChecks(model, jnp.float32, SIZES)


def assert_same(found: Checks) -> None:
    differences = [check() for _, check in found]
    assert differences and all(each.total > 0 for each in differences)
    assert [f"{each.check}: {each.where}" for each in differences if not each.same] == []


def test_prompts(checks: BitChecks) -> None:
    """Alone and together, in chunks of two lengths, with and without the MTP head."""
    assert_same(checks.prompt_checks())
    reference = checks.caches(True, (128,), one_by_one=True)
    mixed = checks.caches(True, (16, 64), one_by_one=True)  # 12 tokens in a chunk of 16 rows, 70 in 64 and 16
    assert checks.compare_caches("chunks of 16 and 64", reference, mixed).same


@pytest.mark.slow
def test_windows(checks: BitChecks) -> None:
    assert_same(checks.window_checks())


@pytest.mark.slow
def test_texts(checks: BitChecks) -> None:
    assert_same(checks.text_checks())


def test_chunks_that_are_counted_from_the_first_row_of_a_call_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 33 rows of a prompt then stand elsewhere in a chunk of 64 if they come in a call of 48 rows."""
    monkeypatch.setattr(delta_api, "_roll_rows", lambda x, shift: x)
    jax.clear_caches()
    model = rounded_to_bfloat16(numpy_model(tiny_config(moe=False, num_superblocks=1)))
    checks = BitChecks(model, jnp.float32, SIZES)
    reference = checks.caches(True, (128,), one_by_one=True)
    found = checks.compare_caches("chunks", reference, checks.caches(True, (48, 64), one_by_one=True))
    jax.clear_caches()
    assert found.where is not None and "recurrent state of layer 0 of prompt" in found.where
