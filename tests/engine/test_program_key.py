"""The names of kept programs: whatever a program depends on changes its name, and what is not known has none."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kernels_pallas.platform import compile_options
from mtpjax import LLM, SimulatedAcceptance
from mtpjax.decoding.acceptance import exact_match
from mtpjax.engine import model_runner, program_key
from mtpjax.engine.decode_batch import DecodeBatch
from mtpjax.engine.program_key import step_digest
from mtpjax.model.cache import new_cache
from tests.helpers.models import numpy_model, tiny_config


def of_a_test(x: jax.Array) -> jax.Array:
    return x


def decode_digest(
    *, sizes: dict[str, Any] | None = None, weights: str = "float32", batch: int = 2, **arguments: Any
) -> str | None:
    """Return the digest of the decode loop of a tiny model; `arguments` are those of `LLM`."""
    model = numpy_model(tiny_config(moe=True, num_superblocks=1, **sizes or {}))
    model = replace(model, params=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, weights), model.params))
    settings: dict[str, Any] = {"num_speculative_tokens": 2, "max_model_len": 64, "dtype": "float32"} | arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "optimize_for_cpu", lambda model: model)  # it computes with the weights
        runner = LLM(model, **settings, program_cache=None).engine.runner
    seen: list[str | None] = []

    def begin(name: Any, step: Any, args: Any) -> None:
        seen.append(step_digest(step.args[0], (step.args[1:], step.keywords), args, compile_options()))

    cfg, kv_len, dtype = runner.model.cfg, runner.kv_len, runner.cache_dtype
    cache = jax.eval_shape(lambda: new_cache(cfg, batch, kv_len, dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.programs, "begin", begin)
        DecodeBatch(runner, batch, batch)._begin_decode(cache)
    (digest,) = seen
    return digest


@pytest.fixture(scope="module")
def digest() -> str:
    digest = decode_digest()
    assert digest is not None and digest == decode_digest()
    return digest


class TestDigests:
    @pytest.mark.parametrize(
        "change",
        [
            {"num_speculative_tokens": 1},
            {"max_model_len": 1000},
            {"batch": 3},
            {"weights": "bfloat16"},
            {"sizes": {"norm_eps": 1e-5}},
            {"sizes": {"output_gate_act": "sigmoid"}},
            {"acceptance": SimulatedAcceptance((0.5, 0.25))},
        ],
        ids=str,
    )
    def test_job_and_model(self, digest: str, change: dict[str, Any]) -> None:
        assert decode_digest(**change) not in (digest, None)

    def test_acceptance_rates(self) -> None:
        rates = [decode_digest(acceptance=SimulatedAcceptance((0.5, rate))) for rate in (0.25, 0.125)]
        assert None not in rates and rates[0] != rates[1]

    @pytest.mark.parametrize("variable", program_key.VARIABLES)
    def test_variables(self, digest: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(variable, "other")
        assert decode_digest() not in (digest, None)

    @pytest.mark.parametrize(
        "setting", [("jax_default_matmul_precision", "highest"), ("jax_enable_x64", True), ("jax_debug_nans", True)]
    )
    def test_settings_of_jax(self, setting: tuple[str, Any]) -> None:
        name, value = setting
        before, without = getattr(jax.config, name), small_digest()
        jax.config.update(name, value)
        try:
            with_setting = small_digest()
        finally:
            jax.config.update(name, before)
        assert with_setting not in (without, None) and small_digest() == without

    @pytest.mark.parametrize("part", ["_processor", "_num_cores", "hash_of_sources", "capability", "interpret_kernels"])
    def test_processor_sources_and_platform(self, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
        without = small_digest()
        program_key._fixed_environment.cache_clear()
        monkeypatch.setattr(program_key, part, lambda: "other")
        try:
            assert small_digest() not in (without, None)
        finally:
            program_key._fixed_environment.cache_clear()

    def test_options(self) -> None:
        assert small_digest(options={"compiler_options": {"a": True}}) not in (small_digest(), None)

    def test_versions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without = small_digest()
        for name in program_key.VERSIONS:
            program_key._fixed_environment.cache_clear()
            with monkeypatch.context() as patch:
                patch.setattr(program_key, "version", lambda n, name=name: "0" if n == name else "1")
                assert small_digest() not in (without, None)
        program_key._fixed_environment.cache_clear()

    def test_every_source_file_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "package_of_the_test"
        package.mkdir()
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(program_key, "OWN_PACKAGES", ("package_of_the_test",))
        hashes = {program_key.hash_of_sources.__wrapped__()}
        for name, text in (("a.py", ""), ("a.py", "1"), ("tiles.json", "{}"), ("b.py", "1")):
            (package / name).write_text(text)
            hashes.add(program_key.hash_of_sources.__wrapped__())
        assert len(hashes) == 5

    def test_what_is_not_ours_has_no_digest(self) -> None:
        def drafter(*_: Any) -> Any:
            raise AssertionError

        assert decode_digest(drafter=drafter) is None
        for static in (
            drafter,
            lambda x: x,
            object(),
            of_a_test,
            np.ones(3),
            partial(drafter, 1),
            [exact_match, drafter],
        ):
            assert small_digest(static) is None
        assert small_digest(exact_match) is not None

    def test_types_that_share_a_text_differ(self) -> None:
        values = (1, 1.0, "1", True, (1,), [1], {1: 1}, None, b"1", np.dtype("int8"))
        assert len({small_digest(value) for value in values}) == len(values)


def small_digest(static: Any = None, options: Any = None) -> str | None:
    return step_digest(exact_match, static, (np.zeros(3, np.float32),), options)
