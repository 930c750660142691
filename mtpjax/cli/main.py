"""The console command `mtpjax`: `generate`, `convert`, `info`, `tune`, `count-tokens`."""

from __future__ import annotations

import gc
import importlib
import sys

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
        command = importlib.import_module(f"mtpjax.cli.{args[0].replace('-', '_')}")
        gc.freeze()  # what is imported stays: Python's collector need not look at it again
        return command.main(args[1:])
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


if __name__ == "__main__":
    sys.exit(main())
