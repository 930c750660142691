"""The draft vocabulary: token ids in the order of their frequency in some text, as a small file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mtpjax.text.tokenizer import Tokenizer

DRAFT_VOCAB_FILE = "draft_vocab.json"  # its name in the folder of a checkpoint
FORMAT = "mtpjax draft vocabulary 1"
COUNT_AGAIN = "Count again with this checkpoint: mtpjax count-tokens TEXT ... --model CHECKPOINT --output FILE."


@dataclass(frozen=True)
class DraftVocab:
    """Token ids by frequency, and the tokenizer that they belong to.

    Attributes:
        token_ids: the most frequent first; ids that do not occur are left out.
        tokenizer_size: ids below this exist.
        tokenizer_sha256: `Tokenizer.sha256`.
        num_tokens: of the text, in which the ids were counted.
        coverage: share of these tokens that are among the first 256, 512, 1,024, ... ids, by that number as a text.
    """

    token_ids: tuple[int, ...]
    tokenizer_size: int
    tokenizer_sha256: str
    num_tokens: int
    coverage: dict[str, float]


def count_tokens(batches: Iterable[Iterable[int]], tokenizer: Tokenizer, size: int) -> DraftVocab:
    """Count token ids, and return the `size` most frequent ones; of equally frequent ones the lower ids go first.

    Raises:
        ValueError: there are no tokens, or an id is outside the vocabulary.
    """
    counts = np.zeros(tokenizer.size, np.int64)
    for batch in batches:
        ids = np.asarray(list(batch), np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.size:
            bad = int(ids.max() if ids.max() >= tokenizer.size else ids.min())
            raise ValueError(f"id {bad} is outside the vocabulary 0...{tokenizer.size - 1}")
        counts += np.bincount(ids, minlength=tokenizer.size)
    total = int(counts.sum())
    if not total:
        raise ValueError("the texts have no tokens; give files with text")
    order = np.argsort(-counts, kind="stable")[: min(size, np.count_nonzero(counts))]
    covered = np.cumsum(counts[order]) / total
    sizes = [n for n in (256 << i for i in range(11)) if n <= order.size]
    coverage = {str(n): round(float(covered[n - 1]), 6) for n in sizes}
    return DraftVocab(tuple(order.tolist()), tokenizer.size, tokenizer.sha256, total, coverage)


def write_draft_vocab(path: str | PathLike[str], vocab: DraftVocab) -> None:
    """Write the file by way of a temporary one beside it."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": {"size": vocab.tokenizer_size, "sha256": vocab.tokenizer_sha256},
        "num_tokens": vocab.num_tokens,
        "coverage": vocab.coverage,
        "token_ids": list(vocab.token_ids),
    }
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in content.items()]
    part = Path(f"{path}.part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    part.replace(path)


def read_draft_vocab(path: str | PathLike[str], tokenizer: Tokenizer | None, vocab_size: int) -> DraftVocab:
    """Read the file and check that it was counted with this tokenizer.

    Args:
        path: of the file.
        tokenizer: of the checkpoint; None: it has none, and only the range of the ids is checked.
        vocab_size: ids below this exist.

    Raises:
        ValueError: names the file: it cannot be read, is not such a file, or belongs to another tokenizer.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {FORMAT!r}")
        identity, ids = content["tokenizer"], content["token_ids"]
        vocab = DraftVocab(
            tuple(ids), identity["size"], identity["sha256"], content["num_tokens"], dict(content["coverage"])
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}). {COUNT_AGAIN}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a draft vocabulary ({what}). {COUNT_AGAIN}") from None
    if tokenizer is not None and (vocab.tokenizer_size, vocab.tokenizer_sha256) != (tokenizer.size, tokenizer.sha256):
        raise ValueError(
            f"{path}: was counted with a tokenizer of {vocab.tokenizer_size} tokens "
            f"(sha256 {str(vocab.tokenizer_sha256)[:12]}...), expected that of this checkpoint: "
            f"{tokenizer.size} tokens (sha256 {tokenizer.sha256[:12]}...). {COUNT_AGAIN}"
        )
    for token in vocab.token_ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"{path}: id {token!r} is outside the vocabulary 0...{vocab_size - 1}. {COUNT_AGAIN}")
    if not vocab.token_ids or len(set(vocab.token_ids)) != len(vocab.token_ids):
        raise ValueError(f"{path}: its token_ids are empty or not all different. {COUNT_AGAIN}")
    return vocab
