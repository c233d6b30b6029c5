"""Encoders of text that are used for their vectors."""
