"""Numerics on (packed) weights. Knows arrays, nothing of the model."""
