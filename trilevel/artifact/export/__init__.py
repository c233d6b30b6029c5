"""Modules to files that runtimes read."""
