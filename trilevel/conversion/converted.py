"""The folder that `trilevel convert` writes: encoder, tokenizer, settings and report, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trilevel.compression.checkpoint import holds_integers
from trilevel.compression.quantize import load_frozen
from trilevel.conversion.sentence import Sentence
from trilevel.conversion.settings import read_table
from trilevel.conversion.source import PREPROCESSOR_FILE, Source
from trilevel.conversion.weights import bare_encoder
from trilevel.errors import CheckpointError, require
from trilevel.model.checkpoint import MODEL_FILE, read_tensors, write_tensors
from trilevel.model.config import EncoderConfig, from_mapping
from trilevel.model.encoder import Encoder
from trilevel.model.folder import CONFIG_FILE, check_names, checked_file, find_folder, read_manifest, write_folder

TOKENIZER_FILE, MODULES_FILE = "tokenizer.json", "modules.json"
REPORT_FILE, PICTURE_FILE = "report.json", "head_map.png"
FILES = {MODEL_FILE, TOKENIZER_FILE, REPORT_FILE, PICTURE_FILE, MODULES_FILE, PREPROCESSOR_FILE}
# how sentence-transformers finds the class that loads the folder
_MODULE = "trilevel.integrations.sentence_transformers.ConvertedEncoder"
_MODULES = [{"idx": 0, "name": "0", "path": "", "type": _MODULE}]
_KEPT = ("name", "family", "config", "padding_id", "special_tokens", "trained_tokens", "sha256")


def is_converted(folder: Path) -> bool:
    """Whether a folder was written by `save_converted`, whole or not."""
    found = find_folder(folder)
    if found is None:
        return False
    try:
        return "converted" in read_manifest(found)["config"]
    except CheckpointError:
        # damaged, or of another version: whose it is, the file beside it says too
        modules = found / MODULES_FILE
        return modules.is_file() and _MODULE.encode() in modules.read_bytes()


def save_converted(
    folder: str | Path, source: Source, encoder: Encoder, report: Mapping[str, Any], picture: bytes | None = None
) -> Path:
    """Write a converted encoder, replacing one that is there only when the new one is whole.

    Args:
        folder: to write.
        source: what was converted; its tokenizer or preprocessor and its settings go along.
        encoder: the converted one.
        report: JSON types.
        picture: a PNG of the head map.

    Raises:
        CheckpointError: something else is there, or the disk is full; what was there is unchanged.
    """
    where = Path(folder)
    if where.exists() and not is_converted(where) and any(where.iterdir() if where.is_dir() else [where]):
        raise CheckpointError(f"{where} exists and is no converted encoder; it is left alone. Choose another folder.")
    texts = {REPORT_FILE: json.dumps(report, indent=1, allow_nan=False) + "\n"}
    if source.tokenizer is not None:
        texts[TOKENIZER_FILE] = source.tokenizer.to_str()
        texts[MODULES_FILE] = json.dumps(_MODULES, indent=1) + "\n"
    if source.preprocessor is not None:
        texts[PREPROCESSOR_FILE] = json.dumps(source.preprocessor, indent=2) + "\n"
    files: dict[str, Callable[[Path], None]] = {MODEL_FILE: partial(write_tensors, encoder.state_dict())}
    files |= {name: partial(_write, text.encode()) for name, text in texts.items()}
    if picture is not None:
        files[PICTURE_FILE] = partial(_write, picture)
    kept = {name: getattr(source, name) for name in _KEPT} | {"sentence": dataclasses.asdict(source.sentence)}
    write_folder(where, files, json.loads(json.dumps({"encoder": encoder.config.to_dict(), "converted": kept})))
    return where


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def read_converted(folder: str | Path) -> Source:
    """What `save_converted` wrote, the hash of each file that is read compared; the encoder in evaluation mode.

    Raises:
        CheckpointError: nothing is there, or it is not as it was written.
        MissingExtraError: safetensors or tokenizers is not installed.
    """
    path = find_folder(Path(folder))
    if path is None:
        raise CheckpointError(f"there is no converted encoder at {folder}. Make one with `trilevel convert`.")
    manifest = read_manifest(path)
    check_names(path, manifest, FILES)
    config = manifest["config"]
    try:
        kept = {name: config["converted"][name] for name in (*_KEPT, "sentence")}
        kept["sentence"] = from_mapping(Sentence, kept["sentence"])
        sizes = EncoderConfig.from_dict(config["encoder"])
        encoder = bare_encoder(sizes)
    except (KeyError, TypeError, ValueError) as error:
        where = path / CONFIG_FILE
        raise CheckpointError(f"{where} describes no converted encoder ({error}). Convert again.") from error
    weights = read_tensors(path, MODEL_FILE, manifest)
    try:
        if holds_integers(weights):
            frozen = load_frozen(Encoder(sizes), weights)
            assert isinstance(frozen, Encoder)
            encoder = frozen
        else:
            encoder.load_state_dict(weights, assign=True)
    except (RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"{path} does not fit its own configuration ({error}). Convert again.") from error
    tokenizer = None
    if TOKENIZER_FILE in manifest["files"]:
        text = checked_file(path, TOKENIZER_FILE, manifest).read_text(encoding="utf-8")
        tokenizer = require("tokenizers", extra="convert").Tokenizer.from_str(text)
    preprocessor = None
    if PREPROCESSOR_FILE in manifest["files"]:
        preprocessor = read_table(checked_file(path, PREPROCESSOR_FILE, manifest))
    return Source(
        **kept, folder=path, encoder=encoder.eval(), tokenizer=tokenizer, leftovers=(), preprocessor=preprocessor
    )
