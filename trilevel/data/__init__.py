"""Data: load, split, generate."""
