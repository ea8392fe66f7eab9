"""Bytes to named tensors and back, with nothing run."""
