"""Delete, duplicate, retype, rename and add keys of input lines: conversations in our own form and in OpenAI's.

    python -m scripts.format_checks.fuzz_lines --template chat_template.jinja [--cases 10000]

A line is read as `mtpjax generate` does, and its conversation goes through the template. Every outcome must be one of

* the same prompt and settings, where the change cannot matter (`may_be_silent`) or a warning names what was changed;
* another prompt or another setting;
* an error of that line whose message names a changed key, or the place that it is in;

within 2 s. Anything else is printed by kind of change and key, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from mtpjax.cli.jsonl import LineError, read_prompt_lines
from mtpjax.cli.line_keys import HARMLESS, NEUTRAL
from mtpjax.sampling_params import SamplingParams
from mtpjax.text.chat_template import ChatTemplate
from mtpjax.text.messages import HARMLESS as HARMLESS_IN_MESSAGES
from scripts.format_checks.fuzz_keys import Report, Result, change_objects
from scripts.format_checks.key_documents import Document, Pairs, to_json

SECONDS = 2.0
TOOL = {
    "type": "function",
    "function": {
        "name": "area",
        "description": "The area of a rectangle.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "How large is it?"}], "name": None},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I must compute.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "area", "arguments": '{"a": 3}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "9"},
    {"role": "user", "content": "And twice that?"},
]
SETTINGS = {"max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 5, "presence_penalty": 0.5}
CHAT = {
    "messages": MESSAGES,
    "tools": [TOOL],
    "chat_template_kwargs": {"enable_thinking": False},
    "tool_choice": "auto",
    **SETTINGS,
}
LINES = {
    "own": {"id": "a", **CHAT},
    "openai": {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "n": 1, "stream": False, "user": "u", **CHAT},
    },
}
OPTIONAL = ("method", "tool_choice", "type", "chat_template_kwargs", "enable_thinking")
# Of a message: null in the line that is changed, or left out of a thought before the last question by the template.
UNSEEN = ("name", "content", "reasoning_content")
PLACES = {
    "messages": "message 0",
    "tools": "tool 0",
    "content": "part 0",
    "tool_calls": "tool call 0",
}  # what messages call an entry of a list


def read(text: str, template: ChatTemplate, folder: Path) -> Any:
    """Return the prompt, the sampling parameters and the id of a line; raises the LineError or ValueError of it."""
    file = folder / "lines.jsonl"
    file.write_text(text + "\n")
    (line,) = read_prompt_lines(file)
    if isinstance(line, LineError):
        raise line
    params = SamplingParams(**line.options)
    if line.messages is None:
        return line.prompt, params, line.id
    prompt = template.render(line.messages, tools=line.tools, chat_template_kwargs=line.chat_template_kwargs)
    return prompt, params, line.id


def run_case(text: str, names: tuple[str, ...], base: Any, template: ChatTemplate) -> Result:
    """Read a changed line and judge the outcome."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.process_time()
        try:
            found = read(text, template, Path(folder))
        except ValueError as error:
            message = str(error).replace(folder, "")
            result = Result(
                "error" if any(name in message for name in names) else "bad: error without the name", message
            )
        except Exception as error:
            result = Result(f"bad: {type(error).__name__}", str(error).replace(folder, ""))
        else:
            message = " ".join(str(w.message) for w in caught)
            named = any(name in message for name in names)
            result = Result("warning" if named else "same" if found == base else "other", message)
        seconds = time.process_time() - start
        return Result("bad: slow", f"{seconds:.1f} s") if seconds > SECONDS else result


def may_be_silent(kind: str, key: str) -> bool:
    """Return whether a change may leave the prompt and the settings as they are without a word."""
    if kind in ("add null", "add empty", "rename null") or key in HARMLESS or key in HARMLESS_IN_MESSAGES:
        return True
    return kind in ("delete", "retype", "duplicate") and key in (*NEUTRAL, *OPTIONAL, *UNSEEN)


def fuzz(name: str, template: ChatTemplate, cases: int, seed: int = 0) -> Report:
    """Run the cases of one form of lines: a key of `LINES`."""
    content = json.loads(json.dumps(LINES[name]), object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        base = read(to_json(content), template, Path(folder))
    for case in range(seed, seed + cases):
        document = Document({name: copy.deepcopy(content)}, [], {})
        kind, where, names = change_objects(random.Random(case), document)
        key = where.partition(": ")[2]
        names = (*names, PLACES.get(key, key))
        result = run_case(to_json(document.objects[name]), names, base, template)
        report.add(case, kind, where, result, may_be_silent(kind, key))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--template", type=Path, required=True, help="a chat template in Jinja")
    parser.add_argument("--cases", type=int, default=10_000, help="of each form")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case")
    args = parser.parse_args()
    template = ChatTemplate(args.template.read_text(), str(args.template), {})
    failed = False
    for name in LINES:
        report = fuzz(name, template, args.cases, args.seed)
        report.show(f"lines in the form {name!r}", args.cases)
        failed |= bool(report.bad)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
