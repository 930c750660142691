"""Measure the embedded model on the held-out texts, domain by domain, and write its model card.

    python -m scripts.tiny_model.report --books DIR --model checkpoints/tiny [--without DIR --with DIR]

`--with` and `--without` are two further runs that differ only in `--mtp-steps`; the card compares their acceptance.
Without these options the comparison in the existing report.json is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from checkpoints import open_checkpoint
from mtpjax import LLM
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model.cache import KV_BLOCK
from scripts.tiny_model import data
from scripts.tiny_model.card import card
from scripts.tiny_model.evaluation import acceptance, evaluate
from scripts.tiny_model.samples import loop_shares, samples


def load(folder: Path) -> LoadedModel:
    """Load a checkpoint in float32."""
    return load_checkpoint(open_checkpoint(folder), dtype=jnp.dtype(jnp.float32))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--books", type=Path, required=True, help="the folder it was trained from")
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--with", dest="several", type=Path, help="a run with the same --mtp-steps as --model")
    parser.add_argument("--without", dest="single", type=Path, help="the same run with --mtp-steps 1")
    args = parser.parse_args(argv)
    if (args.several is None) != (args.single is None):
        parser.error("--with and --without belong together: give both or neither.")
    documents = data.read_all(args.books)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = load(args.model)
    report: dict[str, Any] = {"domains": evaluate(model, tokenizer, documents)}
    llm = LLM(args.model, num_speculative_tokens=3, dtype="float32", max_model_len=512, max_num_seqs=20)
    report |= {"loops": loop_shares(llm, tokenizer, documents), "samples": samples(llm, args.model)}
    if args.several:
        held_out = [d for d in documents if d.domain == "books" and d.split == "held-out"]
        windows = data.windows(data.pack(held_out, tokenizer), KV_BLOCK + 1, KV_BLOCK)
        report["mtp_steps"] = [
            {"training": json.loads((run / "training.json").read_text()), **acceptance(load(run), windows)}
            for run in (args.single, args.several)
        ]
    elif (file := args.model / "report.json").is_file() and "mtp_steps" in (old := json.loads(file.read_text())):
        report["mtp_steps"] = old["mtp_steps"]
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    text = card(model.cfg, num_parameters, args.model, report)
    (args.model / "README.md").write_text(text, encoding="utf-8")
    (args.model / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
