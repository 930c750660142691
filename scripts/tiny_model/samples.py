"""What the embedded model writes: samples for its card, and how often they run into loops."""

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
PLACES, OPENING, REPEATS = 20, 32, 5  # of a domain that texts are continued from; tokens before each; seeds
LONGEST_LOOP, LEAST_LOOPED = 24, 8  # tokens


def ways(llm: LLM) -> dict[str, SamplingParams]:
    """Greedy, as the model's `generation_config.json` advises, and at the same temperature from all tokens."""
    advised = llm.get_default_sampling_params(max_tokens=TOKENS)
    alone = SamplingParams(max_tokens=TOKENS, temperature=advised.temperature)
    return {"greedy": SamplingParams(max_tokens=TOKENS), "as advised": advised, f"T = {alone.temperature} alone": alone}


def samples(llm: LLM, folder: Path) -> list[dict[str, Any]]:
    """All ways, with the first three seeds: the first demo prompt, three questions, code."""
    first = json.loads((folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    asked = [(first, first), *((q, llm.chat_prompt([{"role": "user", "content": q}])) for q in QUESTIONS), (CODE, CODE)]
    how: dict[str, SamplingParams] = {}
    for name, params in ways(llm).items():
        how |= (
            {f"{name}, seed {seed}": replace(params, seed=seed) for seed in SEEDS}
            if params.temperature
            else {name: params}
        )
    found = []
    for shown, prompt in asked:
        outputs = llm.generate([prompt] * len(how), list(how.values()))
        found.append({"prompt": shown, "texts": {name: out.text for name, out in zip(how, outputs, strict=True)}})
    return found


def loops(tokens: list[int]) -> bool:
    """Whether some stretch of at most 24 tokens comes three times in a row, 8 tokens together at least."""
    ids = np.array(tokens)
    for period in range(1, LONGEST_LOOP + 1):
        run = 0
        for same in ids[period:] == ids[:-period]:
            run = run + 1 if same else 0
            if run >= max(2 * period, LEAST_LOOPED - period):
                return True
    return False


def looping(llm: LLM, tokenizer: Tokenizer, documents: list[data.Document]) -> dict[str, dict[str, float]]:
    """By domain and way: the share of texts that loop, of 100 continuations (20 if greedy) of what was held out."""
    shares: dict[str, dict[str, float]] = {}
    for domain in data.LICENCES:
        tokens = data.pack([d for d in documents if d.domain == domain and d.split == "held-out"], tokenizer)
        starts = data.windows(tokens, OPENING, len(tokens) // PLACES)[:PLACES].tolist()
        shares[domain] = {}
        for name, params in ways(llm).items():
            seeds = range(REPEATS if params.temperature else 1)
            jobs = [(start, replace(params, seed=seed, ignore_eos=True)) for start in starts for seed in seeds]
            outputs = llm.generate([start for start, _ in jobs], [how for _, how in jobs])
            shares[domain][name] = float(np.mean([loops(out.token_ids) for out in outputs]))
    return shares
