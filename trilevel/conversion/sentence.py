"""How a sentence-transformers model makes one vector of a text: its modules behind the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trilevel.conversion.settings import read_json, read_table
from trilevel.errors import CheckpointError, ConfigError

Pooling = Literal["mean", "cls"]
_FLAG = "pooling_mode_"
# tokenizers without a limit write a number like this one
_NO_LIMIT = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """From token vectors to the text's.

    Attributes:
        pooling: mean of the real tokens, or the first token.
        normalize: the vector is divided by its length.
        max_tokens: tokens after which the model cuts a text, special ones counted; None if it does not say.
        folder: where the encoder is, below the model's folder.
    """

    pooling: Pooling = "mean"
    normalize: bool = False
    max_tokens: int | None = None
    folder: str = ""

    def __post_init__(self) -> None:
        """Refuse a pooling that would be taken for the mean."""
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"Sentence: pooling={self.pooling!r} is neither 'mean' nor 'cls'.")


def read_sentence(folder: Path) -> Sentence:
    """What modules.json and the files it names say; the mean without normalisation where there is none.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: a module or a pooling that is not supported.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return Sentence()
    modules = read_json(path)
    if not isinstance(modules, list) or not all(
        isinstance(module, Mapping) and isinstance(module.get("path"), str) for module in modules
    ):
        raise CheckpointError(f"{path} is no list of modules with paths. Download the model again.")
    outside = [module["path"] for module in modules if not _is_inside(module["path"])]
    if outside:
        raise CheckpointError(f"{path} names {outside[0]!r}, which is outside the folder; it is not read.")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if "ConvertedEncoder" in kinds:
        raise ConfigError(f"{folder} is a converted encoder already. Name the pretrained one that it was made from.")
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConfigError(
            f"{path} has the modules {', '.join(kinds)}; Transformer, Pooling and optionally Normalize are supported. "
            "Choose a model with these, or take modules.json away to convert its encoder alone."
        )
    inner = modules[0]["path"]
    return Sentence(
        pooling=_pooling(folder / modules[1]["path"] / "config.json"),
        normalize=len(kinds) == 3,
        max_tokens=_max_tokens(folder / inner),
        folder=inner,
    )


def _is_inside(path: str) -> bool:
    return not (Path(path).is_absolute() or ".." in Path(path).parts)


def _pooling(path: Path) -> Pooling:
    values = read_table(path)
    given: Any = values.get("pooling_mode")
    if given is None:
        # one flag for each mode in files of older versions
        given = [_mode(name) for name, is_on in values.items() if name.startswith(_FLAG) and is_on is True]
    modes = given if isinstance(given, list) else [given]
    if modes == ["mean"]:
        return "mean"
    if modes == ["cls"]:
        return "cls"
    raise ConfigError(f"{path} pools by {', '.join(map(str, modes)) or 'nothing'}; 'mean' or 'cls' is supported.")


def _mode(flag: str) -> str:
    return flag.removeprefix(_FLAG).removesuffix("_tokens").removesuffix("_token")


def _max_tokens(folder: Path) -> int | None:
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        value = read_table(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(value, int) and 0 < value < _NO_LIMIT:
            return value
    return None
