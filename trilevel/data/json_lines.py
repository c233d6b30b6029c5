"""JSON values from a stream, one a line, as another program writes them to standard input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from trilevel.errors import InputError

STDIN = "-"
"""What stands for standard input among the arguments of a command."""


def read_lines(stream: Iterable[str], *, where: str = "standard input") -> Iterator[tuple[str, Any]]:
    """Where each value stands (`WHERE:LINE`) and the value; blank lines are passed over.

    Raises:
        InputError: a line is no JSON.

    >>> list(read_lines(['"a text"', "", '{"text": "another"}'], where="in"))
    [('in:1', 'a text'), ('in:3', {'text': 'another'})]
    """
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{where}:{number}: no JSON ({error}). Give one JSON value a line, a text or an object."
                ) from error
            yield f"{where}:{number}", value
