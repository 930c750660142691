"""Books for the embedded model: which titles train, which are held out, their tokenizer, packed windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HELD_OUT = ("lewis-carroll_through-the-looking-glass", "l-frank-baum_the-road-to-oz")
END_OF_TEXT, SPECIAL = "<|endoftext|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 4096
# The pre-tokeniser of Qwen3.5: Qwen2's, with marks joined to letters.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Book:
    """One title; `split` is "train" or "held-out"."""

    file: Path
    text: str
    split: str

    def manifest_line(self) -> dict[str, str | int]:
        raw = self.file.read_bytes()
        return {
            "file": self.file.name,
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "split": self.split,
        }


def read_books(folder: Path) -> list[Book]:
    """Every `author_title.txt` of `folder`, by name.

    Raises SystemExit, with a line for the user, when the folder or a held-out title is missing.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder. --books wants a folder of plain texts named author_title.txt.")
    files = sorted(file for file in folder.glob("*.txt") if file.is_file())
    missing = set(HELD_OUT) - {file.stem for file in files}
    if missing:
        raise SystemExit(
            f"{folder}: found {len(files)} texts but not {', '.join(f'{name}.txt' for name in sorted(missing))}, "
            "expected the held-out titles among them. Is this the folder of the books?"
        )
    books = [Book(f, f.read_text(encoding="utf-8"), "held-out" if f.stem in HELD_OUT else "train") for f in files]
    if all(book.split == "held-out" for book in books):
        raise SystemExit(f"{folder}: holds only the held-out titles, expected others to train on.")
    return books


def train_tokenizer(texts: Iterator[str], vocab: int = VOCAB) -> Tokenizer:
    """A byte-level BPE of `vocab` ids, the special tokens last; the same texts give the same tokenizer.

    Raises SystemExit when the texts are too small for that many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    merges = vocab - len(SPECIAL)
    trainer = trainers.BpeTrainer(
        vocab_size=merges, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != merges:
        found = tokenizer.get_vocab_size()
        raise SystemExit(f"the books give only {found} tokens, expected {merges}: too little text.")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def pack(books: list[Book], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """All tokens of the books, `<|endoftext|>` before, between and after the titles."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for book in books:
        ids += [*tokenizer.encode(book.text).ids, end]
    return np.asarray(ids, np.int32)


def batches(tokens: NDArray[np.int32], batch: int, width: int, stride: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """Endless `[batch, width]` windows. Each pass cuts the text anew every `stride` tokens, from a random first token
    on, and visits the windows in random order."""
    rng = np.random.default_rng(seed)
    room = len(tokens) - width + 1
    if room < batch * stride:
        raise SystemExit(f"the books have {len(tokens)} tokens, fewer than a batch of {batch} windows of {width}.")
    while True:
        starts = rng.permutation(np.arange(rng.integers(stride), room, stride))
        for first in range(0, len(starts) - batch + 1, batch):
            yield tokens[starts[first : first + batch, None] + np.arange(width)]


def windows(tokens: NDArray[np.int32], width: int, stride: int) -> NDArray[np.int32]:
    """Every whole window of the text, `[N, width]`, one each `stride` tokens."""
    return tokens[np.arange(0, len(tokens) - width + 1, stride)[:, None] + np.arange(width)]


def demo_prompts(books: list[Book]) -> list[dict[str, str]]:
    """Five openings of held-out paragraphs, of 15 to 60 words each, in unequal lengths."""
    wanted = ((0, 40, 17), (0, 200, 30), (1, 60, 44), (1, 150, 24), (0, 320, 58))  # title, paragraph, words
    prompts = []
    for number, (title, paragraph, words) in enumerate(wanted):
        book = next(b for b in books if b.file.stem == HELD_OUT[title])
        long = [p for p in book.text.split("\n") if len(p.split()) >= words + 10]
        text = " ".join(long[paragraph % len(long)].split()[:words])
        prompts.append({"id": f"{book.file.stem.split('_')[1]}-{number + 1}", "prompt": text})
    return prompts


def write_json_lines(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
