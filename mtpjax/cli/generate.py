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
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoints import TINY
from mtpjax import LLM, RequestOutput, SamplingParams
from mtpjax.cli.jsonl import LineError, PromptLine, count_lines, read_prompt_lines
from mtpjax.cli.line_keys import LINE_OPTIONS
from mtpjax.cli.openai_batch import response_row
from mtpjax.cli.report import JobTotals, format_answer
from mtpjax.cli.resumable_output import ResumableJsonl, ResumeError
from mtpjax.llm import MAX_SPECULATIVE_TOKENS
from mtpjax.loading.open_model import DTYPES, resolve_dtype
from mtpjax.loading.quantized_leaves import QUANTIZATIONS
from mtpjax.text.chat_template import check_tools

PROG = "mtpjax generate"
# Options that the texts do not depend on: an interrupted job may continue with others.
OUTPUT_INDEPENDENT = {
    "input",
    "output",
    "overwrite",
    "resume",
    "limit",
    "num_speculative_tokens",
    "mtp",
    "mtp_prompt_tokens",
    "draft_vocab_size",
    "max_num_seqs",
    "max_prefill_seqs",
}


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
    try:
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
    except ValueError as error:
        raise line.error(str(error)) from None


def output_row(line: PromptLine, output: RequestOutput, model: str) -> dict[str, object]:
    """Return an answer as a line of the output; `model` is the name of the checkpoint."""
    if line.url is not None:
        return response_row(line.request_id, line.id, line.url, line.model or model, output)
    completion = output.outputs[0]
    parts: dict[str, object] = {}
    if line.messages is not None:
        parts = {
            "reasoning": completion.reasoning,
            "content": completion.content,
            "tool_calls": [call.to_openai() for call in completion.tool_calls],
            "unfinished_thought": completion.unfinished_thought,
        }
    return {
        "id": line.id,
        "prompt": line.prompt,
        "text": completion.text,
        **parts,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "metrics": asdict(output.metrics),
    }


def run(
    llm: LLM,
    lines: Iterable[PromptLine | LineError],
    args: argparse.Namespace,
    answers: ResumableJsonl | None,
    bar: tqdm[None],
) -> JobTotals:
    """Answer all lines. Returns the totals."""
    totals, num_new, start = JobTotals(), 0, llm.engine.seconds_without_compile()
    unanswered: dict[int, PromptLine] = {}
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
                bar.update()
                tqdm.write(f"{PROG}: {error}", file=sys.stderr)
                if answers is not None:
                    answers.write(error.line, error.row)
                continue
            if answers is not None and answers.has(request.line):
                bar.update()
                continue
            unanswered[index] = request.line
            index += 1
            yield request.token_ids, request.params

    def on_tokens(_: int, token_ids: list[int]) -> None:
        nonlocal num_new
        num_new += len(token_ids)
        share = ""
        if totals.num_draft_tokens:
            share = f", {totals.num_accepted_tokens / totals.num_draft_tokens:.0%} of drafts accepted"
        bar.set_postfix_str(f"{num_new / (llm.engine.seconds_without_compile() - start):,.0f} tokens/s{share}")

    for index, output in llm.generate_iter(valid_requests(), on_tokens=on_tokens):
        line = unanswered.pop(index)
        output = output.with_tools(line.tools)
        totals.add(output)
        if answers is not None:
            answers.write(line.line, output_row(line, output, args.model.name if args.model else "embedded"))
        else:
            formatted[index] = format_answer(line, output)
            while num_shown in formatted:
                tqdm.write(formatted.pop(num_shown))
                num_shown += 1
        bar.update()
    return totals


def _number_or_path(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, for example {{"max_position_embeddings": 4096}}')
    return value


def _tools(file: str) -> list[dict[str, Any]] | None:
    try:
        return check_tools(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file}: {error}") from None


def _text_file(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file}: {error}") from None


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="PATH", help="checkpoint: Hugging Face, Orbax or GGUF (default: embedded)")
    add("--input", type=Path, metavar="FILE", default=TINY / "prompts.jsonl", help="JSON lines, or .txt")
    add("--output", type=Path, metavar="FILE", help="JSON lines (default: readable text on the terminal)")
    add("--overwrite", action="store_true", help="replace --output if it exists")
    add("--resume", action="store_true", help="continue an interrupted run from OUTPUT.part")
    draft_help = f"tokens drafted a round, 0...{MAX_SPECULATIVE_TOKENS} (default 3); the text does not depend on it"
    add("--num-speculative-tokens", type=int, default=3, metavar="K", help=draft_help)
    add("--mtp", type=Path, metavar="PATH", help="GGUF file or folder of the MTP head (default: the checkpoint's own)")
    add("--mtp-prompt-tokens", type=int, metavar="N", help="let the MTP head read only the last N prompt tokens")
    draft_vocab = "draft from the N most frequent tokens, or those of a file (mtpjax count-tokens); same text"
    add("--draft-vocab-size", type=_number_or_path, metavar="N|FILE", help=draft_vocab)
    add("--max-tokens", type=int, default=128, metavar="N", help="new tokens of a prompt at most (default 128)")
    recommended = "sample as the checkpoint's generation_config.json recommends; the options below override it"
    add("--recommended-sampling", action="store_true", help=recommended)
    add("--temperature", type=float, metavar="T", help="0 is greedy, and the default")
    add("--top-k", type=int, metavar="K", help="sample from the K most probable tokens (0: all)")
    add("--top-p", type=float, metavar="P", help="sample from the fewest tokens with probability P together (1: all)")
    add("--min-p", type=float, metavar="P", help="sample from tokens P times as probable as the first (0: all)")
    add("--presence-penalty", type=float, metavar="P", help="subtract from the logits of generated tokens")
    add("--frequency-penalty", type=float, metavar="P", help="the same, once for each occurrence")
    add("--repetition-penalty", type=float, metavar="P", help="divide the logits of all earlier tokens (1: none)")
    add("--seed", type=int, default=0, help="line n gets seed + n - 1 (default 0)")
    dtypes = ("auto", *DTYPES)
    add("--dtype", choices=dtypes, default="auto", help="of computing; auto: bfloat16 on a GPU, float32 on a CPU")
    quantization = "quantise matrices while they are read; packed: keep those of the file (default: the fastest)"
    add("--quantization", choices=QUANTIZATIONS, help=quantization)
    overrides = 'merged over config.json: {"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 4}}}'
    add("--hf-overrides", type=_json_object, metavar="JSON", help=overrides)
    add("--max-model-len", type=int, default=2048, metavar="N", help="prompt and new tokens at most (default 2048)")
    add("--max-num-seqs", type=int, default=8, metavar="N", help="sequences generated at the same time (default 8)")
    prefill = "prompts read together when sequences end (default: a quarter of --max-num-seqs)"
    add("--max-prefill-seqs", type=int, metavar="N", help=prefill)
    add(
        "--tools", type=_tools, metavar="FILE", help="a JSON list of functions that the model may call in conversations"
    )
    add("--chat-template", type=_text_file, metavar="FILE", help="a Jinja template in place of the checkpoint's own")
    kwargs_help = "variables of the chat template, for example '{\"preserve_thinking\": true}'"
    add("--chat-template-kwargs", type=_json_object, default={}, metavar="JSON", help=kwargs_help)
    thinking = 'the same as "enable_thinking" in --chat-template-kwargs (default: as the chat template does)'
    add("--enable-thinking", action=argparse.BooleanOptionalAction, help=thinking)
    add("--limit", type=int, metavar="N", help="read only the first N lines")
    add("--stop-token-ids", type=int, nargs="+", default=[], metavar="ID", help="beside those of the checkpoint")
    add("--ignore-eos", action="store_true", help="generate past the end-of-text tokens of the checkpoint")
    args = parser.parse_args(argv)
    if args.enable_thinking is not None:
        args.chat_template_kwargs = {**args.chat_template_kwargs, "enable_thinking": args.enable_thinking}
    if args.resume and not args.output:
        parser.error("--resume continues an --output, and none was given")
    for name, low in (("max_num_seqs", 1), ("max_prefill_seqs", 1), ("limit", 1), ("max_tokens", 0)):
        if (value := getattr(args, name)) is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least {low}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run `mtpjax generate`.

    Returns:
        the exit status: 0; 1 if lines have errors; 2 if the job could not start or continue; 130 if it was
        interrupted.
    """
    args = _parse(argv)
    start = time.perf_counter()
    answers = None
    try:
        num_lines = count_lines(args.input)
        settings = {name: value for name, value in vars(args).items() if name not in OUTPUT_INDEPENDENT}
        settings["model"] = str(args.model.resolve()) if args.model else None
        settings["dtype"] = resolve_dtype(args.dtype, None).name
        if args.output:
            answers = ResumableJsonl(args.output, settings, overwrite=args.overwrite, resume=args.resume)
        if num_lines is not None:
            num_lines = min(num_lines, args.limit or num_lines)
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
        )
    except (ValueError, OSError) as error:  # CheckpointError and ConfigError are ValueErrors
        if answers is not None:
            answers.discard()
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    try:
        with tqdm(total=num_lines, unit="prompt", disable=None, leave=False) as bar:
            totals = run(llm, islice(read_prompt_lines(args.input), args.limit), args, answers, bar)
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
    print(totals.summary(llm.engine, time.perf_counter() - start))
    if args.output:
        print(f"answers  {args.output}")
    if totals.num_errors:
        print(f"{PROG}: {totals.num_errors:,} line(s) of {args.input} have errors, see above", file=sys.stderr)
    return int(totals.num_errors > 0)
