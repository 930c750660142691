"""What quantising costs the embedded model: bytes, bits a byte of held-out text and acceptance, type by type, through GGUF.

    python scripts/quantised_quality.py --books DIR [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from checkpoints import TINY, open_checkpoint
from mtpjax.cache import BLOCK
from mtpjax.loading import load_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_data as data
from convert import to_gguf
from results import describe, write_json
from tiny_loss import window_loss
from tiny_report import acceptance, in_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--books", type=Path, required=True, help="the folder of the books, held-out titles among them")
    parser.add_argument("--types", nargs="+", default=["bf16", "q8_0", "q4_0", "iq4_nl"])
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    held_out = [d for d in data.read_books(args.books) if d.split == "held-out"]
    tokens = data.pack(held_out, Tokenizer.from_file(str(TINY / "tokenizer.json")))
    size = sum(len(d.text.encode()) for d in held_out)
    windows = data.windows(tokens, BLOCK + 1, BLOCK)
    rows: list[dict[str, Any]] = []
    for kind in args.types:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tiny.gguf"
            to_gguf(open_checkpoint(TINY), file, kind)
            model = load_checkpoint(open_checkpoint(file), dtype=jnp.float32)
            megabytes = file.stat().st_size / 1e6
        loss = jax.jit(partial(window_loss, model.graph))
        nats = sum(float(loss(model.params, some)) for some in in_batches(windows)) / (len(windows) * BLOCK)
        taken = acceptance(model, windows)
        rows.append({"type": kind, "megabytes": megabytes, "bits_per_byte": nats / math.log(2) * len(tokens) / size, **taken})
        given = ", ".join(f"{x:.3f}" for x in taken["accepted_given_previous"])
        print(
            f"{kind:7} {megabytes:5.1f} MB  {rows[-1]['bits_per_byte']:.4f} bits a byte  "
            f"{taken['tokens_per_round']:.3f} tokens a round; given all before {given}",
            flush=True,
        )
    if args.json:
        write_json(args.json, {"what": "quantised embedded model", **describe(), "rows": json.loads(json.dumps(rows))})


if __name__ == "__main__":
    main()
