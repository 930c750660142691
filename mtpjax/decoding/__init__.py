"""From the model to tokens: prefill, the draft-verify loop, sampling, penalties and acceptance."""
