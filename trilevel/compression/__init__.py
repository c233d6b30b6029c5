"""Smaller and cheaper models: pruning and quantization."""
