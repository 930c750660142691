"""What tests of streams share: a model, parameters of all kinds, and updates put together."""

from dataclasses import replace

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from mtpjax.streaming import StreamOutput
from tests.helpers.models import numpy_model, tiny_config

PROMPTS = ["Once upon a time", "The old man", "It was a cold night", "A dog", "In the forest", "She said"]
SLOTS = 3


def make_llm() -> LLM:
    """Make an LLM whose texts have no sense: whole words, bytes that are no characters, and all else."""
    model = numpy_model(tiny_config(moe=False, num_superblocks=1, vocab_size=4096), seed=3)
    return LLM(model, tokenizer=TINY / "tokenizer.json", max_model_len=64, max_num_seqs=SLOTS, num_speculative_tokens=2)


def params(llm: LLM) -> list[SamplingParams]:
    """Greedy, sampled, with stop strings out of the texts, included or not, with special tokens, without text."""
    free = [SamplingParams(max_tokens=30, temperature=0.9 * (i % 2), seed=i) for i in range(len(PROMPTS))]
    texts = [str(output.text) for output in llm.generate(PROMPTS, free)]
    return [
        free[0],
        replace(free[1], stop=texts[1][40:45]),
        replace(free[2], stop=["\n\n\n", texts[2][30:33]], include_stop_str_in_output=True),
        replace(free[3], skip_special_tokens=False),
        replace(free[4], detokenize=False),
        replace(free[5], stop=texts[5][-8:-2]),
    ]


def joined(updates: list[StreamOutput]) -> tuple[str | None, list[int]]:
    texts = [update.text for update in updates]
    text = None if texts[-1] is None else "".join(map(str, texts))
    return text, sum((update.token_ids for update in updates), [])
