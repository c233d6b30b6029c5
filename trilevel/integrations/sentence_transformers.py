"""A converted encoder as the module of a `SentenceTransformer`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.conversion.converted import MODULES_FILE, PICTURE_FILE, REPORT_FILE, read_converted, save_converted
from trilevel.conversion.embed import pooled
from trilevel.conversion.embedder import Embedder, embed_padded
from trilevel.conversion.sequences import pad
from trilevel.conversion.settings import read_json, read_table
from trilevel.conversion.source import Source
from trilevel.data.token_rows import BATCH_TOKENS, batches
from trilevel.errors import CheckpointError, ConfigError, InputError, require
from trilevel.model.folder import CONFIG_FILE, read_manifest

TOKEN_STATES = 16 * BATCH_TOKENS
"""Padded tokens of a batch up to which vectors of single tokens are handed out beside those of the texts."""

# where sentence-transformers has always kept the limit of its first module
_LIMIT_FILE = "sentence_bert_config.json"
_SETTINGS_FILE = "config_sentence_transformers.json"
_SETTINGS = ("prompts", "default_prompt_name", "similarity_fn_name")


def sentence_transformer(folder: str | Path, **options: Any) -> Any:
    """A `SentenceTransformer` of a folder that `trilevel convert` wrote.

    `SentenceTransformer(folder, trust_remote_code=True)` gives the same. Since version 6 sentence-transformers asks for
    that flag whenever a folder names a module of another package, even an installed one; here the caller names the
    module, so that no flag is needed and no code is looked for in the folder.

    Args:
        folder: the converted encoder.
        options: of `SentenceTransformer`, such as `device` or `prompts`; they go before those that were saved.

    Raises:
        CheckpointError: there is no converted encoder, or it is damaged.
        ConfigError: the folder was saved with further modules.
        MissingExtraError: sentence-transformers is not installed.
    """
    library = require("sentence_transformers", extra="sentence-transformers")
    encoder = ConvertedEncoder.load(str(folder))
    modules, settings = Path(folder) / MODULES_FILE, Path(folder) / _SETTINGS_FILE
    if modules.is_file() and len(read_json(modules)) != 1:
        raise ConfigError(
            f"{folder} has modules behind the converted encoder, which would be left out. Load it with "
            "SentenceTransformer(folder, trust_remote_code=True)."
        )
    saved = read_table(settings) if settings.is_file() else {}
    return library.SentenceTransformer(
        modules=[encoder], **({name: saved[name] for name in _SETTINGS if saved.get(name)} | options)
    )


class ConvertedEncoder(nn.Module):
    """Texts of any length to vectors: what modules.json of a converted encoder names.

    Nothing is cut unless `max_seq_length` is set. `encode` gives what `trilevel.conversion.embedder.Embedder` gives,
    normalised where the original model does so. A batch of long texts runs in parts, so that `batch_size` does not
    decide the memory; vectors of tokens (`output_value="token_embeddings"`) are handed out up to 262,144 padded tokens
    a batch, and always in training.

    Args:
        source: of `read_converted`, or any other with a tokenizer.
        max_seq_length: cut longer texts, special tokens counted; None reads all of them.

    Raises:
        InputError: the encoder reads images.
    """

    save_in_root = True
    modalities = ("text",)

    def __init__(self, source: Source, *, max_seq_length: int | None = None) -> None:
        super().__init__()
        self._embedder = Embedder(source)
        # a child, so that SentenceTransformer moves and trains it
        self.encoder = source.encoder
        self.max_seq_length = max_seq_length

    @property
    def source(self) -> Source:
        """The encoder and what belongs to it."""
        return self._embedder.source

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        return self.source.tokenizer

    def get_embedding_dimension(self) -> int:
        """Numbers in a vector."""
        return self._embedder.dim

    def get_sentence_embedding_dimension(self) -> int:
        """The same, by the name of versions before 6."""
        return self._embedder.dim

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Texts to `input_ids` and `attention_mask`, both (texts, tokens).

        Raises:
            InputError: an input is no single text, or is longer than the encoder reads.
        """
        for given in inputs:
            if not isinstance(given, str):
                raise InputError(f"an input is a {type(given).__name__}; ConvertedEncoder reads texts (str) only.")
        rows = self._embedder.tokens([(prompt or "") + text for text in inputs], max_tokens=self.max_seq_length)
        self._embedder.check_lengths(rows)
        ids, padding = pad(rows, self._embedder.padding_id)
        return {"input_ids": ids, "attention_mask": (~padding).long()}

    def tokenize(self, texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """`preprocess` by the name of versions before 6."""
        return self.preprocess(texts, **options)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add `sentence_embedding` (texts, dim) and `token_embeddings` (texts, tokens, dim) to the features.

        Raises:
            InputError: padding stands before a token.
        """
        ids, padding = features["input_ids"], features["attention_mask"] == 0
        if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
            raise InputError("padding stands before tokens; ConvertedEncoder takes rows that are padded at their end.")
        if torch.is_grad_enabled():
            mask = padding if bool(padding.any()) else None
            hidden = self.encoder(ids, padding_mask=mask)
            own = {"token_embeddings": hidden, "sentence_embedding": pooled(hidden, mask, self.source.sentence)}
        else:
            own = self._in_parts(ids, padding)
        return _Features(features | own)

    def _in_parts(self, ids: Tensor, padding: Tensor) -> dict[str, Tensor]:
        lengths = (~padding).sum(1).tolist()
        vectors = torch.zeros(len(ids), self._embedder.dim, device=ids.device)
        states: Tensor | None = None
        for places in batches(lengths, BATCH_TOKENS):
            longest = lengths[places[0]]
            hidden, own = embed_padded(
                self.encoder, self.source.sentence, ids[places, :longest], padding[places, :longest]
            )
            vectors[places] = own
            if ids.numel() <= TOKEN_STATES:
                states = hidden.new_zeros(*ids.shape, hidden.shape[-1]) if states is None else states
                states[places, :longest] = hidden
        return {"sentence_embedding": vectors} | ({} if states is None else {"token_embeddings": states})

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write the folder that `load` and `load_encoder` read, the encoder's weights as they are now.

        Files that others put there stay. Not atomic, for sentence-transformers writes files of its own around it; a
        folder of which not all was written is refused by its hashes.

        Raises:
            ConfigError: pickled weights are asked for.
            CheckpointError: the folder cannot be written.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False asks for pickled weights; ConvertedEncoder writes safetensors.")
        folder = Path(output_path)
        report, picture = self._kept()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as temporary:
                whole = save_converted(Path(temporary) / "whole", self.source, self.encoder, report, picture)
                _disown_modules(whole)
                # the list of hashes goes last
                for path in sorted(whole.iterdir(), key=lambda path: path.name == CONFIG_FILE):
                    path.replace(folder / path.name)
            (folder / _LIMIT_FILE).write_text(json.dumps({"max_seq_length": self.max_seq_length}), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"the encoder could not be saved to {folder} ({error}). Free space or choose another folder."
            ) from error

    def _kept(self) -> tuple[dict[str, Any], bytes | None]:
        """Report and picture of the conversion, if they are still where the encoder came from."""
        report, picture = self.source.folder / REPORT_FILE, self.source.folder / PICTURE_FILE
        return (
            read_table(report) if report.is_file() else {},
            picture.read_bytes() if picture.is_file() else None,
        )

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        *,
        backend: str = "torch",
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> ConvertedEncoder:
        """Read a folder that `save` or `trilevel convert` wrote; sentence-transformers calls it.

        Args:
            model_name_or_path: the folder. A name on the hub is refused: its cache holds links, which are not followed.
            subfolder: of it.
            backend: `torch`, the only one.
            model_kwargs: `dtype` (or `torch_dtype`) of the weights, nothing else.
            processor_kwargs: none.
            config_kwargs: none.

        Raises:
            ConfigError: an argument that is not supported.
            CheckpointError: no folder, or not as it was written.
        """
        folder = Path(model_name_or_path) / subfolder
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is no folder. Download a converted encoder with `hf download NAME --local-dir FOLDER` and "
                "load FOLDER."
            )
        if backend != "torch":
            raise ConfigError(f"backend={backend!r} cannot run a converted encoder; use backend='torch'.")
        options = dict(model_kwargs or {})
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        unknown = sorted({*options, *(processor_kwargs or {}), *(config_kwargs or {})})
        if unknown:
            raise ConfigError(f"a converted encoder takes no {', '.join(unknown)}; give model_kwargs={{'dtype': ...}}.")
        limit = read_table(folder / _LIMIT_FILE).get("max_seq_length") if (folder / _LIMIT_FILE).is_file() else None
        if not isinstance(limit, (int, type(None))):
            raise CheckpointError(f"{folder / _LIMIT_FILE} has max_seq_length={limit!r}; an integer or null is needed.")
        made = cls(read_converted(folder), max_seq_length=limit)
        if dtype not in (None, "auto"):
            made.encoder.to(_floating(dtype))
        return made


def _floating(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype={dtype!r} is no type of weights; use 'float32', 'bfloat16' or 'auto'.")
    return found


class _Features(dict[str, Any]):
    """Says why there are no vectors of tokens."""

    def __missing__(self, name: str) -> Any:
        if name == "token_embeddings":
            raise InputError(
                f"vectors of tokens are kept up to {TOKEN_STATES:,} padded tokens a batch; encode with a smaller "
                "batch_size to have them."
            )
        raise KeyError(name)


def _disown_modules(folder: Path) -> None:
    """Leave modules.json out of the hashes: sentence-transformers writes its own."""
    manifest = read_manifest(folder)
    del manifest["files"][MODULES_FILE]
    (folder / CONFIG_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
