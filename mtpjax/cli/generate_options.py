"""The options of `mtpjax generate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from checkpoints import TINY
from mtpjax.llm import MAX_SPECULATIVE_TOKENS
from mtpjax.loading.open_model import DTYPES
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
    "prefix_cache",
    "prefix_cache_gb",
    "summary",
}


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


def _number_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'auto'") from None


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, for example 2/8")
    return int(number), int(count)


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


def parse_options(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """Parse the command line; an option that cannot be is an error that ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="PATH", help="checkpoint: Hugging Face, Orbax or GGUF (default: embedded)")
    add("--input", type=Path, metavar="FILE", default=TINY / "prompts.jsonl", help="JSON lines, or .txt")
    add("--output", type=Path, metavar="FILE", help="JSON lines (default: readable text on the terminal)")
    add("--overwrite", action="store_true", help="replace --output if it exists")
    add("--resume", action="store_true", help="continue an interrupted run from OUTPUT.part")
    add("--summary", type=Path, metavar="FILE", help="write the figures of the job to this file, as JSON")
    shard = "answer only each N-th line, from line I on: N jobs share one input, and each has an output of its own"
    add("--shard", type=_shard, metavar="I/N", help=shard)
    draft_help = f"tokens drafted a round, 0...{MAX_SPECULATIVE_TOKENS}, or auto (default 3); same text with any"
    add("--num-speculative-tokens", type=_number_or_auto, default=3, metavar="K", help=draft_help)
    rule = (
        "rejection: the classical rule; texts then depend on the drafts, their distribution does not (default: coupled)"
    )
    add("--acceptance", choices=("coupled", "rejection"), default="coupled", help=rule)
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
    add("--n", type=int, metavar="N", help="samples of each prompt (default 1)")
    add("--stop", nargs="+", metavar="TEXT", help="texts that end an answer, and are not part of it")
    add("--min-tokens", type=int, metavar="N", help="no end of the text before so many new tokens")
    structure = 'a constraint on all texts: {"json": SCHEMA}, {"regex": "..."}, {"choice": ["a", "b"]}'
    add("--structured-outputs", type=_json_object, metavar="JSON", help=structure)
    add("--logprobs", type=int, metavar="K", help="log-probabilities of each new token and the K most probable ones")
    add("--prompt-logprobs", type=int, metavar="K", help="the same for the tokens of the prompt")
    modes = "of the model, or after all settings of sampling (default raw_logprobs)"
    add("--logprobs-mode", choices=("raw_logprobs", "processed_logprobs"), default="raw_logprobs", help=modes)
    add("--max-logprobs", type=int, default=20, metavar="K", help="most that a line may ask for (default 20)")
    prefixes = "keep what was read of common beginnings of prompts in this folder, for the next job"
    add("--prefix-cache", type=Path, metavar="DIR", help=prefixes)
    add("--prefix-cache-gb", type=float, metavar="GB", help="memory for common beginnings of prompts (0: none)")
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
