"""Requests with parameters of all kinds, together and alone. All 300: `python -m tests.helpers.mixed_requests`."""

import numpy as np
import pytest

from tests.helpers.mixed_requests import TOLERANCE, answer, load, mixed_jobs, outcome, without_depth

NUMBER = 16


@pytest.mark.minutes
@pytest.mark.slow
def test_no_way_of_answering_shows() -> None:
    """Drafts or none, many slots or one, in order or not, with common beginnings read once or not."""
    alone = load(num_speculative_tokens=0, max_num_seqs=1, enable_prefix_caching=False)
    jobs = mixed_jobs(alone, NUMBER)
    want = [outcome(alone.generate([prompt], params)[0]) for prompt, params in without_depth(jobs)]
    assert {text[4] for one in want for text in one.texts} == {"stop", "length"}
    together = load(num_speculative_tokens=3, max_num_seqs=8)
    order = np.random.default_rng(1).permutation(NUMBER).tolist()
    for _ in range(2):  # the second time all beginnings are there
        got = answer(together, jobs, order)
        distances = [a.distance(b) for a, b in zip(got, want, strict=True)]
        assert max(distances) <= TOLERANCE, [i for i, d in enumerate(distances) if d > TOLERANCE]
    assert together.engine.num_cached_tokens > 0
    assert sum(name[0] == "decode" for name in together.engine.runner.programs.compiled) <= 6
