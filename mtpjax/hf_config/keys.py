"""Keys of config.json that may be there without an effect, each with the reason, and keys that must be neutral."""

from __future__ import annotations

from collections.abc import Mapping

TRAINING = "of training only"
OUTPUTS = "says what transformers returns, not what it computes"
OTHER_TASKS = "of classification and encoder models"
GENERATION = "belongs to generation_config.json; transformers 4 also wrote it here, with its default"
TEXT_ONLY = "of the vision and audio parts, which are not loaded"
TOKENS = "the tokenizer's files say it"
PROGRAM = "how another program runs the model, not what it computes"
ORIGIN = "says who wrote the file"

_EVERYWHERE = {
    "architectures": "a class name of transformers; model_type and the tensors decide",
    "dtype": "the tensors have their dtypes; LLM(dtype=...) says in which one is computed",
    "torch_dtype": "the old name of dtype",
    "transformers_version": ORIGIN,
    "unsloth_version": ORIGIN,
    "unsloth_fixed": ORIGIN,
    "_name_or_path": ORIGIN,
    "name_or_path": ORIGIN,
    "model_name": ORIGIN,
    "_commit_hash": ORIGIN,
    "auto_map": "code of a folder is never run",
    "quantization_config": "read by checkpoints/hf_quantized, where there are quantised tensors",
    "compression_config": "the old name of quantization_config",
    "bos_token_id": TOKENS,
    "pad_token_id": TOKENS,
    "sep_token_id": TOKENS,
    "decoder_start_token_id": TOKENS,
    "tokenizer_class": TOKENS,
    "processor_class": TOKENS,
    "initializer_range": TRAINING,
    "attention_dropout": TRAINING,
    "hidden_dropout": TRAINING,
    "router_aux_loss_coef": TRAINING,
    "router_jitter_noise": TRAINING,
    "output_router_logits": OUTPUTS,
    "return_dict": OUTPUTS,
    "output_hidden_states": OUTPUTS,
    "output_attentions": OUTPUTS,
    "use_cache": PROGRAM,
    "torchscript": PROGRAM,
    "use_bfloat16": PROGRAM,
    "tf_legacy_loss": PROGRAM,
    "chunk_size_feed_forward": PROGRAM,
    "_attn_implementation": PROGRAM,
    "attn_implementation": PROGRAM,
    "_attn_implementation_autoset": PROGRAM,
    "_experts_implementation": PROGRAM,
    "experts_implementation": PROGRAM,
    "id2label": OTHER_TASKS,
    "label2id": OTHER_TASKS,
    "num_labels": OTHER_TASKS,
    "problem_type": OTHER_TASKS,
    "finetuning_task": OTHER_TASKS,
    "task_specific_params": OTHER_TASKS,
    "prefix": OTHER_TASKS,
    "pruned_heads": OTHER_TASKS,
    "is_decoder": OTHER_TASKS,
    "is_encoder_decoder": OTHER_TASKS,
    "add_cross_attention": OTHER_TASKS,
    "cross_attention_hidden_size": OTHER_TASKS,
    "tie_encoder_decoder": OTHER_TASKS,
    **dict.fromkeys(
        (
            "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
            "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
            "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
            "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
            "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
            "begin_suppress_tokens",
        ),
        GENERATION,
    ),
}  # fmt: skip

# Of the object around `text_config`.
HARMLESS_AROUND: Mapping[str, str] = _EVERYWHERE | {
    "vision_config": TEXT_ONLY,
    "audio_config": TEXT_ONLY,
    "image_token_id": TEXT_ONLY,
    "video_token_id": TEXT_ONLY,
    "audio_token_id": TEXT_ONLY,
    "vision_token_id": TEXT_ONLY,
    "vision_start_token_id": TEXT_ONLY,
    "vision_end_token_id": TEXT_ONLY,
    "language_model_only": "only the language model is loaded in any case",
    "hidden_size": "a copy of text_config's value, for programs that look for it here; the tensors are checked",
    "vocab_size": "a copy of text_config's value; the tensors are checked",
}
# Of the text model. A flat file may also have what stands around `text_config` in a nested one.
HARMLESS_IN_TEXT: Mapping[str, str] = {
    **{key: reason for key, reason in HARMLESS_AROUND.items() if key not in ("hidden_size", "vocab_size")},
    "full_attention_interval": "layer_types, which is there too, says the same layer by layer",
    "mamba_ssm_dtype": "the recurrent state is always float32",
    "max_window_layers": "counts layers with a sliding window, and there is none",
    "mtp_num_hidden_layers": "the tensors decide whether there is an MTP head",
    "num_nextn_predict_layers": "another name of mtp_num_hidden_layers",
    "text_config": "null",
}
# Of `rope_parameters`.
HARMLESS_IN_ROPE: Mapping[str, str] = {
    "mrope_section": "with text alone the three position rows of M-RoPE are equal",
    "mrope_interleaved": "with text alone the three position rows of M-RoPE are equal",
    "finetuned": "says how the values were found",
}
# Keys that would change the result of the text model -> the one value that is the model as it is computed here.
NEUTRAL: Mapping[str, object] = {
    "attention_bias": False,
    "attn_output_gate": True,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "mlp_bias": False,
    "mlp_only_layers": [],
    "mtp_use_dedicated_embeddings": False,
    "norm_topk_prob": True,
    "use_sliding_window": False,
}
