"""Which models there are: names, and the folders of their artifacts."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trilevel.artifact.manifest import Artifact, read_artifact
from trilevel.errors import ConfigError
from trilevel.serving.opener import version_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model's name and the folder that its artifact lies in.

    Raises:
        ConfigError: the name is none.
    """

    name: str
    folder: Path

    def __post_init__(self) -> None:
        """Check the name."""
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"the model name {self.name!r} is none; take letters, digits, '.', '_' and '-', 64 at most, and begin "
                "with a letter or digit, as in NAME=FOLDER."
            )

    @classmethod
    def parse(cls, text: str) -> Source:
        """Of `NAME=FOLDER`, or a folder, whose own name it takes.

        >>> Source.parse("mail=out/paths/fashion").name
        'mail'
        >>> Source.parse("out/paths/fashion/").name
        'fashion'
        """
        name, equals, folder = text.partition("=")
        if equals and _NAME.fullmatch(name):
            return cls(name=name, folder=Path(folder))
        return cls(name=Path(text).resolve().name, folder=Path(text))


def sources(texts: Iterable[str]) -> tuple[Source, ...]:
    """All that were named, each once.

    Raises:
        ConfigError: there are none, or a name stands twice.
    """
    found = tuple(map(Source.parse, texts))
    names = [one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not found or twice:
        raise ConfigError(
            f"{len(found)} artifacts were named, {', '.join(twice) or 'none'} twice; name each one differently: "
            "NAME=FOLDER NAME=FOLDER."
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An artifact as it was when it was loaded, in a folder of its own: one that is written anew leaves it alone.

    Workers that are restarted open what the first ones opened.
    """

    artifact: Artifact
    version: str
    folder: Path

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def take_snapshot(source: Source) -> Snapshot:
    """Read an artifact and link its files, or copy them where links are not possible.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    found = read_artifact(source.folder)
    folder = Path(tempfile.mkdtemp(prefix="trilevel-serving-"))
    try:
        for path in found.path.iterdir():
            if path.is_file():
                _link(path, folder / path.name)
        # what was linked is what is served, even if it was written anew meanwhile
        artifact = read_artifact(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Snapshot(artifact=artifact, version=version_of(artifact), folder=folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
