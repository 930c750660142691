"""`MtpjaxLM`: evaluate a checkpoint with EleutherAI's lm-eval, under the model name "mtpjax".

Importing this module registers the name; it needs `pip install 'mtpjax[eval]'`:

    import lm_eval, mtpjax.lm_eval_adapter
    lm_eval.simple_evaluate(model="mtpjax", model_args="model=PATH,max_model_len=4096", tasks=["hellaswag"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mtpjax.llm import LLM
from mtpjax.sampling_params import SamplingParams

_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
MAX_GEN_TOKS = 256  # new tokens where a task says nothing


@register_model("mtpjax")
class MtpjaxLM(TemplateLM):
    """An `LLM` as lm-eval wants it.

    Args:
        model: as for `LLM`, or a ready `LLM`.
        batch_size: sequences that are read or generated together, `max_num_seqs` of the `LLM`; "auto" or None: the
            default.
        max_gen_toks: new tokens at most where a task does not say.
        prefix_token_id: the token before a text that has no context; None: the checkpoint's end-of-text token.
        device, max_batch_size: arguments that lm-eval gives every model; they change nothing.
        options: other arguments of `LLM`.

    Raises:
        ValueError: the checkpoint has no tokenizer, or no end-of-text token and no `prefix_token_id` is given.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        batch_size: int | str | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        prefix_token_id: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        if batch_size is not None and str(batch_size).isdigit():
            options.setdefault("max_num_seqs", int(batch_size))
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        if self.llm.tokenizer is None:
            raise ValueError(f"{model}: lm-eval gives texts, but the checkpoint has no tokenizer; give tokenizer=")
        self.max_gen_toks = max_gen_toks
        ends = [prefix_token_id, self.llm.tokenizer.eos_token_id, *self.llm.stop_token_ids]
        known = [token for token in ends if token is not None]
        if not known:
            raise ValueError(f"{model}: the checkpoint names no end-of-text token; give prefix_token_id=")
        self._prefix_token_id = known[0]

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without context."""
        return self._prefix_token_id

    @property
    def max_length(self) -> int:
        """Tokens of a sequence at most."""
        return self.llm.max_model_len

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer, by which lm-eval keeps requests apart."""
        return self._tokenizer.sha256

    @property
    def _tokenizer(self) -> Any:
        return self.llm.tokenizer

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the text of the checkpoint's chat template; empty if it has none or `chat_template` is False."""
        own = self._tokenizer.chat_template
        return own.text if own is not None and chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation; see `LLM.chat_prompt`."""
        return self.llm.chat_prompt(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text. Qwen's tokenizers add no special tokens."""
        return list(self._tokenizer.encode(string))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations. The beginning of a context that does not fit into `max_length` is left out."""
        contexts, continuations = [], []
        for _, context, continuation in requests:
            room = self.max_length - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, which leaves no context in max_model_len = "
                    f"{self.max_length}; raise it"
                )
            contexts.append(context[-room:])
            continuations.append(continuation)
        scores = self.llm.score(contexts, continuations)
        assert isinstance(scores, list)
        results = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in windows of `max_length` tokens that share as few as they can."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
            for context, continuation in map(make_disjoint_window, found):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate until one of the strings `until`, which is left out, or an end-of-text token.

        The beginning of a context that leaves no room for the new tokens is left out.

        Raises:
            ValueError: an option of a task that is not supported.
        """
        prompts, params, stops = [], [], []
        for request in requests:
            context, options = request.args
            sampling, until = self._sampling(dict(options))
            room = max(self.max_length - (sampling.max_tokens or 0), 1)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prompts.append(ids[-room:])
            params.append(sampling)
            stops.append(until)
        texts = []
        for request, output, until in zip(requests, self.llm.generate(prompts, params), stops, strict=True):
            texts.append(_cut(output.text or "", until))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _sampling(self, options: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
        """Return the sampling parameters and the stop strings of a task's `generation_kwargs`."""
        until = options.pop("until", None) or []
        numbers = [options.pop(name) for name in _MAX_TOKENS_NAMES if name in options]
        max_tokens = min(int(numbers[0]) if numbers else self.max_gen_toks, self.max_length - 1)
        sampled = options.pop("do_sample", None)
        chosen: dict[str, Any] = {name: options.pop(name) for name in _SAMPLING_NAMES if name in options}
        if options:
            raise ValueError(
                f"generation_kwargs has {sorted(options)}; supported: until, do_sample, "
                f"{', '.join(_MAX_TOKENS_NAMES + _SAMPLING_NAMES)}"
            )
        if sampled is False:
            chosen["temperature"] = 0.0
        elif sampled:
            chosen.setdefault("temperature", 1.0)
        until = [until] if isinstance(until, str) else list(until)
        return SamplingParams(max_tokens=max_tokens, **chosen), [stop for stop in until if stop]


def _cut(text: str, stops: Sequence[str]) -> str:
    """Return the text up to the first of the stop strings."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
