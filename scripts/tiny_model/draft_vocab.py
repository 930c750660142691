"""Write the draft vocabulary of the embedded model: token ids by frequency in the texts that it was trained on.

python -m scripts.tiny_model.draft_vocab --books DIR [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints import TINY
from mtpjax.text.draft_vocab import DRAFT_VOCAB_FILE, count_tokens, write_draft_vocab
from mtpjax.text.tokenizer import load_tokenizer
from scripts.tiny_model.data import pack, read_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--books", type=Path, required=True, help="the folder of books that the model was trained from")
    parser.add_argument("--out", type=Path, default=TINY / DRAFT_VOCAB_FILE)
    args = parser.parse_args()
    tokenizer = load_tokenizer(TINY / "tokenizer.json")
    documents = [document for document in read_all(args.books) if document.split == "train"]
    vocab = count_tokens([pack(documents, tokenizer.hf_tokenizer).tolist()], tokenizer, tokenizer.size)
    write_draft_vocab(args.out, vocab)
    print(f"{vocab.num_tokens:,} tokens, {len(vocab.token_ids):,} ids, coverage {vocab.coverage}  {args.out}")


if __name__ == "__main__":
    main()
