"""Exit codes of the `trilevel` command: 0 done, 1 a bar does not hold or a defect of ours, and these."""

from __future__ import annotations

FAILED = 1
"""What was checked is not as it should be."""

USAGE_ERROR = 2
"""Whatever the user can put right: input, configuration, a checkpoint, a missing extra."""

INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as shells have it."""
