"""A program of its own: turns a regular expression or a JSON schema into a deterministic automaton over bytes.

`mtpjax/text/regex_dfa.py` runs it as a process, because nothing in the library bounds the memory and the time that an
expression may take. It reads JSON `{"regex": ...}` or `{"schema": ...}` from stdin, and writes int32 to stdout: the
number of states S, S flags (whether a text may end there), then S rows of 256 next states, -1: none; state 0 is first.
An error goes to stderr, with exit status 3. It imports nothing of this package, so that it starts fast.

The library's automaton is that of a search: it also looks for a match that begins later, which can take exponentially
many states, and it forgets alternatives of less priority once one matches (`a|ab` does not match "ab"). Some releases
also lose what may follow where a text may end. None of this happens to `PREFIX(?:R)\\x00|`. Its empty last alternative
matches at once, and ends the search for other beginnings. R itself never matches before the byte 0 that stands behind
it; a text may end where that byte may follow. In return, byte 0 cannot stand in a text. The prefix keeps the beginning
of R apart from that of the whole, where an edge may be lost.
"""

import json
import sys
from array import array
from typing import NoReturn

PREFIX = r"\x00\x01\x02\x03"
END = 256  # a token of the library's vocabulary; the bytes come before it


def main() -> None:
    """Answer one question."""
    limit, max_states = int(sys.argv[1]), int(sys.argv[2])
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, ValueError, OSError):
        pass  # this system has no such limit; that of time remains
    from outlines_core import Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    question = json.load(sys.stdin)
    try:
        regex = question["regex"] if "regex" in question else build_regex_from_schema(question["schema"])
        vocabulary = Vocabulary(END, {bytes([byte]): [byte] for byte in range(256)})
        Index("|" + regex, vocabulary)  # an error if R does not parse alone, as `a)|(b` does in parentheses
        index = Index(f"{PREFIX}(?:{regex})\\x00|", vocabulary)
        transitions = index.get_transitions()
        final = set(index.get_final_states())
    except Exception as error:  # the library raises ValueError and exceptions of its own
        fail("a part of it matches nothing" if "vocabulary provided is incompatible" in str(error) else str(error))
    first = after_prefix(index.get_initial_state(), transitions)
    accepting = {state for state, row in transitions.items() if row.pop(0, None) in final}
    states, seen = [first], {first}
    for state in states:  # it grows
        new = {target for token, target in transitions[state].items() if token != END and target in transitions} - seen
        states += sorted(new)
        seen |= new
    if len(states) > max_states:
        fail(f"its automaton has {len(states)} states over bytes; at most {max_states} are supported")
    number = {state: i for i, state in enumerate(states)}
    out = array("i", [len(states), *(int(state in accepting) for state in states)])
    for state in states:
        row = [-1] * 256
        for token, following in transitions.get(state, {}).items():
            if token != END and following in number:
                row[token] = number[following]
        out.extend(row)
    out.tofile(sys.stdout.buffer)


def after_prefix(initial: int, transitions: dict[int, dict[int, int]]) -> int:
    """Return the state after `PREFIX`. The way to it has one byte in each state, and nothing else leads to it."""
    initial_row = transitions.get(initial, {})
    if 0 in initial_row:
        candidates = {initial_row[0]}
    else:  # the edge was lost
        candidates = set(transitions) - {target for row in transitions.values() for target in row.values()}
    found = set()
    for state in candidates:
        for byte in (1, 2, 3):
            row = transitions.get(state, {})
            if set(row) != {byte}:
                break
            state = row[byte]
        else:
            found.add(state)
    if len(found) != 1:
        fail("no text satisfies it" if not found else "it begins with control characters, which are not supported")
    return found.pop()


def fail(message: str) -> NoReturn:
    """Write why there is no automaton, and end the process."""
    print(message, file=sys.stderr)
    raise SystemExit(3)


if __name__ == "__main__":
    main()
