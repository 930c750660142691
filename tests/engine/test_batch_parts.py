"""Which parts the program of a batch has: few programs serve requests of all kinds, and the texts do not show it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpjax.decoding.logprobs import LogprobsSpec
from mtpjax.engine.batch_parts import PLAIN, AutomataSize, BatchParts, choose_parts, parts_of
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.models import make_engine, numpy_model, tiny_config

VOCAB = 64
FREE = Request(0, (1, 2, 3), 8, 0.9, 5)
KINDS: dict[str, Any] = {
    "penalties": {"presence_penalty": 0.5},
    "bias": {"logit_bias": ((3, 1.5),)},
    "bad_words": {"bad_words": ((4,), (5, 6))},
    "logprobs": {"logprobs": 2},
}
ALL_PARTS = st.builds(
    BatchParts,
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, (8, 4), (32, 8)]),
    st.sampled_from([None, AutomataSize(2, 4096), AutomataSize(8, 16384), AutomataSize(64, 4096)]),
    st.sampled_from([None, LogprobsSpec(0), LogprobsSpec(5)]),
)


@given(ALL_PARTS, ALL_PARTS)
def test_a_union_covers_both_and_a_part_of_it_does_not(first: BatchParts, second: BatchParts) -> None:
    union = first.union(second)
    assert union.covers(first) and union.covers(second) and union == second.union(first)
    assert first.covers(second) == (union == first) and first.covers(PLAIN)


@given(ALL_PARTS, st.none() | ALL_PARTS, st.lists(ALL_PARTS, max_size=5))
def test_a_chosen_program_has_what_is_needed(needed: BatchParts, current: BatchParts | None, made: Any) -> None:
    chosen = choose_parts(needed, current, made)
    assert chosen.covers(needed)
    if needed == PLAIN and current is None:
        assert chosen == PLAIN
    elif current is not None and current.covers(needed):
        assert chosen == current
    elif any(parts.covers(needed.union(current or PLAIN)) for parts in made):
        assert chosen in made  # nothing is compiled
    else:
        assert chosen == needed.union(current or PLAIN)


def test_requests_that_wait_count() -> None:
    waiting = [replace(FREE, **options) for options in KINDS.values()]
    assert parts_of([FREE, None]) == PLAIN
    parts = parts_of([FREE, None], waiting)
    assert parts == BatchParts(True, True, (8, 4), None, LogprobsSpec(5))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return numpy_model(tiny_config(moe=False, num_superblocks=1, vocab_size=VOCAB), seed=3, scale=0.3)


def new_engine(model: LoadedModel) -> Engine:
    return make_engine(model, num_speculative_tokens=2, max_model_len=40)


@pytest.mark.slow
def test_requests_of_all_kinds_share_one_program_and_keep_their_texts(model: LoadedModel) -> None:
    requests = [replace(FREE, index=i, seed=i, **options) for i, options in enumerate(({}, *KINDS.values()))]
    alone = [state for one in requests for state in new_engine(model).run([one], 1)]
    engine = new_engine(model)
    together = engine.run(requests, 2)  # two slots: kinds come and go
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        found, want = ([x for part in state.logprobs for x in part.chosen.tolist()] for state in (other, one))
        assert found == pytest.approx(want, abs=1e-5)  # products of one and of two sequences differ in float32
    assert sum(name[0] == "decode" for name in engine.runner.programs.compiled) == 1
    for request in requests[1:]:  # each kind by itself finds the program that has all of them
        engine.run([request, replace(request, index=9)], 2)
    assert sum(name[0] == "decode" for name in engine.runner.programs.compiled) == 1
    engine.run([requests[0], replace(requests[0], index=9)], 2)  # plain requests get the plain one
    assert sum(name[0] == "decode" for name in engine.runner.programs.compiled) == 2
