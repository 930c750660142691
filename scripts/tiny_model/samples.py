"""Texts of the embedded model: samples for its card, and how often texts run into loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mtpjax import LLM, SamplingParams
from scripts.tiny_model import data

TOKENS = 100  # of a sample at most
SEEDS = (0, 1, 2)
QUESTIONS = ("Tell me a story about a fox and a lantern.", "Hello! How are you today?", "What is 3 plus 4?")
CODE = 'def read_lines(path):\n    """Read the lines of a file."""\n'
NUM_PLACES = 20  # places of a domain's held-out text that texts are continued from
OPENING = 32  # tokens of the text before each place
NUM_SEEDS = 5  # continuations of each place, if sampled
LONGEST_LOOP, MIN_LOOPED = 24, 8  # tokens: of a stretch at most, and of its repeats together at least


def ways(llm: LLM) -> dict[str, SamplingParams]:
    """Return three ways of sampling.

    They are greedy, as the model's `generation_config.json` advises, and at the same temperature from all tokens.
    """
    advised = llm.get_default_sampling_params(max_tokens=TOKENS)
    alone = SamplingParams(max_tokens=TOKENS, temperature=advised.temperature)
    return {"greedy": SamplingParams(max_tokens=TOKENS), "as advised": advised, f"T = {alone.temperature} alone": alone}


def samples(llm: LLM, folder: Path) -> list[dict[str, Any]]:
    """Return texts for the first demo prompt, three questions and code, in all ways, with the first three seeds."""
    first = json.loads((folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    chats = [(text, llm.chat_prompt([{"role": "user", "content": text}])) for text in QUESTIONS]
    params_by_name: dict[str, SamplingParams] = {}
    for name, params in ways(llm).items():
        if params.temperature:
            params_by_name |= {f"{name}, seed {seed}": replace(params, seed=seed) for seed in SEEDS}
        else:
            params_by_name[name] = params
    rows = []
    for title, prompt in [(first, first), *chats, (CODE, CODE)]:
        outputs = llm.generate([prompt] * len(params_by_name), list(params_by_name.values()))
        texts = {name: output.text for name, output in zip(params_by_name, outputs, strict=True)}
        rows.append({"prompt": title, "texts": texts})
    return rows


def has_loop(tokens: list[int]) -> bool:
    """Return whether some stretch of at most 24 tokens occurs three times in a row, 8 tokens together at least."""
    ids = np.array(tokens)
    for period in range(1, LONGEST_LOOP + 1):
        num_equal = 0
        for equal in ids[period:] == ids[:-period]:
            num_equal = num_equal + 1 if equal else 0
            if num_equal >= max(2 * period, MIN_LOOPED - period):
                return True
    return False


def loop_shares(llm: LLM, tokenizer: Tokenizer, documents: list[data.Document]) -> dict[str, dict[str, float]]:
    """Return, by domain and way, the share of 100 continuations (20 if greedy) of held-out text that have a loop."""
    shares: dict[str, dict[str, float]] = {}
    for domain in data.LICENCES:
        tokens = data.pack([d for d in documents if d.domain == domain and d.split == "held-out"], tokenizer)
        starts = data.windows(tokens, OPENING, len(tokens) // NUM_PLACES)[:NUM_PLACES].tolist()
        shares[domain] = {}
        for name, params in ways(llm).items():
            seeds = range(NUM_SEEDS if params.temperature else 1)
            jobs = [(start, replace(params, seed=seed, ignore_eos=True)) for start in starts for seed in seeds]
            outputs = llm.generate([start for start, _ in jobs], [params for _, params in jobs])
            shares[domain][name] = float(np.mean([has_loop(output.token_ids) for output in outputs]))
    return shares
