"""`LLM.logits` and `LLM.hidden_states`: what the model computes for one sequence, for research."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mtpjax.decoding.output_rows import OutputRows
from mtpjax.engine.engine import Engine
from mtpjax.text.prompts import Prompt


class ForwardMethods:
    """The methods of `LLM` that run the model without generating."""

    engine: Engine
    max_model_len: int
    _token_ids: Callable[[str, Prompt, int], tuple[int, ...]]

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits after every token of one sequence, float32 `[T, V]`."""
        ids = self._token_ids("token_ids", token_ids, self.max_model_len)
        _, _, chunks = self.engine.runner.prefill([ids], OutputRows.all(), return_logits=True)
        return np.concatenate(chunks, axis=1)[0, -len(ids) :]

    def hidden_states(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the hidden states of one sequence after the final norm, `[T, D]` in the compute dtype.

        The LM head and the MTP head read them.
        """
        return self.engine.runner.hidden_states(self._token_ids("token_ids", token_ids, self.max_model_len))
