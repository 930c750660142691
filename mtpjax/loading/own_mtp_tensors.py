"""The embedding and the LM head of an MTP head that does not share those of the trunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints import CheckpointError, TensorSource
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.quantized_leaves import can_quantize, can_share_layout, read_quantized, stack_quantized
from mtpjax.loading.weight_map import OWN_MTP_TENSORS
from mtpjax.model.model import DraftHead
from mtpjax.model.params import Dense

__all__ = ["OWN_MTP_TENSORS", "with_own_mtp_tensors"]


def with_own_mtp_tensors(model: LoadedModel, source: TensorSource, quantization: str | None) -> LoadedModel:
    """Return the model with the MTP head's own embedding and LM head, where the checkpoint has them.

    The LM head becomes the draft head of all tokens.

    Raises:
        CheckpointError: one of them has another shape than that of the trunk.
    """
    embedding, head = (name if name in source.tensors else None for name in OWN_MTP_TENSORS)
    if embedding is None and head is None:
        return model
    merged: Any = nnx.merge(model.graph, model.params)
    if embedding is not None:
        merged.mtp_embedding = nnx.data(Dense(_read(model, source, embedding, "mtp_embedding", quantization)))
    if head is not None:
        token_ids = jax.device_put(np.arange(model.cfg.vocab_size, dtype=np.int32))
        merged.draft_head = nnx.data(DraftHead(_read(model, source, head, "draft_head", quantization), token_ids))
    graph, params = nnx.split(merged)
    return replace(model, graph=graph, params=params)


def _read(
    model: LoadedModel, source: TensorSource, name: str, leaf: str, quantization: str | None
) -> jax.Array | QuantizedTensor:
    """Read one of the tensors in the form that the same matrix of the trunk would have."""
    shape, info = (model.cfg.vocab_size, model.cfg.hidden_size), source.tensors[name]
    if info.shape != shape:
        raise CheckpointError(
            f"{info.file}: {info.name!r} has shape {list(info.shape)}, expected {list(shape)}, the vocabulary and the "
            "width of the trunk. Use an MTP head made for this model, or num_speculative_tokens=0."
        )
    if quantization is not None and can_quantize((leaf,), shape, quantization):
        packed = read_quantized(source, name, quantization)
        if packed is not None and can_share_layout((leaf,), [packed]):
            return stack_quantized(shape, [((), packed)])
    dtype = nnx.merge(model.graph, model.params).compute_dtype
    array = np.empty(shape, jnp.dtype(dtype))
    source.read_into(name, array)
    return jax.device_put(array)
