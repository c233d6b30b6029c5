"""Extractive summaries of long documents."""
