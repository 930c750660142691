"""Acceptance of the embedded model's drafts from a part of the vocabulary, greedy and sampled, on books and stories.

    python -m scripts.benchmarks.acceptance_draft_vocab --text FILE [FILE ...] --json docs/benchmarks/draft_vocab.json

Books are held-out texts, cut into prompts of `--prompt-tokens` tokens; stories are requests in chat that the model was
not trained on. The texts must be the same at every size, and the script fails if they are not.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from mtpjax.loading.open_model import DTYPES
from scripts.benchmarks.acceptance import cut_prompts, figures_of
from scripts.benchmarks.results import describe, write_json
from scripts.tiny_model.data import TALKS
from scripts.tiny_model.stories import talk

SIZES = (256, 512, 1024, 2048)
TEMPERATURES = (0.0, 0.8)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each size, domain and temperature; the size None is the whole vocabulary.

    "in_part" is the share of the text's tokens that a draft could be.

    Raises:
        SystemExit: a text differs from that of the whole vocabulary.
    """
    options = {"num_speculative_tokens": args.num_speculative_tokens, "dtype": args.dtype}
    options["max_model_len"] = args.prompt_tokens + args.max_tokens
    texts: dict[tuple[str, float], list[list[int]]] = {}
    rows: list[dict[str, Any]] = []
    for size in (None, *args.sizes):
        llm = LLM(TINY, draft_vocab_size=size, **options)
        assert llm.tokenizer is not None
        requests = (llm.chat_prompt([talk(TALKS + number)[0]]) for number in range(args.limit))
        domains = {
            "books": cut_prompts(llm.tokenizer, args.text, args.prompt_tokens, args.limit),
            "stories": [llm.tokenizer.encode(text) for text in dict.fromkeys(requests)],
        }
        head = llm.engine.runner.model.params.get("draft_head")
        part = np.arange(llm.cfg.vocab_size) if head is None else np.asarray(head["token_ids"][...])
        for domain, prompts in domains.items():
            for temperature in TEMPERATURES:
                stops = domain == "books"  # a story ends by itself
                params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature, ignore_eos=stops)
                outputs = llm.generate(prompts, params)
                generated = [output.token_ids for output in outputs]
                if texts.setdefault((domain, temperature), generated) != generated:
                    raise SystemExit(f"{domain}, T = {temperature}: the texts of draft_vocab_size={size} differ")
                in_part = float(np.isin(np.concatenate([np.asarray(ids) for ids in generated]), part).mean())
                row = {"draft_vocab_size": size, "rows": len(part), "domain": domain, "temperature": temperature}
                rows.append(row | {"in_part": in_part} | figures_of(outputs, args.num_speculative_tokens))
                accepted = ", ".join(f"{share:.3f}" for share in rows[-1]["accepted"])
                name = f"{size or 'all':>5} {domain:8} T {temperature:g}: {in_part:.3f} of the text"
                print(f"{name}, {rows[-1]['tokens_per_round']:.3f} tokens a round; accepted {accepted}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--text", nargs="+", required=True, help="UTF-8 texts, held out from training")
    add("--sizes", type=int, nargs="+", default=list(SIZES), help="values of draft_vocab_size")
    add("--num-speculative-tokens", type=int, default=4)
    add("--prompt-tokens", type=int, default=128, help="tokens of a prompt of a book")
    add("--max-tokens", type=int, default=64, help="tokens to generate for each prompt at most")
    add("--limit", type=int, default=32, help="prompts of a book, evenly spread, and stories")
    add("--dtype", choices=DTYPES, default="float32")
    add("--json", help="write the figures to this file")
    args = parser.parse_args()
    rows = measure(args)
    if args.json:
        settings = {name: getattr(args, name) for name in ("prompt_tokens", "max_tokens", "dtype")}
        what = "acceptance of drafts from a part of the vocabulary, embedded model"
        about = {"what": what, **describe(), "draft": args.num_speculative_tokens, **settings}
        write_json(args.json, about | {"table": rows})


if __name__ == "__main__":
    main()
