"""Many prompts with one long common beginning: the same texts with and without drafts, greedy and sampled."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mtpjax import LLM, SamplingParams
from tests.helpers.batch_job import rows

pytestmark = pytest.mark.slow


def test_texts_are_those_without_drafts(job: Callable, folder: Path, tmp_path: Path) -> None:
    """A48 and A50, as a batch job: 60 prompts of 24 tokens share 23. Each is read whole."""
    common = [(11 * i) % 95 for i in range(23)]
    temperatures = [0.7 if i % 2 else 0.0 for i in range(60)]
    lines = [{"prompt": [*common, i], "temperature": t, "max_tokens": 10} for i, t in enumerate(temperatures)]
    assert job(lines, "--ignore-eos") == 0
    answers = rows(tmp_path / "out.jsonl")
    assert sum(row["metrics"]["num_accepted_tokens"] for row in answers) > 0
    assert all(row["metrics"]["num_prompt_tokens"] == 24 for row in answers)
    plain = LLM(folder, num_speculative_tokens=0, max_model_len=40, max_num_seqs=7)
    params = [SamplingParams(max_tokens=10, temperature=t, seed=i, ignore_eos=True) for i, t in enumerate(temperatures)]
    outputs = plain.generate([[*common, i] for i in range(60)], params)
    assert [row["token_ids"] for row in answers] == [output.token_ids for output in outputs]
    assert len({tuple(output.token_ids) for output in outputs}) > 20
