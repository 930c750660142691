"""`SamplingParams.n`: the samples of a prompt become requests of their own, and one output again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mtpjax.engine.request import Request, RequestState
from mtpjax.outputs import Metrics, RequestOutput

SEED_STEP = 0x9E3779B9  # 2^32 divided by the golden ratio


class SampleIndex(int):
    """The index of a prompt, as callbacks get it.

    Attributes:
        sample: number of the sample among those of the prompt.
    """

    sample: int

    def __new__(cls, index: int, sample: int = 0) -> SampleIndex:
        """Make the index of a prompt with the number of its sample."""
        made = super().__new__(cls, index)
        made.sample = sample
        return made


def sample_seed(seed: int, sample: int) -> int:
    """Return the seed of a sample: sample 0 has that of the request, sample i has (seed + i * 0x9E3779B9) mod 2^32.

    Multiples of this number stay apart from each other: seeds of two prompts that differ by less than 170,000 (as those
    of neighbours do, which differ by 1) have no sample's seed in common, for up to 16,384 samples of each. Seeds need
    not look random, because the noise is a hash of them (Threefry).
    """
    return (seed + sample * SEED_STEP) & 0xFFFFFFFF if sample else seed


def split_samples(request: Request, n: int) -> list[Request]:
    """Return the requests of `n` samples: they differ in their numbers and seeds."""
    return [replace(request, sample=i, n=n, seed=sample_seed(request.seed, i)) for i in range(n)]


def join_samples(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Make one output of those of all samples of a prompt, which are in order."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    completions = [output.outputs[0] for output in outputs]
    return replace(first, outputs=completions, metrics=_join_metrics([output.metrics for output in outputs]))


class SampleCollector:
    """Holds the states of finished samples until those of all samples of their prompt are there."""

    def __init__(self) -> None:
        self._states: dict[int, list[RequestState]] = {}

    def add(self, state: RequestState) -> list[RequestState] | None:
        """Take a finished sample. Returns all samples of its prompt, in order, if it is the last one of them."""
        index = state.request.index
        states = self._states.setdefault(index, [])
        states.append(state)
        if len(states) < state.request.n:
            return None
        del self._states[index]
        return sorted(states, key=lambda state: state.request.sample)


def _join_metrics(metrics: Sequence[Metrics]) -> Metrics:
    drafts, accepted = sum(m.num_drafts for m in metrics), sum(m.num_accepted_tokens for m in metrics)
    return replace(
        metrics[0],
        prefill_seconds=max(m.prefill_seconds for m in metrics),
        decode_seconds=sum(m.decode_seconds for m in metrics),
        num_steps=sum(m.num_steps for m in metrics),
        num_drafts=drafts,
        num_draft_tokens=sum(m.num_draft_tokens for m in metrics),
        num_accepted_tokens=accepted,
        num_accepted_tokens_per_pos=tuple(
            map(sum, zip(*(m.num_accepted_tokens_per_pos for m in metrics), strict=True))
        ),
        mean_acceptance_length=1 + accepted / drafts if drafts else 1.0,
    )
