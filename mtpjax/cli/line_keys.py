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
    "n",
    "stop",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
)
# Others that are arguments of `SamplingParams` as they stand.
LINE_ONLY_OPTIONS = (
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "detokenize",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "num_speculative_tokens",
)
# A constraint on the text, under the names that services have for it; the last four are vLLM's older ones.
STRUCTURE_KEYS = (
    "structured_outputs",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
SAMPLING_KEYS = (*LINE_OPTIONS, *LINE_ONLY_OPTIONS, *STRUCTURE_KEYS, "max_completion_tokens", "top_logprobs")
# Variables of chat templates that services take beside the messages.
TEMPLATE_KEYS = ("enable_thinking", "preserve_thinking", "reasoning_effort")
CHAT_KEYS = ("messages", "tools", "tool_choice", "chat_template_kwargs", *TEMPLATE_KEYS)
# Keys of services that are not supported, and their values that ask for nothing. None asks for nothing either.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
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
    """Return the arguments of `SamplingParams` that a line gives.

    `max_completion_tokens` is `max_tokens`. "logprobs": true with "top_logprobs": k, as OpenAI's chat has them, is
    `logprobs=k`.

    Raises:
        ValueError: keys contradict each other, or have another type where `SamplingParams` would not see it.
    """
    options = {key: row[key] for key in (*LINE_OPTIONS, *LINE_ONLY_OPTIONS) if row.get(key) is not None}
    if (limit := row.get("max_completion_tokens")) is not None:
        if options.setdefault("max_tokens", limit) != limit:
            raise ValueError("has 'max_tokens' and 'max_completion_tokens', which differ; give one of them")
    for key in ("stop_token_ids", "allowed_token_ids", "bad_words"):
        if not isinstance(options.get(key, []), list):
            raise ValueError(f"has {key!r} of type {type(options[key]).__name__}, expected a list")
    for key in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
        if not isinstance(options.get(key, False), bool):
            raise ValueError(f"has {key!r} that is neither true nor false")
    if (bias := options.get("logit_bias")) is not None:
        options["logit_bias"] = _logit_bias(bias)
    logprobs, top = options.get("logprobs"), row.get("top_logprobs")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int)):
        raise ValueError(f"has 'top_logprobs' of type {type(top).__name__}, expected a whole number")
    if isinstance(logprobs, bool):
        del options["logprobs"]
        if logprobs:
            options["logprobs"] = top or 0
    if top and not logprobs:
        raise ValueError("has 'top_logprobs' without \"logprobs\": true")
    structure = structure_of(row)
    return options if structure is None else options | {"structured_outputs": structure}


def _logit_bias(bias: Any) -> dict[int, Any]:
    """The bias by token id: keys of JSON objects are texts."""
    if not isinstance(bias, dict):
        raise ValueError(f"has a 'logit_bias' of type {type(bias).__name__}, expected an object")
    try:
        ids = [int(key) for key in bias]
    except ValueError as error:
        raise ValueError(f"has a 'logit_bias' whose keys are not token ids: {error}") from None
    if len(set(ids)) < len(ids):
        raise ValueError("has a 'logit_bias' that names a token id twice")
    return dict(zip(ids, bias.values(), strict=True))


def structure_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of `StructuredOutputs` that a line gives, or None if its text is free.

    Raises:
        ValueError: the line asks for several, or for one of an unknown kind.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in STRUCTURE_KEYS:
        value = row.get(key)
        if value is None:
            continue
        if key.startswith("guided_"):
            found[key] = {key.removeprefix("guided_"): value}
        elif not isinstance(value, dict):
            raise ValueError(f"has {key!r} of type {type(value).__name__}, expected an object")
        elif key == "structured_outputs":
            if given := {kind: one for kind, one in value.items() if one is not None}:
                found[key] = given
        elif (constraint := _response_format(value)) is not None:
            found[key] = constraint
    if len(found) > 1:
        raise ValueError(f"has {' and '.join(map(repr, found))}, which both constrain the text; give one of them")
    return next(iter(found.values()), None)


def _response_format(value: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        schema = value.get("json_schema")
        if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
            return {"json": schema["schema"]}
        raise ValueError("has a 'response_format' of type 'json_schema' without an object 'json_schema.schema'")
    raise ValueError(f"has a 'response_format' of type {kind!r:.100}, expected 'text', 'json_object' or 'json_schema'")


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
