"""The console command `mtpjax`: `generate`, `convert`, `info`, `tune`, `count-tokens`."""

from __future__ import annotations

import gc
import importlib
import sys
from typing import Any

import jax

import mtpjax

COMMANDS = {
    "generate": "generate text for a file of prompts",
    "convert": "convert a checkpoint: Hugging Face, Orbax, GGUF",
    "info": "describe a checkpoint: sizes, quantisation, MTP head, memory, cards",
    "tune": "measure tile constants of the GPU kernels on this card",
    "count-tokens": "count token ids of texts, for LLM(draft_vocab_size=...)",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status; 2 if there is no such command."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in COMMANDS:
        if args[0] not in ("generate", "tune"):
            jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave a GPU alone
        return _module(args[0]).main(args[1:])
    if args and args[0] == "--version":
        print(f"mtpjax {mtpjax.__version__}")
        return 0
    lines = [f"  {name:<14}{text}" for name, text in COMMANDS.items()]
    usage = "\n".join(["usage: mtpjax COMMAND ...", "", *lines, "", "mtpjax COMMAND --help explains a command."])
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return 0
    print(f"mtpjax: there is no command {args[0]!r}; expected one of {', '.join(COMMANDS)}\n\n{usage}", file=sys.stderr)
    return 2


def run_process(argv: list[str] | None = None) -> int:
    """Run one command in a process that does nothing else. Returns its exit status.

    What is imported stays until the end, so Python's collector need not look at it again and again. A caller that goes
    on afterwards takes `main`: its own objects would stay, too.
    """
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in COMMANDS:
        _module(args[0])
        gc.freeze()
    return main(args)


def _module(command: str) -> Any:
    return importlib.import_module(f"mtpjax.cli.{command.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(run_process())
