"""`config.json` of a Hugging Face checkpoint <-> `ModelConfig`."""

from mtpjax.hf_config.overrides import apply_hf_overrides
from mtpjax.hf_config.read import config_from_hf
from mtpjax.hf_config.write import config_to_hf

__all__ = ["apply_hf_overrides", "config_from_hf", "config_to_hf"]
