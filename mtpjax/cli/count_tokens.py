"""Count the token ids of texts, for `LLM(draft_vocab_size=FILE)`: drafts then come from the most frequent ones.

    mtpjax count-tokens TEXT [TEXT ...] --model CHECKPOINT --output draft_vocab.json

A .jsonl file has an object a line: its "prompt" (a text or token ids), "text" or "token_ids", and "messages", which go
through the chat template, are counted; the answers of `mtpjax generate --output` are such a file. Any other file is
plain UTF-8 text. Texts like those that will be generated are the best ones. A file that is named draft_vocab.json and
lies in the folder of the checkpoint is used by `LLM(draft_vocab_size=N)`, which takes its first N ids.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoints import TINY, open_checkpoint
from mtpjax.loading.open_model import own_tokenizer
from mtpjax.sampling_params import check_int
from mtpjax.text.draft_vocab import count_tokens, write_draft_vocab
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer

PROG = "mtpjax count-tokens"
DEFAULT_SIZE = 32_768
BLOCK_BYTES = 1 << 20  # of plain text that are encoded at a time, up to the end of a line


def read_token_ids(file: Path, tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    """Yield the token ids of a file, some at a time.

    Raises:
        ValueError: names the file and the line that cannot be used.
        OSError: there is no such file.
    """
    with open(file, "rb") as stream:
        if file.suffix == ".jsonl":
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    yield from _ids_of_line(raw, f"{file}:{number}", tokenizer)
            return
        while lines := stream.readlines(BLOCK_BYTES):
            try:
                text = b"".join(lines).decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: is not UTF-8 text ({error.reason}); convert it, or leave it out") from None
            yield tokenizer.encode(text)


def _ids_of_line(raw: bytes, source: str, tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    expected = 'expected an object with "prompt", "text", "token_ids" or "messages"'
    try:
        row = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{source}: is not JSON ({error}); {expected}") from None
    if not isinstance(row, dict) or not row.keys() & {"prompt", "text", "token_ids", "messages"}:
        raise ValueError(f"{source}: has no text; {expected}")
    if row.get("messages") is not None:
        if tokenizer.chat_template is None:
            raise ValueError(f'{source}: has "messages", but the checkpoint has no chat template; give "text"')
        yield tokenizer.encode(tokenizer.chat_template.render(row["messages"]))
    answer = row.get("token_ids") if row.get("token_ids") is not None else row.get("text")
    for value in (row.get("prompt"), answer):
        if value is not None:
            yield tokenizer.encode(value) if isinstance(value, str) else _checked(value, source)


def _checked(ids: Any, source: str) -> list[int]:
    if not isinstance(ids, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise ValueError(f"{source}: has a prompt or an answer that is neither a text nor a list of token ids")
    return ids


def main(argv: list[str] | None = None) -> int:
    """Run `mtpjax count-tokens`. Returns 2 if a file or the checkpoint cannot be used."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("texts", type=Path, nargs="+", metavar="TEXT", help="plain text, or JSON lines (.jsonl)")
    add("--model", type=Path, default=TINY, metavar="PATH", help="checkpoint with the tokenizer (default: embedded)")
    add("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json in place of the checkpoint's own")
    add("--output", type=Path, required=True, metavar="FILE", help="the file to write; replaced if it exists")
    add("--size", type=int, default=DEFAULT_SIZE, metavar="N", help=f"ids to keep at most (default {DEFAULT_SIZE:,})")
    args = parser.parse_args(argv)
    try:
        check_int("--size", args.size, 1)
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else own_tokenizer(open_checkpoint(args.model))
        if tokenizer is None:
            raise ValueError(f"{args.model}: has no tokenizer; give --tokenizer")
        batches = (ids for file in args.texts for ids in read_token_ids(file, tokenizer))
        vocab = count_tokens(batches, tokenizer, args.size)
        write_draft_vocab(args.output, vocab)
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    print(f"{vocab.num_tokens:,} tokens, {len(vocab.token_ids):,} ids  {args.output}")
    for size, share in vocab.coverage.items():
        print(f"the first {int(size):>7,} are {share:.2%} of the text")
    return 0
