"""Text generation with Qwen3.5 / Qwen3.6 checkpoints and their own Multi-Token-Prediction head, in JAX."""

from mtpjax.decoding.acceptance import SimulatedAcceptance
from mtpjax.llm import LLM
from mtpjax.outputs import CompletionOutput, Metrics, RequestOutput
from mtpjax.sampling_params import SamplingParams
from mtpjax.text.structured_outputs import StructuredOutputs

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "Metrics",
    "RequestOutput",
    "SamplingParams",
    "SimulatedAcceptance",
    "StructuredOutputs",
]
