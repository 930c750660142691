"""Memory of the prefill of a long prompt by the 35B-A3B: the whole program, compiled for a described GPU.

    .venv-cuda/bin/python -m scripts.gpu.prefill_memory [--contexts 8192 32768 196608] [--json FILE]

`make check-cuda` makes that environment; no GPU is needed. One program serves a cache: it reads a chunk at any position
of the sequence, and therefore every prompt that fits the cache. What grows with the context is the cache, an argument
that the result aliases; the temporaries must not grow.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scripts.benchmarks.results import describe, write_json
from scripts.gpu.cuda_cases import CHUNK, MODEL, program_case
from scripts.gpu.cuda_target import CARDS, CompileTarget, memory_bytes

CHUNKS = (CHUNK, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 196608], help="tokens the cache holds")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS), help="rows of a prompt chunk")
    parser.add_argument("--card", choices=list(CARDS), default="rtx3090")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    target = CompileTarget(CARDS[args.card])
    rows: list[dict[str, Any]] = []
    for chunk in args.chunks:
        for draft in args.drafts:
            for context in args.contexts:
                fn, shapes, static, _ = program_case("prefill", context=context, draft=draft, chunk=chunk)
                sizes = memory_bytes(target.compile(fn, *shapes, **static))
                rows.append({"chunk": chunk, "draft": draft, "context": context, **sizes})
                mib = {name: size / 2**20 for name, size in sizes.items()}
                print(
                    f"chunk {chunk:5} draft {draft} context {context:7}: temporaries {mib['temp']:8.1f} MiB; arguments "
                    f"{mib['argument']:9.1f} MiB, of which results alias {mib['alias']:8.1f} MiB",
                    flush=True,
                )
    if args.json:
        about = {"model": MODEL, "weights": "iq4_nl", "cache": "bfloat16", "batch": 1, "card": CARDS[args.card].kind}
        write_json(str(args.json), {"what": "memory of the prefill program", **describe(), **about, "rows": rows})


if __name__ == "__main__":
    main()
