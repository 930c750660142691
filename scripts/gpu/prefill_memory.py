"""Memory of reading a long prompt with the 35B-A3B: the whole prefill program, compiled for a described GPU without having one.

    .venv-cuda/bin/python -m scripts.gpu.prefill_memory [--contexts 8192 32768 196608] [--json FILE]

`make check-cuda` makes that environment. One program serves a cache: it reads a chunk wherever the sequence stands, so every
prompt that fits the cache is read by it. What grows with the context is the cache, an argument that the result takes the
place of; the temporaries must not grow.
"""

from __future__ import annotations

import argparse

from scripts.benchmarks.results import describe, write_json
from scripts.gpu.cuda_cases import CHUNK, MODEL, program_case
from scripts.gpu.cuda_target import CARDS, Target, memory

CHUNKS = (CHUNK, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 196608], help="tokens the cache holds")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS), help="rows of a prompt chunk")
    parser.add_argument("--card", choices=list(CARDS), default="rtx3090")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    target = Target(CARDS[args.card])
    rows = []
    for chunk in args.chunks:
        for draft in args.drafts:
            for context in args.contexts:
                fn, shapes, static, _ = program_case("prefill", context=context, draft=draft, chunk=chunk)
                found = memory(target.compile(fn, *shapes, **static))
                rows.append({"chunk": chunk, "draft": draft, "context": context, **found})
                mib = {name: size / 2**20 for name, size in found.items()}
                print(
                    f"chunk {chunk:5} draft {draft} context {context:7}: temporaries {mib['temp']:8.1f} MiB; arguments "
                    f"{mib['argument']:9.1f} MiB, of which results take {mib['alias']:8.1f} MiB",
                    flush=True,
                )
    if args.json:
        about = {"model": MODEL, "weights": "iq4_nl", "cache": "bfloat16", "batch": 1, "card": CARDS[args.card].kind}
        write_json(args.json, {"what": "memory of the prefill program", **describe(), **about, "rows": rows})


if __name__ == "__main__":
    main()
