"""GGUF, the file format of ggml and llama.cpp: reader, writer and block types."""
