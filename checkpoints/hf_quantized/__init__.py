"""Folders that Hugging Face publishes with quantised weights: GPTQ, AWQ, FP8, NVFP4 and others."""
