"""Generate text for a file of prompts; without arguments, the embedded model on the embedded prompts.

    python scripts/batch_generate.py [--model DIR] [--input prompts.jsonl] [--output answers.jsonl]

A line of the input is `{"id": "a", "prompt": "Once"}`, the prompt a text or a list of token ids, optionally with
"max_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty" and
"seed"; `"messages": [{"role": "user", "content": "Hello"}]` in
place of the prompt goes through the checkpoint's chat template. In a `.txt` file a line is a prompt as it stands. Lines of
the output have "id", "prompt", "text", "token_ids", "finish_reason" and "metrics", in the order of the input. While the job
runs, answers that are ready are in OUTPUT.part; after an interruption, the same command with --resume goes on from there and
ends with the same texts. A line that cannot be used is reported and left out, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoints import TINY
from mtpjax import LLM, RequestOutput, SamplingParams
from mtpjax.cli.jsonl import OPTIONS, Job, LineError, count_lines, read_jobs
from mtpjax.cli.resumable_output import Answers, ResumeError
from mtpjax.llm import MAX_SPECULATIVE_TOKENS
from mtpjax.loading.open_model import DTYPES
from mtpjax.loading.quantized_leaves import WEIGHTS

# What the texts do not depend on, so that a run may go on with another: where they stand, and how they are computed.
FREE = {"input", "output", "overwrite", "resume", "limit", "draft", "mtp_prompt", "batch", "admit"}


@dataclass
class Totals:
    """Sums over the answers of a job."""

    prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    per_position: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum(self.per_position)

    def add(self, output: RequestOutput) -> None:
        metrics = output.metrics
        self.prompts += 1
        self.prompt_tokens += metrics.num_prompt_tokens
        self.new_tokens += len(output.token_ids)
        self.rounds += metrics.num_steps
        self.drafted += metrics.num_draft_tokens
        old = self.per_position or [0] * len(metrics.num_accepted_tokens_per_pos)
        self.per_position = [a + b for a, b in zip(old, metrics.num_accepted_tokens_per_pos, strict=True)]

    def summary(self, engine: Any, wall: float) -> str:
        """The figures of a job that took `wall` seconds, in a few lines. Rates are those of the device, without compilation."""

        def rate(count: int, seconds: float) -> str:
            return f"{count / seconds:>9,.1f} tokens/s" if seconds else f"{'-':>9} tokens/s"

        drafts = "none"
        if self.drafted:
            position = ", ".join(f"{n / self.rounds:.0%}" for n in self.per_position)
            drafts = f"{self.accepted / self.drafted:.1%} of {self.drafted:,} accepted; by position {position}"
        return "\n".join([
            f"prompts  {self.prompts:>9,} with {self.prompt_tokens:,} tokens",
            f"prefill  {rate(engine.num_prompt_tokens, engine.prefill_seconds)}",
            f"decode   {rate(self.new_tokens, engine.decode_seconds)}: {self.new_tokens:,} tokens in {self.rounds:,} rounds, "
            f"{self.new_tokens / max(self.rounds, 1):.2f} a round",
            f"drafts   {drafts}",
            f"slots    {self.rounds / max(engine.slot_steps, 1):>9.0%} busy",
            f"seconds  {wall:>9,.1f} in all, {engine.compile_seconds:,.1f} of them compiling",
        ])  # fmt: skip


@dataclass(frozen=True)
class Ready:
    """A job whose prompt and options are good; a conversation has become its prompt."""

    job: Job
    ids: list[int]
    params: SamplingParams


def check(llm: LLM, job: Job, args: argparse.Namespace) -> Ready:
    """Raises LineError for what `generate` would refuse. The seed depends on the line alone, not on its neighbours."""
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    given |= {"seed": args.seed + job.line - 1} | job.options
    given |= {"stop_token_ids": tuple(args.stop_token_ids), "ignore_eos": args.ignore_eos}
    try:
        if job.messages is not None:
            job = replace(job, prompt=llm.chat_prompt(job.messages))
        params = llm.get_default_sampling_params(**given) if args.advised else SamplingParams(**given)
        return Ready(job, llm.encode(job.prompt, params), params)
    except ValueError as error:
        raise LineError(f"{job.where}: {error}") from None


def row(job: Job, output: RequestOutput) -> dict[str, object]:
    """An answer as a line of the output."""
    return {
        "id": job.id, "prompt": job.prompt, "text": output.text, "token_ids": output.token_ids,
        "finish_reason": output.finish_reason, "metrics": asdict(output.metrics),
    }  # fmt: skip


def readable(job: Job, output: RequestOutput) -> str:
    """An answer for the terminal."""
    prompt = job.prompt if isinstance(job.prompt, str) else f"{len(job.prompt)} token ids"
    text = output.text if output.text is not None else f"{output.token_ids}"
    metrics, tokens = output.metrics, len(output.token_ids)
    said = f"{tokens} new tokens in {metrics.num_steps} rounds"
    if metrics.num_draft_tokens:
        ours = max(tokens - metrics.num_steps, 0)  # every round adds one token of the trunk to the accepted drafts
        said += f": {ours} were drafted and accepted ({metrics.num_accepted_tokens / metrics.num_draft_tokens:.0%} of the drafts)"

    def wrapped(text: str, first: str, others: str) -> str:
        lines = text.strip().splitlines() or [""]
        return "\n".join(
            textwrap.fill(line, 100, initial_indent=others if n else first, subsequent_indent=others) or others
            for n, line in enumerate(lines)
        )

    return f"{wrapped(prompt, f'[{job.id}] ', '    ')}\n{wrapped(text, '  > ', '  > ')}\n  {said}\n"


def run(
    llm: LLM, jobs: Iterable[Job | LineError], args: argparse.Namespace, answers: Answers | None, bar: tqdm
) -> tuple[Totals, int]:
    """Answer all jobs. Returns the sums and how many lines could not be used."""
    totals, bad, new, began = Totals(), 0, 0, llm.engine.seconds_without_compile()
    waiting: dict[int, Job] = {}  # jobs that are read and not answered
    ready_text: dict[int, str] = {}  # answers for the terminal that an earlier one stands before
    shown = 0

    def usable() -> Iterator[tuple[list[int], SamplingParams]]:
        nonlocal bad
        number = 0
        for job in jobs:
            try:
                if isinstance(job, LineError):
                    raise job
                ready = check(llm, job, args)
            except LineError as error:
                bad += 1
                bar.update()
                tqdm.write(f"batch_generate.py: {error}", file=sys.stderr)
                continue
            if answers is not None and answers.has(ready.job):
                bar.update()
                continue
            waiting[number] = ready.job
            number += 1
            yield ready.ids, ready.params

    def on_tokens(_: int, tokens: list[int]) -> None:
        nonlocal new
        new += len(tokens)
        share = f", {totals.accepted / totals.drafted:.0%} of drafts accepted" if totals.drafted else ""
        bar.set_postfix_str(f"{new / (llm.engine.seconds_without_compile() - began):,.0f} tokens/s{share}")

    for number, output in llm.generate_iter(usable(), on_tokens=on_tokens):
        job = waiting.pop(number)
        totals.add(output)
        if answers is not None:
            answers.write(job.line, row(job, output))
        else:
            ready_text[number] = readable(job, output)
            while shown in ready_text:
                tqdm.write(ready_text.pop(shown))
                shown += 1
        bar.update()
    return totals, bad


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="batch_generate.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, metavar="PATH", help="checkpoint: Hugging Face, Orbax or GGUF (default: embedded)")
    prompts = TINY / "prompts.jsonl"
    add("--input", type=Path, metavar="FILE", default=prompts, help="JSON lines, or .txt with a prompt a line")
    add("--output", type=Path, metavar="FILE", help="JSON lines (default: readable text on the terminal)")
    add("--overwrite", action="store_true", help="replace --output if it exists")
    add("--resume", action="store_true", help="go on with the answers that an interrupted run left in OUTPUT.part")
    add(
        "--draft",
        type=int,
        default=3,
        metavar="K",
        help=f"tokens drafted a round, 0...{MAX_SPECULATIVE_TOKENS}; the text stays",
    )
    add("--mtp-prompt", type=int, metavar="N", help="let the MTP head read the last N tokens of a prompt only")
    add("--max-tokens", type=int, default=128, metavar="N", help="new tokens of a prompt at most, unless its line says")
    add(
        "--advised",
        action="store_true",
        help="sample as the checkpoint's generation_config.json says, but for what follows",
    )
    add("--temperature", type=float, metavar="T", help="0, unless told, is greedy")
    add("--top-k", type=int, metavar="K", help="sample from the K most probable tokens (0: all)")
    add("--top-p", type=float, metavar="P", help="... the fewest tokens of probability P together (1: all)")
    add("--min-p", type=float, metavar="P", help="... tokens P times as probable as the first (0: all)")
    add("--presence-penalty", type=float, metavar="P", help="off the logit of tokens already generated")
    add("--frequency-penalty", type=float, metavar="P", help="... once for each time")
    add("--repetition-penalty", type=float, metavar="P", help="divides logits of all tokens before (1: none)")
    add("--seed", type=int, default=0, help="line n gets seed + n - 1, unless it says")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of computing")
    add(
        "--weights",
        choices=WEIGHTS,
        help="matrices quantised on load, or packed as in a GGUF file (default: the fastest)",
    )
    add("--max-len", type=int, default=2048, metavar="N", help="prompt and new tokens of a sequence at most")
    add("--batch", type=int, default=8, metavar="N", help="sequences side by side")
    add("--admit", type=int, metavar="N", help="prompts read together as sequences end (default: a quarter of --batch)")
    add("--limit", type=int, metavar="N", help="only the first N lines")
    add("--stop-token-ids", type=int, nargs="+", default=[], metavar="ID", help="beside those of the checkpoint")
    add("--ignore-eos", action="store_true", help="generate past the end-of-text tokens of the checkpoint")
    args = parser.parse_args(argv)
    if args.resume and not args.output:
        parser.error("--resume goes on with the answers of an --output, and there is none")
    for name, low in (("batch", 1), ("admit", 1), ("limit", 1), ("max_tokens", 0)):
        if (value := getattr(args, name)) is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least {low}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    began = time.perf_counter()
    answers = None
    try:
        lines = count_lines(args.input)
        settings = {name: value for name, value in vars(args).items() if name not in FREE}
        settings["model"] = str(args.model.resolve()) if args.model else None
        how = {"overwrite": args.overwrite, "resume": args.resume}
        answers = Answers(args.output, settings, **how) if args.output else None
        if lines is not None:
            lines = min(lines, args.limit or lines)
        # A batch wider than the job would only compute idle rows.
        batch = args.batch if lines is None else max(1, min(args.batch, lines))
        llm = LLM(
            args.model,
            num_speculative_tokens=args.draft,
            mtp_prompt_tokens=args.mtp_prompt,
            dtype=args.dtype,
            quantization=args.weights,
            max_model_len=args.max_len,
            max_num_seqs=batch,
            max_prefill_seqs=args.admit and min(args.admit, batch),
        )
    except (ValueError, OSError) as error:  # CheckpointError and ConfigError are ValueErrors
        if answers is not None:
            answers.discard()
        print(f"batch_generate.py: {error}", file=sys.stderr)
        return 2
    try:
        with tqdm(total=lines, unit="prompt", disable=None, leave=False) as bar:
            totals, bad = run(llm, islice(read_jobs(args.input), args.limit), args, answers, bar)
        if answers is not None:
            answers.finish()
    except BaseException as error:
        if answers is not None:
            answers.close()
            print(f"batch_generate.py: stopped; {len(answers):,} answers are in {answers.part}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, ResumeError):
            print(f"batch_generate.py: {error}", file=sys.stderr)
            return 2
        raise
    print(totals.summary(llm.engine, time.perf_counter() - began))
    if args.output:
        print(f"answers  {args.output}")
    if bad:
        print(f"batch_generate.py: {bad:,} lines of {args.input} were left out, see above", file=sys.stderr)
    return int(bad > 0)
