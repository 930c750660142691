"""`top_k_top_p_threshold`: the smallest logit that top-k and top-p keep."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.platform import interpret_kernels, resolve_implementation
from kernels_pallas.top_k_top_p import reference, triton


def top_k_top_p_threshold(
    logits: Float[Array, "N V"],
    max_logit: Float[Array, " N"],
    temperature: Float[Array, " N"],
    top_k: Int[Array, " N"],
    top_p: Float[Array, " N"],
    *,
    implementation: str | None = None,
) -> Float[Array, " N"]:
    """Return the smallest logit of each row that top-k and top-p keep, float32; `reference.py` has the formula.

    Top-k comes first, then top-p (nucleus sampling, arXiv:1904.09751) on the renormalised rest, as in Hugging Face's
    logits processors. Equal logits are kept or dropped together. The result of a row does not depend on the other
    rows, bit for bit.

    Args:
        logits: float32; -inf for ids that do not exist.
        max_logit: the largest logit of each row, float32.
        temperature: divides the logits before the softmax; float32, above 0.
        top_k: how many of the largest logits to keep; 0: all.
        top_p: probability that the kept tokens have together at least, float32, above 0; 1: keep all.
        implementation: "xla", "triton", or None: the best for the platform.

    Returns:
        thresholds; a token is kept if its logit is at least the threshold. Where all tokens are kept, "xla" returns
        the smallest logit or -inf, and "triton" -inf.

    Raises:
        ValueError: `implementation` is "triton" and the logits are not float32.
    """
    supported = triton.supports(logits)
    if implementation == "triton" and not supported:
        raise ValueError(f"the Triton kernels of top_k_top_p_threshold need float32 logits, not {logits.dtype}")
    args = (logits, max_logit, temperature, top_k, top_p)
    if resolve_implementation(implementation, supported=supported) == "triton":
        return triton.top_k_top_p_threshold(*args, interpret=interpret_kernels())
    return reference.top_k_top_p_threshold(*args)
