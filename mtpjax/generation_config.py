"""What a checkpoint's `generation_config.json` recommends, and which of its keys have no effect here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from checkpoints.known_keys import warn_of_unknown_keys

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
WHOLE = ("top_k", "max_new_tokens")
USED = (*PENALTIES, *SAMPLING, "max_new_tokens", "do_sample", "eos_token_id")

_TOKENS = "the tokenizer and the template say it"
_PROGRAM = "how transformers runs the model, not what it computes"
_DRAFTS = "of other ways to draft; the text does not depend on them"
_OUTPUTS = "says what transformers returns, not what it computes"
HARMLESS: Mapping[str, str] = {
    "transformers_version": "says who wrote the file",
    "_from_model_config": "says who wrote the file",
    "_commit_hash": "says who wrote the file",
    "max_length": "counts the prompt too; max_model_len is the limit here",
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), _TOKENS),
    **dict.fromkeys(
        (
            "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
            "continuous_batching_config", "low_memory", "prefill_chunk_size", "trust_remote_code",
        ),
        _PROGRAM,
    ),
    **dict.fromkeys(
        (
            "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
            "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
            "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
            "speculation_type",
        ),
        _DRAFTS,
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        _OUTPUTS,
    ),
}  # fmt: skip
# Keys that would change the text -> the values with which they do not. transformers writes many of these.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "length_penalty": (0, 1),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False, True),
    "renormalize_logits": (False, True),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (1,),
    "typical_p": (1,),
}


def recommended_sampling(raw: Mapping[str, Any], overridden: Collection[str] = ()) -> dict[str, Any]:
    """Return the recommended arguments of `SamplingParams`.

    As in vLLM, a temperature counts without `do_sample`, `"do_sample": false` is greedy, and `max_new_tokens` is
    `max_tokens`. A null counts as absent, a text such as "0.6" as its number, a float that is whole as a whole number.
    A `top_p` of 0 keeps the most probable token alone, as in transformers and llama.cpp.

    Args:
        raw: the content of the file.
        overridden: arguments whose recommendation does not matter.

    Raises:
        ValueError: a value that is no number.
    """
    names = PENALTIES + (SAMPLING if _is_true(raw.get("do_sample", True)) else ()) + ("max_new_tokens",)
    found: dict[str, Any] = {}
    for name in names:
        argument = "max_tokens" if name == "max_new_tokens" else name
        if raw.get(name) is not None and argument not in overridden:
            found[argument] = _number(name, raw[name], whole=name in WHOLE)
    if found.get("top_p") == 0:
        del found["top_p"]
        found |= {} if "top_k" in overridden else {"top_k": 1}
    return found


def recommended_stop_token_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the end-of-text tokens of the file, which has one or a list of them, or none.

    Raises:
        ValueError: a value that is no token id.
    """
    eos = raw.get("eos_token_id")
    ids = list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    numbers = [_number("eos_token_id", token, whole=True) for token in ids]
    for number in numbers:
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"generation_config.json: eos_token_id is {eos!r}; expected token ids >= 0")
    return tuple(numbers)


def warn_of_unused_settings(raw: Mapping[str, Any], source: str) -> None:
    """Warn once about all keys of the file that have no effect and are not known to be harmless.

    Args:
        source: the file that the warning names.

    Warns:
        CheckpointWarning: there are such keys.
    """
    keys = [key for key, value in raw.items() if value is not None and value not in NEUTRAL.get(key, ())]
    warn_of_unknown_keys(f"{source} has", keys, USED, HARMLESS, stacklevel=4)


def _is_true(value: object) -> bool:
    return value.strip().lower() != "false" if isinstance(value, str) else value is None or bool(value)


def _number(name: str, value: object, *, whole: bool) -> Any:
    """Return a number; a whole float is one where `whole` ones are expected."""
    number: Any = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"generation_config.json: {name} is {value!r}; expected a number")
    return int(number) if whole and isinstance(number, float) and number.is_integer() else number
