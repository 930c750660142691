"""The console command `mtpjax`: `generate`, `convert`, `info`, `tune`, `count-tokens`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax

import mtpjax
from mtpjax.cli import convert, count_tokens, generate, info, tune

COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "generate": (generate.main, "generate text for a file of prompts"),
    "convert": (convert.main, "convert a checkpoint: Hugging Face, Orbax, GGUF"),
    "info": (info.main, "describe a checkpoint: sizes, quantisation, MTP head, memory, cards"),
    "tune": (tune.main, "measure tile constants of the GPU kernels on this card"),
    "count-tokens": (count_tokens.main, "count token ids of texts, for LLM(draft_vocab_size=...)"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status; 2 if there is no such command."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in COMMANDS:
        if args[0] not in ("generate", "tune"):
            jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave a GPU alone
        return COMMANDS[args[0]][0](args[1:])
    if args and args[0] == "--version":
        print(f"mtpjax {mtpjax.__version__}")
        return 0
    lines = [f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items()]
    usage = "\n".join(["usage: mtpjax COMMAND ...", "", *lines, "", "mtpjax COMMAND --help explains a command."])
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return 0
    print(f"mtpjax: there is no command {args[0]!r}; expected one of {', '.join(COMMANDS)}\n\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
