"""What the parts of the GPU suite share: sizes, the model, the measured ceilings, the time, and the results so far."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.platform import platform
from mtpjax.decoding.output_rows import NO_ROWS
from mtpjax.loading.load import cache_dtype
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.random_init import random_model
from mtpjax.model import abstract_model
from mtpjax.model.cache import padded_kv_length
from mtpjax.presets import preset
from scripts.benchmarks.jitted_steps import prefill
from scripts.benchmarks.random_models import MOE_50M_ACTIVE
from scripts.benchmarks.results import describe, memory_peak_mb, write_json
from scripts.benchmarks.roofline import CEILINGS, Ceilings, measure_ceilings
from scripts.benchmarks.variants import Variant, without_mtp

TOY = replace(
    MOE_50M_ACTIVE, num_layers=4, hidden_size=128, vocab_size=1024, num_experts=8, expert_size=64, shared_expert_size=64
)


@dataclass(frozen=True)
class Options:
    """Options that the suite passes on to the process of each part."""

    out: Path
    seconds: float
    smoke: bool
    shape: str
    weights: str
    contexts: tuple[int, ...] = ()


class Setup:
    """One process of the suite.

    Args:
        options: sizes, and the seconds after which nothing new is started.
        abstract: the model has shapes only, to compile programs ahead of their use.

    Attributes:
        contexts: lengths of caches, the most telling first.
        chunks: rows of prompt chunks.
        drafts: draft lengths.
        batches: sequences at a time.
        skipped: what was not measured because the time was up.
    """

    def __init__(self, options: Options, *, abstract: bool = False):
        self.options, self.smoke, self.abstract, self.began = options, options.smoke, abstract, time.perf_counter()
        self.dtype = jnp.dtype("bfloat16") if platform() == "cuda" else jnp.dtype("float32")
        smoke = self.smoke
        self.contexts = options.contexts or ((256, 512) if smoke else (1024, 131_072, 32_768, 8192, 196_608))
        self.chunks = (64,) if smoke else (2048, 512, 4096)
        self.drafts = (0, 2) if smoke else (0, 4, 3, 2, 1, 8)
        self.batches = (1, 2) if smoke else (1, 8, 32, 64, 16)
        self.runs = 2 if smoke else 5
        self.skipped: list[str] = []

    def go_on(self, what: str) -> bool:
        """Return whether there is time for one more measurement; if not, note what was skipped."""
        enough = time.perf_counter() - self.began < self.options.seconds
        if not enough:
            self.skipped.append(what)
        return enough

    @cached_property
    def ceilings(self) -> Ceilings:
        """Copy bandwidth and matmul rate of the device, measured."""
        sizes = {"megabytes": 32, "size": 256} if self.smoke else CEILINGS[platform()]
        return measure_ceilings(self.dtype, **sizes)

    @cached_property
    def models(self) -> dict[bool, LoadedModel]:
        """The model with the MTP head (True), and without it (False): the same arrays."""
        cfg = TOY if self.smoke else preset(self.options.shape)
        make = partial(random_model, cfg, quantization=self.options.weights, dtype=self.dtype)
        if self.abstract:
            params = jax.eval_shape(lambda: make().params)
            graph, _ = nnx.split(nnx.merge(nnx.split(abstract_model(cfg, self.dtype))[0], params))
            with_mtp = LoadedModel(cfg, graph, params)
        else:
            with_mtp = make()
        return {True: with_mtp, False: without_mtp(with_mtp)}

    @property
    def kv_len(self) -> int:
        """Positions of the caches."""
        return padded_kv_length(max(self.contexts) + 64, 16)

    def side(self, mtp: bool, chunk: int) -> Variant:
        """Return the way to read prompts with or without MTP, compiled."""
        model = self.models[mtp]
        step = partial(prefill, graph=model.graph, rows=NO_ROWS)
        return Variant(f"MTP {'on' if mtp else 'off'}", model, step, chunk, self.kv_len, cache_dtype(self.dtype))

    def start_at(self, side: Variant, length: int) -> None:
        """Begin with a cache that holds `length` tokens. They are zeros: the time does not depend on them."""
        side.begin()
        side.cache = side.cache.replace(length=jnp.full(1, length, jnp.int32))

    def ids(self, count: int) -> np.ndarray:
        """Return random token ids `[1, count]`."""
        return np.random.default_rng(count).integers(0, self.models[True].cfg.vocab_size, (1, count)).astype(np.int32)


class Results:
    """The results of a part, written after every row, so that an interrupted run leaves what it has measured."""

    def __init__(self, part: str, setup: Setup, ceilings: bool = True):
        self.part, self.setup = part, setup
        self.content: dict[str, Any] = {"what": f"GPU suite, {part}", "complete": False, "rows": []}
        self.content |= {"smoke": setup.smoke, "shape": "toy" if setup.smoke else setup.options.shape}
        self.content |= {"weights": setup.options.weights, **describe()}
        if ceilings:
            self.content["ceilings"] = asdict(setup.ceilings)
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.content["rows"].append(row)
        self.write()

    def finish(self, failed: Iterable[str] = (), **more: Any) -> None:
        """Write what the whole part found. `failed` names the results that are wrong."""
        self.content |= {**more, "failed": list(failed), "memory_peak_mb": memory_peak_mb(), "complete": True}
        self.write()

    def write(self) -> None:
        """Write the file as it stands."""
        self.content["not_measured"] = self.setup.skipped
        self.content["seconds"] = time.perf_counter() - self.setup.began
        write_json(str(self.setup.options.out / f"gpu_{self.part}.json"), self.content, quiet=True)
