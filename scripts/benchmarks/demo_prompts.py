"""The prompts that the benchmarks of the embedded model share."""

from __future__ import annotations

import json

from checkpoints import TINY
from mtpjax import LLM
from mtpjax.text.tokenizer import Tokenizer

STORIES = (
    "Tell me a story about a fox and a lantern.",
    "Tell me a story about a mouse.",
    "Write a short story about a bridge.",
    "I would like to hear a story about a bear and someone who is afraid of the dark.",
)


def excerpts(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of the embedded excerpts of held-out books."""
    lines = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]


def prompts_by_domain(llm: LLM, count: int) -> dict[str, list[list[int]]]:
    """Return token ids of at most `count` prompts of each domain.

    "books" are excerpts; "talk" are requests for stories in chat, which the model ends itself.
    """
    assert llm.tokenizer is not None
    requests = [llm.chat_prompt([{"role": "user", "content": story}]) for story in STORIES[:count]]
    return {"books": excerpts(llm.tokenizer)[:count], "talk": [llm.tokenizer.encode(text) for text in requests]}
