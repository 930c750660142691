"""Generate text for a file of prompts; without arguments, the embedded model on the embedded prompts.

    mtpjax generate [--model PATH] [--input prompts.jsonl] [--output answers.jsonl]

A line of the input is a JSON object, for example {"id": "a", "prompt": "Once"}. The prompt is a text or a list of token
ids. "messages": [{"role": "user", "content": "Hello"}] in place of "prompt" goes through the chat template, with the
line's own "tools" and "chat_template_kwargs". A line may give its own "max_tokens" (or "max_completion_tokens"),
"temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
"stop_token_ids" and "ignore_eos". Lines of OpenAI's batch files ("custom_id", "method", "url", "body") are read and
answered in OpenAI's form. In a .txt file each line is a prompt. Parquet and CSV files (.parquet, .csv, with pyarrow)
have these keys as columns.

A line of the output has "id", "prompt", "text", "token_ids", "finish_reason", "stop_reason" and "metrics", in the order
of the input; that of a conversation has "reasoning", "content", "tool_calls" and "unfinished_thought", too. While the
job runs, finished answers are in OUTPUT.part. After an interruption, the same command with --resume continues there and
ends with the same texts. A line that cannot be used, for example because it has an unknown key, is reported; its line
of the output has the "error", and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from mtpjax import LLM, SamplingParams, StructuredOutputs
from mtpjax.cli.generate_options import OUTPUT_INDEPENDENT, PROG, parse_options
from mtpjax.cli.jsonl import LineError, PromptLine, count_lines, read_prompt_lines
from mtpjax.cli.line_keys import LINE_OPTIONS
from mtpjax.cli.output_rows import output_row
from mtpjax.cli.progress import JobProgress
from mtpjax.cli.report import JobTotals, format_answer
from mtpjax.cli.resumable_output import ResumableJsonl, ResumeError
from mtpjax.loading.open_model import resolve_dtype


@dataclass(frozen=True)
class ValidatedLine:
    """A line whose prompt and options are valid. A conversation has become its prompt."""

    line: PromptLine
    token_ids: list[int]
    params: SamplingParams


def validate(llm: LLM, line: PromptLine, args: argparse.Namespace) -> ValidatedLine:
    """Check one line as `LLM.generate` would. Its seed depends on its line number, not on other lines.

    Raises:
        LineError: `generate` would refuse the line; the message names it.
    """
    options = {name: value for name in LINE_OPTIONS if (value := getattr(args, name)) is not None}
    options |= {"stop_token_ids": tuple(args.stop_token_ids), "ignore_eos": args.ignore_eos}
    options |= {"seed": args.seed + line.line - 1} | line.options
    structure = options.pop("structured_outputs", args.structured_outputs)
    try:
        if structure is not None:
            options["structured_outputs"] = StructuredOutputs(**structure)
        if line.messages is not None:
            tools = args.tools if line.tools is None else line.tools
            prompt = llm.chat_prompt(
                line.messages,
                tools=tools,
                chat_template=args.chat_template,
                chat_template_kwargs={**args.chat_template_kwargs, **line.chat_template_kwargs},
            )
            line = replace(line, prompt=prompt, tools=tools)
        recommended = args.recommended_sampling
        params = llm.get_default_sampling_params(**options) if recommended else SamplingParams(**options)
        return ValidatedLine(line, llm.encode(line.prompt, params), params)
    except (ValueError, TypeError) as error:  # TypeError: a kind of constraint that does not exist
        raise line.error(str(error)) from None


def run(
    llm: LLM,
    lines: Iterable[PromptLine | LineError],
    args: argparse.Namespace,
    answers: ResumableJsonl | None,
    progress: JobProgress,
) -> JobTotals:
    """Answer all lines. Returns the totals."""
    totals, num_new, start = JobTotals(), 0, llm.engine.seconds_without_compile()
    unanswered: dict[int, ValidatedLine] = {}
    formatted: dict[int, str] = {}  # answers for the terminal that wait for an earlier one
    num_shown = 0

    def valid_requests() -> Iterator[tuple[list[int], SamplingParams]]:
        index = 0
        for line in lines:
            try:
                if isinstance(line, LineError):
                    raise line
                request = validate(llm, line, args)
            except LineError as error:
                totals.num_errors += 1
                progress.advance()
                progress.warn(f"{PROG}: {error}")
                if answers is not None:
                    answers.write(error.line, error.row)
                continue
            if answers is not None and answers.has(request.line):
                progress.advance()
                continue
            unanswered[index] = request
            index += 1
            yield request.token_ids, request.params

    def on_tokens(_: int, token_ids: list[int]) -> None:
        nonlocal num_new
        num_new += len(token_ids)
        figures = f"{num_new / (llm.engine.seconds_without_compile() - start):,.0f} tokens/s"
        if totals.num_draft_tokens:
            figures += f", {totals.num_accepted_tokens / totals.num_draft_tokens:.0%} of drafts accepted"
        if totals.num_steps:
            figures += f", slots {totals.num_steps / llm.engine.slot_steps:.0%} busy"
        progress.show(figures)

    for index, output in llm.generate_iter(valid_requests(), on_tokens=on_tokens):
        request = unanswered.pop(index)
        line = request.line
        output = output.with_tools(line.tools)
        totals.add(output)
        if answers is not None:
            model = args.model.name if args.model else "embedded"
            answers.write(line.line, output_row(line, output, model, request.params.logprobs or 0))
        else:
            formatted[index] = format_answer(line, output)
            while num_shown in formatted:
                progress.write(formatted.pop(num_shown))
                num_shown += 1
        progress.advance()
    return totals


def selected_lines(args: argparse.Namespace) -> Iterator[PromptLine | LineError]:
    """Read the lines of this job: the first `--limit` of the input, and of those the ones of `--shard`."""
    for position, line in enumerate(islice(read_prompt_lines(args.input), args.limit)):
        if args.shard is None or position % args.shard[1] == args.shard[0] - 1:
            yield line


def count_selected(args: argparse.Namespace) -> int | None:
    """Return how many lines `selected_lines` gives; None if that cannot be known before they are read."""
    num_lines = count_lines(args.input)
    if num_lines is None:
        return None
    num_lines = min(num_lines, args.limit or num_lines)
    return num_lines if args.shard is None else len(range(args.shard[0] - 1, num_lines, args.shard[1]))


def main(argv: list[str] | None = None) -> int:
    """Run `mtpjax generate`.

    Returns:
        the exit status: 0; 1 if lines have errors; 2 if the job could not start or continue; 130 if it was
        interrupted.
    """
    args = parse_options(argv, __doc__)
    start = time.perf_counter()
    answers = None
    try:
        num_lines = count_selected(args)
        settings = {name: value for name, value in vars(args).items() if name not in OUTPUT_INDEPENDENT}
        settings["model"] = str(args.model.resolve()) if args.model else None
        settings["dtype"] = resolve_dtype(args.dtype, None).name
        if args.output:
            answers = ResumableJsonl(args.output, settings, overwrite=args.overwrite, resume=args.resume)
        # More slots than lines would only compute padding.
        max_num_seqs = args.max_num_seqs if num_lines is None else max(1, min(args.max_num_seqs, num_lines))
        llm = LLM(
            args.model,
            num_speculative_tokens=args.num_speculative_tokens,
            mtp=args.mtp,
            mtp_prompt_tokens=args.mtp_prompt_tokens,
            draft_vocab_size=args.draft_vocab_size,
            dtype=args.dtype,
            quantization=args.quantization,
            hf_overrides=args.hf_overrides,
            max_model_len=args.max_model_len,
            max_num_seqs=max_num_seqs,
            max_prefill_seqs=args.max_prefill_seqs and min(args.max_prefill_seqs, max_num_seqs),
            acceptance=args.acceptance,
            logprobs_mode=args.logprobs_mode,
            max_logprobs=args.max_logprobs,
            prefix_cache_gb=args.prefix_cache_gb,
            prefix_cache_dir=args.prefix_cache,
        )
    except (ValueError, OSError) as error:  # CheckpointError and ConfigError are ValueErrors
        if answers is not None:
            answers.discard()
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    try:
        with JobProgress(num_lines) as progress:
            totals = run(llm, selected_lines(args), args, answers, progress)
        if answers is not None:
            answers.finish()
    except BaseException as error:
        if answers is not None:
            answers.close()
            print(f"{PROG}: stopped; {len(answers):,} answers are in {answers.part}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, ResumeError):
            print(f"{PROG}: {error}", file=sys.stderr)
            return 2
        raise
    seconds = time.perf_counter() - start
    print(totals.summary(llm.engine, seconds))
    if args.summary:
        args.summary.write_text(json.dumps(totals.figures(llm.engine, seconds), indent=1) + "\n", encoding="utf-8")
    if args.output:
        print(f"answers  {args.output}")
    if totals.num_errors:
        print(f"{PROG}: {totals.num_errors:,} line(s) of {args.input} have errors, see above", file=sys.stderr)
    return int(totals.num_errors > 0)
