"""Text generation with Qwen3.5 / Qwen3.6 checkpoints and their own Multi-Token-Prediction head, in JAX."""

from mtpjax.async_llm import AsyncLLM
from mtpjax.decoding.acceptance import SimulatedAcceptance
from mtpjax.llm import LLM
from mtpjax.outputs import CompletionOutput, Metrics, RequestOutput
from mtpjax.sampling_params import SamplingParams
from mtpjax.streaming import StreamedText, StreamOutput
from mtpjax.text_params import RequestOutputKind

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Metrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SimulatedAcceptance",
    "StreamOutput",
    "StreamedText",
]
