"""Keys of input lines: each one is used, has its neutral value, or is an error of its line."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

# Sampling parameters that a line may give for itself.
LINE_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)
STOP_OPTIONS = ("stop_token_ids", "ignore_eos")
SAMPLING_KEYS = (*LINE_OPTIONS, *STOP_OPTIONS, "max_completion_tokens")
# Variables of chat templates that services take beside the messages.
TEMPLATE_KEYS = ("enable_thinking", "preserve_thinking", "reasoning_effort")
CHAT_KEYS = ("messages", "tools", "tool_choice", "chat_template_kwargs", *TEMPLATE_KEYS)
# Keys of services that are not supported, and their values that ask for nothing. None asks for nothing either.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stop": ([], ""),
    "stream": (False,),
    "stream_options": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": (),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "include_reasoning": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
}
# Keys of services that need no effect, and why.
HARMLESS = {
    "model": "one model is loaded; its answer repeats the name",
    "user": "a name for the service",
    "metadata": "notes for the service",
    "store": "a setting of the service",
    "service_tier": "a setting of the service",
    "safety_identifier": "a name for the service",
    "prompt_cache_key": "a hint for the service's cache",
    "prompt_cache_retention": "a hint for the service's cache",
}


def check_keys(row: Mapping[str, Any], used: Collection[str], harmless: Mapping[str, str] = {}) -> None:
    """Raise ValueError for a key that is not used and asks for something.

    Args:
        row: names and values; None is no value.
        used: keys that are read.
        harmless: keys that need no effect, and why.
    """
    for key, value in row.items():
        if value is None or key in used or key in harmless:
            continue
        if key not in NEUTRAL:
            alike = get_close_matches(str(key), [*used, *harmless, *NEUTRAL], 1, 0.7)
            hint = f"did you mean {alike[0]!r}?" if alike else f"known: {', '.join(used)}"
            raise ValueError(f"has an unknown key {key!r}; {hint}")
        if json.dumps(value, default=repr) not in {json.dumps(neutral) for neutral in NEUTRAL[key]}:
            allowed = " or ".join(json.dumps(neutral) for neutral in (*NEUTRAL[key], None))
            raise ValueError(
                f"has {key!r} = {json.dumps(value, default=repr)[:200]}, which is not supported; only {allowed} is"
            )


def sampling_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `SamplingParams` that a line gives; `max_completion_tokens` is `max_tokens`.

    Raises:
        ValueError: the two differ, or `stop_token_ids` is not a list.
    """
    options = {key: row[key] for key in (*LINE_OPTIONS, *STOP_OPTIONS) if row.get(key) is not None}
    if (limit := row.get("max_completion_tokens")) is not None:
        if options.setdefault("max_tokens", limit) != limit:
            raise ValueError("has 'max_tokens' and 'max_completion_tokens', which differ; give one of them")
    if not isinstance(options.get("stop_token_ids", []), list):
        raise ValueError("has 'stop_token_ids' that are not a list")
    if not isinstance(options.get("ignore_eos", False), bool):
        raise ValueError("has 'ignore_eos' that is neither true nor false")
    return options


def chat_options(row: Mapping[str, Any]) -> tuple[list[Any] | None, dict[str, Any]]:
    """Return the tools and the variables of the chat template that a line gives.

    Raises:
        ValueError: one of them has another type, or the model is to be forced to call a tool.
    """
    tools, choice = row.get("tools"), row.get("tool_choice")
    if choice not in (None, "auto", "none"):
        found = json.dumps(choice, default=repr)[:200]
        raise ValueError(f"has 'tool_choice' = {found}, which is not supported; 'auto' and 'none' are")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"has 'tools' of type {type(tools).__name__}, expected a list")
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"has 'chat_template_kwargs' of type {type(kwargs).__name__}, expected an object")
    given = {key: row[key] for key in TEMPLATE_KEYS if row.get(key) is not None}
    return [] if choice == "none" else tools, {**given, **(kwargs or {})}
