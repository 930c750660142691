"""Whole models, bit for bit: caches after prompts, logits of verify windows, and texts, among different neighbours.

Every check runs the same sequences twice: as the reference says (alone, without drafts) and in another way (batch,
chunk lengths, MTP head, draft length). `Difference.where` names the first array that differs in the order in which a
model computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtpjax.config import FULL, ModelConfig
from mtpjax.decoding import steps
from mtpjax.engine.engine import Engine
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.prefix_tree import border_below
from mtpjax.engine.programs import CompileFn, compile_ahead
from mtpjax.engine.prompt_chunks import PastTokens
from mtpjax.engine.request import Request
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model.cache import Cache
from scripts.benchmarks.variants import without_mtp


class Difference(NamedTuple):
    """The result of one check."""

    check: str
    differing: int  # numbers, or texts, that are not the same
    total: int
    where: str | None  # the first array that differs; None: all are the same

    @property
    def same(self) -> bool:
        """Whether every bit was the same."""
        return self.differing == 0


@dataclass(frozen=True)
class ModelSizes:
    """What is compared.

    Attributes:
        prompts: lengths of prompts that are read one by one and all at once.
        chunks: chunk lengths that the prompts are read in; the first one is that of the reference.
        mtp_prompt_tokens: how many of the last rows the MTP head reads in one of the checks.
        windows: rows of verify windows, ascending; the last one is the reference.
        window_batches: how many of the prompts' sequences share a window.
        drafts: draft lengths of the texts, 0 first.
        batches: sequences at a time.
        new_tokens: tokens of each text.
    """

    prompts: tuple[int, ...] = (100, 90, 80, 60, 40)
    chunks: tuple[int, ...] = (256, 64, 512, 2048)
    mtp_prompt_tokens: int = 16
    windows: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    window_batches: tuple[int, ...] = (1, 2, 5)
    drafts: tuple[int, ...] = (0, 1, 3, 8)
    batches: tuple[int, ...] = (1, 2, 5, 32)
    new_tokens: int = 96


class BitChecks:
    """The checks of one model. Programs of equal shapes are shared among them.

    Args:
        model: weights as they are stored, in the dtype of computation.
        cache_dtype: of keys, values and convolution inputs.
        sizes: what is compared.
        seed: of the prompts' tokens.
        compile_fn: makes the programs of prompts and texts, as that of `ModelRunner`.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache_dtype: Any,
        sizes: ModelSizes,
        seed: int = 0,
        compile_fn: CompileFn = compile_ahead,
    ):
        self.models = {True: model, False: without_mtp(model)}
        self.cfg, self.cache_dtype, self.sizes = model.cfg, cache_dtype, sizes
        rng = np.random.default_rng(seed)
        self.prompts = [rng.integers(0, self.cfg.vocab_size, length).tolist() for length in sizes.prompts]
        self.compile_fn = compile_fn
        self._runners: dict[Any, ModelRunner] = {}

    def runner(self, mtp: bool, buckets: tuple[int, ...], drafts: int = 0) -> ModelRunner:
        """Return the programs for a model with or without its MTP head."""
        key = mtp, buckets, drafts
        if key not in self._runners:
            self._runners[key] = ModelRunner(
                self.models[mtp],
                num_speculative_tokens=drafts,
                max_model_len=max(self.sizes.prompts) + self.sizes.new_tokens + max(self.sizes.windows),
                cache_dtype=self.cache_dtype,
                prefill_buckets=buckets,
                compile_fn=self.compile_fn,
            )
        return self._runners[key]

    def prompt_checks(self) -> Iterator[tuple[str, Callable[[], Difference]]]:
        """Yield checks of the caches after the prompts, each with its name."""
        first = self.sizes.chunks[:1]
        reference = self.caches(True, first, one_by_one=True)

        def compare(name: str, *args: Any, **how: Any) -> Difference:
            return self.compare_caches(name, reference, self.caches(*args, **how))

        for mtp in (True, False):
            name = f"prompts, MTP {'on' if mtp else 'off'}"
            yield f"{name}, together", partial(compare, f"{name}, together", mtp, first)
            for chunk in self.sizes.chunks[1:]:
                what = f"{name}, chunk {chunk}"
                yield what, partial(compare, what, mtp, (chunk,), one_by_one=True)
            what = f"{name}, in two parts"
            yield what, partial(compare, what, mtp, first, one_by_one=True, in_two_parts=True)
        number = self.sizes.mtp_prompt_tokens
        name = f"prompts, mtp_prompt_tokens={number}"
        yield name, partial(compare, name, True, first, mtp_prompt_tokens=number)

    def caches(
        self,
        mtp: bool,
        buckets: tuple[int, ...],
        *,
        one_by_one: bool = False,
        mtp_prompt_tokens: int | None = None,
        prompts: Sequence[int] | None = None,
        in_two_parts: bool = False,
    ) -> list[dict[str, np.ndarray]]:
        """Read prompts and return what each sequence remembers, array by array in the order of the layers.

        Args:
            prompts: the numbers of the prompts; None: all.
            in_two_parts: read each prompt up to its last border, as if others shared it, and then on from there.
        """
        runner = self.runner(mtp, buckets)
        chosen = self.prompts if prompts is None else [self.prompts[i] for i in prompts]
        batches = [[prompt] for prompt in chosen] if one_by_one else [chosen]
        found = []
        for batch in batches:
            cache: Cache | None = None
            rest: Sequence[Sequence[int]] = batch
            past: list[PastTokens] | None = None
            if in_two_parts:
                borders = [border_below(len(prompt)) for prompt in batch]
                begun, following = zip(*((p[:b], p[b]) for p, b in zip(batch, borders, strict=True)), strict=True)
                cache, _, _ = runner.prefill(begun, next_tokens=following)
                rest = [prompt[border:] for prompt, border in zip(batch, borders, strict=True)]
                past = [PastTokens(border) for border in borders]
            cache, hidden, _ = runner.prefill(rest, mtp_prompt_tokens=mtp_prompt_tokens, cache=cache, past=past)
            for i, prompt in enumerate(batch):
                found.append(sequence_arrays(self.cfg, cache, hidden, i, len(prompt), mtp, mtp_prompt_tokens))
        return found

    def compare_caches(
        self, name: str, reference: Sequence[dict[str, np.ndarray]], other: Sequence[dict[str, np.ndarray]]
    ) -> Difference:
        """Compare what each sequence remembers; arrays that one side does not have are left out."""
        differing = total = 0
        where = None
        for number, (want, got) in enumerate(zip(reference, other, strict=True)):
            for array, values in got.items():
                expected = want[array]
                if "MTP" in array:  # with `mtp_prompt_tokens` the head has read the last rows only
                    expected = expected[:, expected.shape[1] - values.shape[1] :]
                count = count_differing(values, expected)
                differing, total = differing + count, total + values.size
                if count and where is None:
                    where = f"{array} of prompt {number}: {count} of {values.size} numbers"
        return Difference(name, differing, total, where)

    def window_checks(self) -> Iterator[tuple[str, Callable[[], Difference]]]:
        """Yield checks of logits and hidden states of verify windows after the prompts, each with its name."""
        runner = self.runner(True, self.sizes.chunks[:1])
        cache, _, _ = runner.prefill(self.prompts)
        held = runner.model
        model = nnx.merge(held.graph, held.params)
        longest = max(self.sizes.windows)
        rng = np.random.default_rng(1)
        tokens = rng.integers(0, self.cfg.vocab_size, (len(self.prompts), longest)).astype(np.int32)

        @jax.jit
        def verify(tokens: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array]:
            return steps.verify(model, tokens, jnp.zeros(len(tokens), bool), cache)[:2]

        def sequences(count: int) -> Cache:
            return jax.tree.map(lambda a: a[:count] if a.ndim == 1 else a[:, :count], cache)

        reference = [np.asarray(a) for a in verify(tokens, cache)]

        def compare(name: str, count: int, rows: int) -> Difference:
            got = verify(tokens[:count, :rows], sequences(count))
            differing = total = 0
            where = None
            for array, values, expected in zip(("logits", "hidden states"), got, reference, strict=True):
                different = count_differing(np.asarray(values), expected[:count, :rows])
                differing, total = differing + different, total + values.size
                where = where or (f"{array}: {different} of {values.size} numbers" if different else None)
            return Difference(name, differing, total, where)

        for count in self.sizes.window_batches:
            for rows in self.sizes.windows:
                name = f"window of {rows} rows, {count} sequences"
                yield name, partial(compare, name, count, rows)

    def text_checks(self) -> Iterator[tuple[str, Callable[[], Difference]]]:
        """Yield checks of whole texts, greedy ones and sampled ones, each with its name."""
        longest = max(self.sizes.batches)
        prompts = [tuple(self.prompts[i % len(self.prompts)][: 40 + i]) for i in range(longest)]
        requests = [
            Request(i, prompt, self.sizes.new_tokens, temperature=(0.0, 0.8)[i % 2], seed=100 + i)
            for i, prompt in enumerate(prompts)
        ]

        def texts(drafts: int, batch: int) -> list[list[int]]:
            engine = Engine(self.runner(drafts > 0, self.sizes.chunks[:1], drafts))
            return [state.tokens for state in engine.run(requests, batch)]

        reference = texts(0, longest)

        def compare(name: str, drafts: int, batch: int) -> Difference:
            got = texts(drafts, batch)
            wrong = [i for i, (a, b) in enumerate(zip(got, reference, strict=True)) if a != b]
            if not wrong:
                return Difference(name, 0, len(got), None)
            first = wrong[0]
            at = next(i for i, (a, b) in enumerate(zip(got[first], reference[first], strict=False)) if a != b)
            kind = "greedy" if first % 2 == 0 else "sampled"
            return Difference(name, len(wrong), len(got), f"text {first} ({kind}) at token {at}")

        for drafts in self.sizes.drafts:
            for batch in self.sizes.batches:
                if (drafts, batch) != (0, longest):
                    name = f"texts, {drafts} drafts, batch {batch}"
                    yield name, partial(compare, name, drafts, batch)


def count_differing(got: np.ndarray, want: np.ndarray) -> int:
    """Return how many elements do not have the same bits."""
    bits = f"u{got.dtype.itemsize}"
    return int(np.count_nonzero(np.ascontiguousarray(got).view(bits) != np.ascontiguousarray(want).view(bits)))


def sequence_arrays(
    cfg: ModelConfig,
    cache: Cache,
    hidden: jax.Array,
    sequence: int,
    length: int,
    mtp: bool,
    mtp_prompt_tokens: int | None,
) -> dict[str, np.ndarray]:
    """Return what one sequence remembers after its prompt, in the order in which the layers compute it."""
    arrays: dict[str, np.ndarray] = {}
    kinds = cfg.layer_pattern * cfg.num_superblocks
    attention = deltanet = 0
    for number, kind in enumerate(kinds):
        if kind == FULL:
            for name, stack in (("keys", cache.k), ("values", cache.v)):
                arrays[f"{name} of layer {number}"] = np.asarray(stack[attention, sequence, :, :length])
            attention += 1
        else:
            for name, stack in (("convolution inputs", cache.conv), ("recurrent state", cache.state)):
                arrays[f"{name} of layer {number}"] = np.asarray(stack[deltanet, sequence])
            deltanet += 1
    if mtp:
        rows = length if mtp_prompt_tokens is None else min(length, mtp_prompt_tokens)
        arrays["hidden state"] = np.asarray(hidden[sequence])
        if rows == length:  # otherwise the head counts positions from another row, so its keys are rotated by others
            arrays["keys of the MTP head"] = np.asarray(cache.mtp_k[0, sequence, :, :rows])
        arrays["values of the MTP head"] = np.asarray(cache.mtp_v[0, sequence, :, :rows])
    return arrays
