"""Regular expressions as deterministic automata over the bytes of UTF-8, made by outlines-core in a bounded process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_DFA_STATES = 20_000  # over bytes
MAX_DFA_BYTES = 2 << 30  # memory of the process that makes an automaton, where the system can limit it (Linux)
MAX_DFA_SECONDS = 60.0

_WORKER = Path(__file__).with_name("regex_dfa_worker.py")


@dataclass(frozen=True, eq=False)
class ByteDfa:
    """A deterministic automaton over bytes; state 0 is the first.

    Attributes:
        next_state: the state after a byte, -1 where no text goes on, int32 `[S, 256]`.
        accepting: whether a text may end in a state, bool `[S]`.
    """

    next_state: np.ndarray
    accepting: np.ndarray


def regex_to_dfa(regex: str) -> ByteDfa:
    """Return the automaton of the texts that match as a whole.

    The syntax is that of the Rust crate `regex` without what a finite automaton lacks: look-around, back-references and
    Unicode word boundaries. `^` at the beginning and `$` at the end mean nothing, since the whole text must match. The
    character U+0000 matches nothing.

    Raises:
        ValueError: it does not parse, or is too large: memory, time or states above the limits of this module.
        ImportError: outlines-core is not installed.
    """
    return _ask({"regex": _without_anchors(regex)})


def schema_to_dfa(schema: str) -> ByteDfa:
    """Return the automaton of the JSON texts that a schema describes.

    Args:
        schema: JSON of what `mtpjax.text.json_schema.simplify_schema` returns.

    Raises:
        ValueError, ImportError: as `regex_to_dfa`.
    """
    return _ask({"schema": schema})


def _without_anchors(regex: str) -> str:
    body = regex.removeprefix("^")
    before = body.removesuffix("$")
    num_backslashes = len(before) - len(before.rstrip("\\"))
    return body if num_backslashes % 2 else before


def _ask(question: dict[str, str]) -> ByteDfa:
    if importlib.util.find_spec("outlines_core") is None:
        raise ImportError("structured outputs need the package outlines-core; run: pip install 'mtpjax[structured]'")
    command = [sys.executable, "-P", str(_WORKER), str(MAX_DFA_BYTES), str(MAX_DFA_STATES)]
    try:
        answer = subprocess.run(
            command, input=json.dumps(question).encode(), capture_output=True, timeout=MAX_DFA_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it takes more than {MAX_DFA_SECONDS:.0f} s to make its automaton; simplify it") from None
    message = answer.stderr.decode(errors="replace").strip()
    if answer.returncode == 3:
        raise ValueError(message)
    if answer.returncode:
        if "allocat" in message or "MemoryError" in message or not message:
            raise ValueError(f"its automaton needs more than {MAX_DFA_BYTES >> 20} MiB while it is made; simplify it")
        raise ValueError(f"no automaton: the process ended with status {answer.returncode}: {message[-500:]}")
    data = np.frombuffer(answer.stdout, np.int32)
    num_states = int(data[0])
    return ByteDfa(data[1 + num_states :].reshape(num_states, 256), data[1 : 1 + num_states].astype(bool))
