"""What the tests share: quick compilation, tiny models that need no random-number programs, and the golden files."""

import gc
import json
import os
from collections.abc import Iterator
from functools import cache, partialmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

# A test runs a program for milliseconds and compiles it for seconds, nearly all of them in LLVM. These flags make that
# five times faster and leave the mathematics alone; `shipped_code` undoes them where a test is about what users run.
# They are not for GPUs and do not replace flags that somebody has set: XLA_FLAGS=--xla_backend_optimization_level=3
SHIPPED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 11):  # the flag is gone there, and an unknown one ends the process
    del SHIPPED["xla_cpu_use_fusion_emitters"], QUICK["xla_cpu_use_fusion_emitters"]
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items()))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import nnx  # noqa: E402
from golden.weights import golden_config, golden_tensors  # noqa: E402

from checkpoints import open_checkpoint, write_safetensors_directory  # noqa: E402
from mtpjax.config import FULL, LINEAR, ModelConfig  # noqa: E402
from mtpjax.engine import Engine  # noqa: E402
from mtpjax.model import abstract_model  # noqa: E402
from mtpjax.weights import LoadedModel, fill, load_model  # noqa: E402

cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def compilation_cache() -> None:
    """Where JAX_COMPILATION_CACHE_DIR names a folder, every program is kept there for the next session."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Every compiled program keeps some dozens of memory mappings for as long as JAX's caches hold it; Linux gives a process
# 65,530 (vm.max_map_count), and a compiler that is refused one ends the process ("Aborted", "Segmentation fault").
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 20_000


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    """After a test that leaves many programs behind, drop those that nothing else holds."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def shipped_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs compiled ahead of time in this test, as the engine does, get the optimisations that users get."""
    if jax.default_backend() == "cpu":
        quick = jax.stages.Lowered.compile
        monkeypatch.setattr(jax.stages.Lowered, "compile", partialmethod(quick, compiler_options=SHIPPED))


class Golden:
    """One golden case: the answers of transformers, and the model written as a checkpoint."""

    def __init__(self, case: str, folder: Path):
        self.case, self.path = case, folder / case
        with np.load(GOLDEN / f"{case}.npz") as file:
            self.answers: dict[str, np.ndarray] = dict(file)
        self.tensors = golden_tensors(case)
        entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in self.tensors.items()]
        write_safetensors_directory(self.path, golden_config(case), entries)
        assert json.loads(str(self.answers["config"])) == golden_config(case), f"{case}: config changed, run make.py"

    def __getitem__(self, name: str) -> np.ndarray:
        return self.answers[name]

    def model(self, stack: int | None = None) -> LoadedModel:
        """Stacked by all repeats of the layer pattern unless told."""
        source = open_checkpoint(self.path)
        return load_model(source, stack=stack or ModelConfig.from_hf(source.config).repeats)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`golden(case)`: a `Golden`, made once."""
    folder = tmp_path_factory.mktemp("golden")
    yield cache(lambda case: Golden(case, folder))


def tiny_config(*, moe: bool, pattern: tuple[str, ...] = (LINEAR, FULL), repeats: int = 2, **sizes: Any) -> ModelConfig:
    """A config of a few thousand parameters with every part of the architecture; the last id is its stop token."""
    whole: dict[str, Any] = {
        "hidden_size": 48, "layers": len(pattern) * repeats, "pattern": pattern, "q_heads": 4, "kv_heads": 2,
        "head_dim": 16, "rotary_dim": 8, "rope_theta": 1e7, "linear_k_heads": 2, "linear_v_heads": 4,
        "linear_k_dim": 16, "linear_v_dim": 16, "conv_width": 4, "vocab_size": 96,
    }  # fmt: skip
    experts = {"experts": 8, "experts_per_token": 2, "expert_size": 16, "shared_expert_size": 24}
    whole |= experts if moe else {"mlp_size": 64}
    whole |= sizes
    return ModelConfig(stop_tokens=(whole["vocab_size"] - 1,), **whole)


def numpy_model(cfg: ModelConfig, *, seed: int = 0, scale: float = 0.15, stack: int | None = None) -> LoadedModel:
    """Random weights from numpy: `random_model` compiles a program for each leaf, which takes longer than most tests.

    Matrices are normal with deviation `scale`, norms near neutral, decay rates as in `random_model`.
    """
    graph, params = nnx.split(abstract_model(cfg, stack=stack or cfg.repeats))
    rng = np.random.default_rng(seed)

    def make(path: tuple, leaf: Any) -> jax.Array:
        name, shape = str(path[-1]), leaf.shape
        if name == "a_log":
            values = np.log(rng.uniform(1.0, 16.0, shape))
        elif name == "dt_bias":
            values = np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))))
        elif name == "conv":
            values = rng.uniform(-0.5, 0.5, shape)
        elif name.endswith("norm"):
            values = float(path[-2:] == ("mixer", "norm")) + 0.1 * rng.normal(size=shape)
        else:
            values = scale * rng.normal(size=shape)
        return jnp.asarray(values, leaf.dtype)

    return LoadedModel(cfg, graph, fill(params, make))


def make_engine(model: LoadedModel, *, max_len: int = 250, buckets: tuple[int, ...] = (32,), **kw: Any) -> Engine:
    """A float32 engine; `vocab` is the model's unless told."""
    settings: dict[str, Any] = {"vocab": model.cfg.vocab_size, "cache_dtype": jnp.dtype("float32")} | kw
    return Engine(model, max_len=max_len, buckets=buckets, **settings)
