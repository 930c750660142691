"""What `mtpjax generate` prints: answers for the terminal, and the figures of a job."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from mtpjax import RequestOutput
from mtpjax.cli.jsonl import PromptLine
from mtpjax.engine.engine import Engine


@dataclass
class JobTotals:
    """Sums over the answers of a job.

    Attributes:
        num_errors: lines that could not be used.
        num_thoughts, num_unfinished_thoughts: answers that have a thought, and those that ended inside it.
    """

    num_prompts: int = 0
    num_texts: int = 0
    num_errors: int = 0
    num_thoughts: int = 0
    num_unfinished_thoughts: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    @property
    def num_accepted_tokens(self) -> int:
        """Accepted draft tokens, all positions together."""
        return sum(self.num_accepted_tokens_per_pos)

    def add(self, output: RequestOutput) -> None:
        """Add the figures of one answer."""
        metrics = output.metrics
        self.num_prompts += 1
        self.num_prompt_tokens += metrics.num_prompt_tokens
        for completion in output.outputs:
            self.num_texts += 1
            self.num_new_tokens += len(completion.token_ids)
            self.num_thoughts += completion.reasoning is not None
            self.num_unfinished_thoughts += completion.unfinished_thought
        self.num_steps += metrics.num_steps
        self.num_draft_tokens += metrics.num_draft_tokens
        pairs = zip_longest(self.num_accepted_tokens_per_pos, metrics.num_accepted_tokens_per_pos, fillvalue=0)
        self.num_accepted_tokens_per_pos = [a + b for a, b in pairs]

    def figures(self, engine: Engine, seconds: float) -> dict[str, Any]:
        """Return the figures of a job that took `seconds`, as a JSON object: these sums, and those of the engine.

        Seconds of the engine are synchronised with the device and have no compilation in them.
        """
        names = ["num_prompt_tokens", "num_cached_tokens", "prefill_seconds", "decode_seconds"]
        names += ["compile_seconds", "slot_steps", "num_programs"]
        return {
            **asdict(self),
            "num_accepted_tokens": self.num_accepted_tokens,
            "seconds": seconds,
            "engine": {name: getattr(engine, name) for name in names},
        }

    def summary(self, engine: Engine, seconds: float) -> str:
        """Return the figures of a job that took `seconds`, a line each.

        Rates divide by time on the device, without compilation.
        """

        def rate(count: int, seconds: float) -> str:
            return f"{count / seconds:>9,.1f} tokens/s" if seconds else f"{'-':>9} tokens/s"

        shared = f", {engine.num_cached_tokens:,} of them from common beginnings" if engine.num_cached_tokens else ""
        drafts = "none"
        if self.num_draft_tokens:
            by_position = ", ".join(f"{n / self.num_steps:.0%}" for n in self.num_accepted_tokens_per_pos)
            share = self.num_accepted_tokens / self.num_draft_tokens
            drafts = f"{share:.1%} of {self.num_draft_tokens:,} accepted; by position {by_position}"
        lines = [
            f"prompts  {self.num_prompts:>9,} with {self.num_prompt_tokens:,} tokens{shared}",
            f"prefill  {rate(engine.num_prompt_tokens, engine.prefill_seconds)}",
            f"decode   {rate(self.num_new_tokens, engine.decode_seconds)}: {self.num_new_tokens:,} tokens in "
            f"{self.num_steps:,} rounds, {self.num_new_tokens / max(self.num_steps, 1):.2f} a round",
            f"drafts   {drafts}",
            f"slots    {self.num_steps / max(engine.slot_steps, 1):>9.0%} busy",
            f"seconds  {seconds:>9,.1f} in all, {engine.compile_seconds:,.1f} of them compiling",
        ]
        if self.num_thoughts:
            hint = "; more --max-tokens may end them" if self.num_unfinished_thoughts else ""
            lines.append(f"thoughts {self.num_thoughts:>9,}, {self.num_unfinished_thoughts:,} of them unfinished{hint}")
        if self.num_errors:
            lines.append(f"errors   {self.num_errors:>9,} lines")
        return "\n".join(lines)


def format_answer(line: PromptLine, output: RequestOutput) -> str:
    """Return a prompt, its answer and how it was drafted, wrapped for the terminal."""
    prompt = line.prompt if isinstance(line.prompt, str) else f"{len(line.prompt)} token ids"
    metrics, num_tokens = output.metrics, sum(len(one.token_ids) for one in output.outputs)
    figures = f"{num_tokens} new tokens in {metrics.num_steps} rounds"
    if metrics.num_draft_tokens:
        # Every round adds one token of the trunk to the accepted drafts.
        num_drafted = max(num_tokens - metrics.num_steps, 0)
        share = metrics.num_accepted_tokens / metrics.num_draft_tokens
        figures += f": {num_drafted} were drafted and accepted ({share:.0%} of the drafts)"
    if any(one.unfinished_thought for one in output.outputs):
        figures += "; the thought is unfinished"
    texts = [one.text if one.text is not None else f"{one.token_ids}" for one in output.outputs]
    answers = "\n".join(_wrap(text, "  > ", "  > ") for text in texts)
    return f"{_wrap(prompt, f'[{line.id}] ', '    ')}\n{answers}\n  {figures}\n"


def _wrap(text: str, first_indent: str, indent: str) -> str:
    wrapped = []
    for number, line in enumerate(text.strip().splitlines() or [""]):
        initial = indent if number else first_indent
        wrapped.append(textwrap.fill(line, 100, initial_indent=initial, subsequent_indent=indent) or indent)
    return "\n".join(wrapped)
