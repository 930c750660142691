"""Folders of safetensors files: header, reader and writer."""
