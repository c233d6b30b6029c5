"""The tokenizer of a pretrained model, from tokenizer.json or from its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trilevel.conversion.settings import read_table
from trilevel.errors import CheckpointError, require

# names of the special tokens where neither file of the model says them: BERT's, RoBERTa's
SPECIAL_TOKENS = {
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
    "unk_token": ("[UNK]", "<unk>"),
}
_WORDPIECE = ("[CLS]", "[SEP]", "[UNK]")
_BPE = ("<s>", "</s>", "<unk>")


def load_tokenizer(folder: Path, vocabulary: Literal["wordpiece", "bpe"] | None) -> Any:
    """The `tokenizers.Tokenizer` of a model; it neither truncates nor pads.

    Args:
        folder: with tokenizer.json, or with what `vocabulary` needs.
        vocabulary: how to build it without tokenizer.json: from vocab.txt, or from vocab.json and merges.txt.

    Raises:
        CheckpointError: the files are missing or damaged.
        MissingExtraError: tokenizers is not installed.
    """
    tokenizers = require("tokenizers", extra="convert")
    tokenizer = _read(tokenizers, folder, vocabulary)
    if _table(folder / "sentence_bert_config.json").get("do_lower_case") is True:
        # sentence-transformers puts it in front of what the tokenizer does
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *own])
    return tokenizer


def _read(tokenizers: Any, folder: Path, vocabulary: Literal["wordpiece", "bpe"] | None) -> Any:
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # tokenizers raises plain Exception
        except Exception as error:
            raise CheckpointError(f"{path} is no tokenizer ({error}). Download the model again.") from error
        # the file may cut at some length and pad to it
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if vocabulary == "wordpiece" and (folder / "vocab.txt").is_file():
        return _wordpiece(tokenizers, folder)
    if vocabulary == "bpe" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _bpe(tokenizers, folder)
    instead = {"wordpiece": " or vocab.txt", "bpe": ", or vocab.json and merges.txt", None: ""}[vocabulary]
    raise CheckpointError(
        f"{folder} has no tokenizer: tokenizer.json{instead} is needed. Download the model's tokenizer into it, or "
        "write it there with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER) of transformers."
    )


def special_tokens(folder: Path, tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens that the model's files or `SPECIAL_TOKENS` name and the tokenizer knows."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        named |= {
            key: value["content"] if isinstance(value, Mapping) and "content" in value else value
            for key, value in _table(folder / name).items()
            if key.endswith("_token")
        }
    found: dict[str, int] = {}
    for key in [*SPECIAL_TOKENS, "bos_token", "eos_token"]:
        names = (named[key],) if isinstance(named.get(key), str) else SPECIAL_TOKENS.get(key, ())
        ids = [number for name in names if (number := tokenizer.token_to_id(name)) is not None]
        if ids:
            found[key] = ids[0]
    return found


def _table(path: Path) -> dict[str, Any]:
    return read_table(path) if path.is_file() else {}


def _check(vocabulary: Mapping[str, int], needed: tuple[str, ...], path: Path) -> None:
    missing = [token for token in needed if token not in vocabulary]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}. Download the model's tokenizer again.")


def _wordpiece(tokenizers: Any, folder: Path) -> Any:
    path = folder / "vocab.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download the model again.") from error
    vocabulary = {line.rstrip("\r"): index for index, line in enumerate(lines) if line.rstrip("\r")}
    _check(vocabulary, _WORDPIECE, path)
    settings = _table(folder / "tokenizer_config.json")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token=_WORDPIECE[2]))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    tokenizer.add_special_tokens([names[0] for names in SPECIAL_TOKENS.values() if names[0] in vocabulary])
    return tokenizer


def _bpe(tokenizers: Any, folder: Path) -> Any:
    vocabulary = read_table(folder / "vocab.json")
    _check(vocabulary, _BPE, folder / "vocab.json")
    settings = _table(folder / "tokenizer_config.json")
    has_space = bool(settings.get("add_prefix_space", False))
    try:
        model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    # tokenizers raises plain Exception
    except Exception as error:
        raise CheckpointError(f"{folder / 'merges.txt'} has no merges ({error}). Download the model again.") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=has_space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", vocabulary["</s>"]),
        ("<s>", vocabulary["<s>"]),
        trim_offsets=True,
        add_prefix_space=has_space,
    )
    # the mask swallows the space before it
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(names[1], lstrip=key == "mask_token", special=True)
            for key, names in SPECIAL_TOKENS.items()
            if names[1] in vocabulary
        ]
    )
    return tokenizer
