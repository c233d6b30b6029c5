"""API keys: shown once, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, final

from trilevel.errors import ConfigError
from trilevel.serving.status import KeyRefusedError, RoleError

_LINE = re.compile(r"sha256:([0-9a-f]{64}) ([\w.-]{1,64})(?: (admin|user))?")
Role = Literal["admin", "user"]


@final
class Keys:
    """Who may call, by the SHA-256 of their keys; without any, everyone may.

    Keys are drawn at random from 256 bits (`new_key`), so that neither salt nor a slow hash adds anything.

    >>> key, line = new_key("alice")
    >>> Keys({hashlib.sha256(key.encode()).hexdigest(): "alice"}).check(f"Bearer {key}")
    'alice'

    Args:
        names: by the hashes of their keys.
        admins: names of those who may load and unload models too.
    """

    def __init__(self, names: Mapping[str, str] | None = None, admins: Collection[str] = ()) -> None:
        self._names = {bytes.fromhex(digest): name for digest, name in (names or {}).items()}
        self._admins = frozenset(admins)

    def __bool__(self) -> bool:
        return bool(self._names)

    @classmethod
    def load(cls, path: str | Path) -> Keys:
        """Keys of a file with a line `sha256:HASH NAME ROLE` for each, `user` where none stands; `#` begins a comment.

        Raises:
            ConfigError: the file cannot be read, a line is none, a name has two roles, or there is no key in it.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API keys {path} cannot be read: {error}.") from error
        names: dict[str, str] = {}
        roles: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            found = _LINE.fullmatch(text)
            if not found:
                raise ConfigError(
                    f"{path}, line {number}: write sha256:HASH NAME ROLE; trilevel.serving.keys.new_key does."
                )
            names[found[1]] = found[2]
            if roles.setdefault(found[2], found[3] or "user") != (found[3] or "user"):
                raise ConfigError(f"{path}, line {number}: {found[2]} is admin and user; give the second key a name.")
        if not names:
            raise ConfigError(f"{path} holds no API key; nobody could call the server.")
        return cls(names, [name for name, role in roles.items() if role == "admin"])

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

    def check_admin(self, name: str) -> None:
        """Raise RoleError where there are keys, and that of this name is no admin's."""
        if self._names and name not in self._admins:
            raise RoleError("this API key may not load or unload models; an admin's may (trilevel serve-key --role).")


def new_key(name: str, role: Role = "user") -> tuple[str, str]:
    """A new key, and the line of it for the server's file."""
    key = secrets.token_urlsafe(32)
    line = f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {name} {role}"
    if not _LINE.fullmatch(line):
        raise ConfigError(f"name={name!r} must be 1 to 64 letters, digits, dots, hyphens or underscores.")
    return key, line
