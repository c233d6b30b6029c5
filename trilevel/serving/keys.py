"""API keys: shown once, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import final

from trilevel.errors import ConfigError
from trilevel.serving.status import KeyRefusedError

_LINE = re.compile(r"sha256:([0-9a-f]{64}) ([\w.-]{1,64})")


@final
class Keys:
    """Who may call, by the SHA-256 of their keys; without any, everyone may.

    Keys are drawn at random from 256 bits (`new_key`), so that neither salt nor a slow hash adds anything.

    >>> key, line = new_key("alice")
    >>> Keys({hashlib.sha256(key.encode()).hexdigest(): "alice"}).check(f"Bearer {key}")
    'alice'
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self._names = {bytes.fromhex(digest): name for digest, name in (names or {}).items()}

    def __bool__(self) -> bool:
        return bool(self._names)

    @classmethod
    def load(cls, path: str | Path) -> Keys:
        """Keys of a file with a line `sha256:HASH NAME` for each; `#` begins a comment.

        Raises:
            ConfigError: the file cannot be read, a line is none, or there is no key in it.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API keys {path} cannot be read: {error}.") from error
        names: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            found = _LINE.fullmatch(text)
            if not found:
                raise ConfigError(f"{path}, line {number}: write sha256:HASH NAME; trilevel.serving.keys.new_key does.")
            names[found[1]] = found[2]
        if not names:
            raise ConfigError(f"{path} holds no API key; nobody could call the server.")
        return cls(names)

    def check(self, authorization: str | None) -> str:
        """The name of the key in a header `Bearer KEY`, empty where no keys are needed; raises KeyRefusedError."""
        if not self._names:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise KeyRefusedError("an API key is needed; send the header Authorization: Bearer KEY.")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # all are compared, so that the time says nothing about which one nearly fits
        matches = [name for known, name in self._names.items() if hmac.compare_digest(known, digest)]
        if not matches:
            raise KeyRefusedError("this API key is not known; ask whoever runs the server for one.")
        return matches[0]


def new_key(name: str) -> tuple[str, str]:
    """A new key, and the line of it for the server's file."""
    key = secrets.token_urlsafe(32)
    line = f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {name}"
    if not _LINE.fullmatch(line):
        raise ConfigError(f"name={name!r} must be 1 to 64 letters, digits, dots, hyphens or underscores.")
    return key, line
