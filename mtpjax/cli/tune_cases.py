"""What `mtpjax tune` measures: kernels with the shapes of a 35B-A3B, each with several tile constants.

Another op is tuned by adding its cases to `tune_cases`: a program, the prefix of its kernels' names, and candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gated_delta_rule import recurrent_gated_delta_rule
from kernels_pallas.gated_delta_rule.shapes import SHAPES as DELTA_SHAPES
from kernels_pallas.gated_delta_rule.shapes import DeltaShape, gated_delta_rule_inputs, with_updates
from kernels_pallas.grouped_matmul import fused_moe_unreduced
from kernels_pallas.grouped_matmul.shapes import SHAPES as MOE_SHAPES
from kernels_pallas.grouped_matmul.shapes import MoeShape, fused_moe_inputs
from kernels_pallas.matmul import linears_split_k
from kernels_pallas.packed.formats import abstract_weight
from kernels_pallas.platform import compile_options
from kernels_pallas.tile_tables import (
    Entry,
    ExpertsConstants,
    GatedDeltaRuleConstants,
    MatmulConstants,
    TileTable,
    override_table,
)
from kernels_pallas.tile_tables.constants import Constants
from kernels_pallas.weights import LayerView

# Of each stack of weights: what was read a moment ago would come from a cache that decoding does not have.
LAYERS, TOY_LAYERS = 8, 1
EXPERT_CALLS = 4  # with few rows, each with other experts of one layer
BATCH_ROWS = 64  # the most whose partial sums are left to the reader: large batches


@dataclass(frozen=True)
class TuneCase:
    """One kernel, to be measured with several constants.

    Attributes:
        name: what is printed.
        op: the op in tile tables.
        size_class: (max_outputs, max_inputs) of the entry that this case decides.
        kernels: how the names of its kernels begin.
        tuned: the constants that it decides; cases of one op and size class with the same names decide together.
        candidates: the cheapest first: of equals, the first is taken.
        run: the program, a function of `args`.
        args: abstract arguments.
    """

    name: str
    op: str
    size_class: tuple[int | None, int | None]
    kernels: str
    tuned: tuple[str, ...]
    candidates: tuple[Constants, ...]
    run: Callable[..., Any]
    args: tuple[Any, ...]

    def values(self, constants: Constants) -> dict[str, int]:
        """Return the constants that this case decides."""
        return {name: getattr(constants, name) for name in self.tuned}

    def describe(self, constants: Constants) -> str:
        """Return the same in words."""
        return ", ".join(f"{name} {value}" for name, value in self.values(constants).items())


@dataclass(frozen=True)
class Trial:
    """A case with one candidate: one program, one figure."""

    number: int
    case: TuneCase
    constants: Constants

    @property
    def program_name(self) -> str:
        """The name of the compiled program, by which a trace knows its kernels."""
        return f"tune_{self.number:03}"

    def compile(self, device: str) -> jax.stages.Compiled:
        """Compile the program with these constants."""
        entry = Entry(self.constants, "toy" if device == "cpu" else "measured")

        def run(*args: Any) -> Any:
            return self.case.run(*args)

        run.__name__ = run.__qualname__ = self.program_name
        with override_table(TileTable(device, "a trial", {self.case.op: (entry,)})):
            options: dict[str, Any] = compile_options()
            return jax.jit(run).lower(*self.case.args).compile(**options)


def all_trials(toy: bool) -> list[Trial]:
    """Return every candidate of every case, numbered."""
    pairs = [(case, constants) for case in tune_cases(toy) for constants in case.candidates]
    return [Trial(number, case, constants) for number, (case, constants) in enumerate(pairs)]


def tune_cases(toy: bool) -> Iterator[TuneCase]:
    """Yield the cases. The toy ones have the same kinds of candidates for weights of some kilobytes."""
    yield from _matmul_cases(toy)
    yield from _experts_cases(toy)
    yield from _delta_cases(toy)


def _matmul_cases(toy: bool) -> Iterator[TuneCase]:
    shapes = {
        "DeltaNet in": (None, [(8192, 2048, "iq4_nl"), (4096, 2048, "iq4_nl"), (32, 2048, "bf16"), (32, 2048, "bf16")]),
        "q, k, v": (None, [(8192, 2048, "iq4_nl"), (512, 2048, "iq4_nl"), (512, 2048, "iq4_nl")]),
        "out": (2048, [(2048, 4096, "iq4_nl")]),
        "router": (2048, [(256, 2048, "bf16"), (1, 2048, "bf16"), (512, 2048, "iq4_nl"), (512, 2048, "iq4_nl")]),
    }
    programs: tuple[int, ...] = (128, 256, 512, 1024)
    few_rows: tuple[int, ...] = (1, 5)
    many_rows = 2048
    if toy:
        shapes = {"in": (None, [(136, 512, "iq4_nl"), (32, 512, "bf16")]), "out": (64, [(64, 512, "iq4_nl")])}
        programs, few_rows, many_rows = (16, 32), (3,), 72
    layers = TOY_LAYERS if toy else LAYERS
    base = MatmulConstants()
    few = tuple(replace(base, programs=p, stages_few=s) for p in programs for s in ((2,) if toy else (2, 3)))
    many = tuple(replace(base, stages_many=s, row_tile_many=r) for r in (64, 128) for s in ((3,) if toy else (2, 3)))
    for name, (max_outputs, weights) in shapes.items():
        for rows in (*few_rows, BATCH_ROWS) if name == "DeltaNet in" else few_rows:
            yield _matmul_case(
                f"{name}, {rows} rows", max_outputs, weights, rows, layers, ("programs", "stages_few"), few
            )
        if name != "router":
            tuned = ("stages_many", "row_tile_many")
            yield _matmul_case(f"{name}, {many_rows} rows", max_outputs, weights, many_rows, layers, tuned, many)


def _matmul_case(
    name: str,
    max_outputs: int | None,
    weights: list[tuple[int, int, str]],
    rows: int,
    layers: int,
    tuned: tuple[str, ...],
    candidates: tuple[MatmulConstants, ...],
) -> TuneCase:
    """Return a case that multiplies the same rows with all weights in one launch, for each of so many layers."""
    stacks = tuple(abstract_weight((layers, outputs, inputs), form) for outputs, inputs, form in weights)
    x = jax.ShapeDtypeStruct((rows, weights[0][1]), jnp.bfloat16)
    is_packed = [form != "bf16" for _, _, form in weights]

    def run(x: Any, *stacks: Any) -> Any:
        results = []
        for layer in range(layers):
            pairs = zip(stacks, is_packed, strict=True)
            views = [LayerView(w, jnp.int32(layer)) if packed else w[layer] for w, packed in pairs]
            results.append([y.parts for y in linears_split_k(x, *views, implementation="triton")])
        return results

    return TuneCase(name, "matmul", (max_outputs, None), "matmul_", tuned, candidates, run, (x, *stacks))


def _experts_cases(toy: bool) -> Iterator[TuneCase]:
    base, many_rows, blocks = ExpertsConstants(), 2048, (64, 128)
    few_rows: tuple[int, ...] = (1, 5)
    parts: tuple[int, ...] = (1, 2, 4)
    shapes = {1024: MOE_SHAPES["35b-a3b"], None: MOE_SHAPES["122b-a10b"]}  # by the most outputs of gate and up
    if toy:
        few_rows, many_rows, parts, blocks = (3,), 72, (1, 2), (16, 32)
        shapes = {None: MoeShape(hidden_size=512, expert_size=64, num_experts=4, experts_per_token=2)}
    for max_outputs, shape in shapes.items():
        name = f"experts of {shape.expert_size}"
        # Experts with many tiles fill a card in one part, or in two.
        candidates = tuple(replace(base, gate_up_parts=p) for p in (parts if max_outputs or toy else parts[:2]))
        for rows in few_rows:
            calls = 1 if toy else EXPERT_CALLS
            yield _experts_case(f"{name}, {rows} rows", max_outputs, shape, rows, calls, ("gate_up_parts",), candidates)
        if max_outputs or toy:
            candidates = tuple(replace(base, block_tile=b) for b in blocks)
            yield _experts_case(
                f"{name}, {many_rows} rows", max_outputs, shape, many_rows, 1, ("block_tile",), candidates
            )


def _experts_case(
    name: str,
    max_outputs: int | None,
    shape: MoeShape,
    rows: int,
    calls: int,
    tuned: tuple[str, ...],
    candidates: tuple[ExpertsConstants, ...],
) -> TuneCase:
    """Return a case that runs both kernels, since parts of gate and up are added by that of down."""
    x, gate_up, down, *_ = fused_moe_inputs(shape._replace(layers=1), rows, "iq4_nl", jnp.bfloat16)
    topk = shape.experts_per_token
    keys = np.random.default_rng(0).random((calls, rows, shape.num_experts))
    topk_ids = np.argsort(keys, axis=-1)[..., :topk].astype(np.int32)
    topk_weights = np.full((rows, topk), 1 / topk, np.float32)

    def run(x: Any, gate_up: Any, down: Any) -> Any:
        stacks = (gate_up, down, jnp.int32(0))
        return [
            fused_moe_unreduced(x, *stacks, jnp.asarray(ids), jnp.asarray(topk_weights), implementation="triton")
            for ids in topk_ids
        ]

    return TuneCase(name, "experts", (max_outputs, None), "experts_", tuned, candidates, run, (x, gate_up, down))


def _delta_cases(toy: bool) -> Iterator[TuneCase]:
    shape, layers = DELTA_SHAPES["35b-a3b"], LAYERS
    few_rows: tuple[int, ...] = (1, 5)
    columns: tuple[int, ...] = (8, 16, 32)
    if toy:
        shape = DeltaShape(layers=1, value_heads=2, key_heads=1, key_size=16, value_size=16)
        few_rows, columns, layers = (3,), (8, 16), TOY_LAYERS
    candidates = tuple(GatedDeltaRuleConstants(state_columns=c) for c in columns)
    for rows in few_rows:
        yield _delta_case(f"DeltaNet window, {rows} rows", shape, rows, layers, candidates)


def _delta_case(
    name: str, shape: DeltaShape, rows: int, layers: int, candidates: tuple[GatedDeltaRuleConstants, ...]
) -> TuneCase:
    """Return a case that runs a verify window, after one that had all rows but one accepted, or its only row.

    It runs the first of the layers. Before that, XLA copies the states of all of them, since they may not change: by
    then it has copied the last ones, and the first are less likely to be in a cache.
    """
    projections, weights, state, pending, *_ = with_updates(gated_delta_rule_inputs(shape, rows, jnp.bfloat16))
    arrays = pending._replace(accepted=None, page=None)

    def run(projections: Any, weights: Any, state: Any, arrays: Any) -> Any:
        accepted, valid = jnp.full(1, max(1, rows - 1), jnp.int32), jnp.ones((1, rows), jnp.bool_)
        pending, outputs = arrays._replace(accepted=accepted, page=jnp.int32(0)), []
        for layer in range(layers):
            args = (projections, weights, state, pending, jnp.int32(layer), jnp.zeros(1, jnp.int32), valid)
            o, state, pending = recurrent_gated_delta_rule(*args, dtype=jnp.bfloat16, implementation="triton")
            outputs.append(o)
        return outputs, state, pending

    kernels, args = "gated_delta_rule_window", (projections, weights, state, arrays)
    return TuneCase(name, "gated_delta_rule", (None, None), kernels, ("state_columns",), candidates, run, args)
