"""`ModelConfig`: the one frozen, hashable description of a Qwen3.5 / Qwen3.6 text model.

Letters of array axes in all packages; a letter has one meaning:

    B   sequences of the batch            S   length of the KV cache (positions)
    T   token rows of a step              N   key/value heads
    W   rows of a verify window (k + 1)   Q   query heads
    R   output rows of a step             G   query heads of a key/value head (Q / N)
    k   drafts of a step                  H   size of an attention head
    D   hidden size                       J   DeltaNet key heads
    V   vocabulary                        M   DeltaNet value heads
    E   experts                           Dk  size of a DeltaNet key head
    I   hidden units of an expert / MLP   Dv  size of a DeltaNet value head
    O   output features of a matrix       C   channels of the DeltaNet convolution
    F   input features of a matrix        A   attention layers of the trunk
    P   partial sums of a split-K product L   layers of a stack; in the cache the DeltaNet layers

Axes without a letter have a word: `rows` (token rows of all sequences, B * T), `topk` (experts chosen for a token),
`chunk` (token rows of a DeltaNet chunk), `group` (values of a quantised matrix that share a scale), `width` (taps of
the convolution).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

LINEAR, FULL = "linear_attention", "full_attention"
# <|im_end|>, <|endoftext|>: the `eos_token_id` of a published config.json is not the token that ends a chat message.
DEFAULT_STOP_TOKEN_IDS = (248046, 248044)


class ConfigError(ValueError):
    """A model description that this program cannot run; names the key, what was found and what is supported."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed so that a model reads texts longer than those of its training; hashable.

    Attributes:
        kind: "linear" (positions are divided by `factor`) or "yarn" (arXiv:2309.00071).
        factor: how many times longer the texts may be, at least 1.
        original_max_position: positions that the model was trained for.
        attention_factor: cosine and sine are multiplied by it, in queries and in keys.
        beta_fast, beta_slow: rotations within `original_max_position` from which on, and below which, YaRN keeps a
            frequency, and divides it by `factor`.
        truncate: round the two borders between these frequencies outward to whole channels.
    """

    kind: str
    factor: float
    original_max_position: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def max_position(self) -> int:
        """Positions that the model can use with this scaling."""
        return int(self.original_max_position * self.factor)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Return the `attention_factor` that YaRN recommends for a scaling by `factor` (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one text model (`config.json`'s `text_config`); hashable, so usable as a static argument.

    Attributes:
        layer_pattern: the shortest repeating run of layer types, `LINEAR` (Gated DeltaNet) or `FULL` (gated attention).
            One repeat of it is a super-block.
        rotary_dim: leading dimensions of an attention head that RoPE rotates.
        rope_scaling: how its frequencies are changed for longer texts; None: not at all.
        linear_k_heads, linear_v_heads, linear_k_dim, linear_v_dim: heads of a Gated DeltaNet layer and their sizes.
        conv_width: taps of the causal convolution in front of the delta rule.
        mlp_size: hidden units of the SwiGLU MLP of a dense model; 0 in a Mixture-of-Experts model.
        num_experts: experts of each layer; 0 means a dense model.
        expert_size, shared_expert_size: hidden units of a routed expert and of the shared expert.
        tied_embeddings: the LM head uses the embedding matrix.
        output_gate_act: activation of the gate behind a Gated DeltaNet layer's norm, "silu", "swish" or "sigmoid".
        max_position: positions that the model was made for; with a `rope_scaling`, those that it makes possible.
        mtp_layers: layers of the Multi-Token-Prediction head, 0 or 1.
        stop_token_ids: tokens that end a text.
    """

    hidden_size: int
    num_layers: int
    layer_pattern: tuple[str, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    linear_k_heads: int
    linear_v_heads: int
    linear_k_dim: int
    linear_v_dim: int
    conv_width: int
    vocab_size: int
    mlp_size: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    tied_embeddings: bool = False
    norm_eps: float = 1e-6
    rope_scaling: RopeScaling | None = None
    output_gate_act: str = "silu"
    max_position: int = 262_144
    mtp_layers: int = 1
    stop_token_ids: tuple[int, ...] = DEFAULT_STOP_TOKEN_IDS

    @property
    def num_superblocks(self) -> int:
        """How often `layer_pattern` stands in the model."""
        return self.num_layers // len(self.layer_pattern)

    @property
    def linear_per_block(self) -> int:
        """Gated DeltaNet layers of one super-block."""
        return self.layer_pattern.count(LINEAR)

    @property
    def full_per_block(self) -> int:
        """Attention layers of one super-block."""
        return self.layer_pattern.count(FULL)

    @property
    def linear_layers(self) -> int:
        """Gated DeltaNet layers of the trunk."""
        return self.num_superblocks * self.linear_per_block

    @property
    def full_layers(self) -> int:
        """Attention layers of the trunk."""
        return self.num_superblocks * self.full_per_block

    @property
    def key_size(self) -> int:
        """Size of all keys of one row of a Gated DeltaNet layer, J * Dk."""
        return self.linear_k_heads * self.linear_k_dim

    @property
    def value_size(self) -> int:
        """Size of all values of one row of a Gated DeltaNet layer, M * Dv."""
        return self.linear_v_heads * self.linear_v_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: queries, keys and values of a Gated DeltaNet layer."""
        return 2 * self.key_size + self.value_size

    def without_mtp(self) -> ModelConfig:
        """Return the config of the same model without its MTP head."""
        return replace(self, mtp_layers=0)
