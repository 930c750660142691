"""Text generation with Qwen3.5 / Qwen3.6 checkpoints and their own Multi-Token-Prediction head, in JAX."""

import gc

_collects = gc.isenabled()
gc.disable()  # else Python walks the 10^5 objects of JAX, flax and this package again and again as they are made
try:
    from mtpjax.async_llm import AsyncLLM
    from mtpjax.decoding.acceptance import SimulatedAcceptance
    from mtpjax.llm import LLM
    from mtpjax.logprobs import Logprob
    from mtpjax.outputs import CompletionOutput, Metrics, RequestOutput
    from mtpjax.sampling_params import SamplingParams
    from mtpjax.score import Score
    from mtpjax.streaming import StreamedText, StreamOutput
    from mtpjax.text.structured_outputs import StructuredOutputs
    from mtpjax.text_params import RequestOutputKind
finally:
    if _collects:
        gc.enable()

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Logprob",
    "Metrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Score",
    "SimulatedAcceptance",
    "StreamOutput",
    "StreamedText",
    "StructuredOutputs",
]
