"""The console's files as pages of the server; the page itself asks the same routes as every other client."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def console() -> Mapping[str, tuple[str, bytes]]:
    """All pages, by path, as `RestApp` takes them: `/`, and below `/console/` what it reads.

    >>> console()["/"][0]
    'text/html; charset=utf-8'
    """
    found = {}
    for file in files("trilevel.serving.console").iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/console/{file.name}"
            found[path] = (kind, file.read_bytes())
    return found
