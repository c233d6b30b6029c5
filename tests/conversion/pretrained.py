"""Small models of transformers with random weights, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed (extra bench)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra convert)")

VOCAB, HEADS, DIM, FFN, LAYERS = 61, 3, 42, 37, 3
# large where the default is so small that a model which ignored it would pass
EPS = 0.13
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 53,
    "type_vocab_size": 2,
    "layer_norm_eps": EPS,
}
DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": FFN,
    "max_position_embeddings": 53,
}
MODERNBERT = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "num_hidden_layers": 5,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 53,
    "local_attention": 10,
    "norm_eps": EPS,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
IMAGES: dict[str, Any] = {
    "hidden_size": DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "image_size": [10, 21],
    "patch_size": [5, 3],
    "num_channels": 2,
    "layer_norm_eps": EPS,
}
SIZES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT | {"pad_token_id": 1},
    "xlm-roberta": BERT | {"pad_token_id": 1},
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "vit": IMAGES,
    "deit": IMAGES,
}
TEXT = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert")
WORDS = [f"w{number}" for number in range(VOCAB - 5)]


def sharpen(model: nn.Module) -> None:
    """Weights large enough that attention is far from uniform, biases and norms far from nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def make(family: str, head: str = "", **changes: Any) -> Any:
    """A model of `family` in evaluation mode, with the head named as in transformers (`ForMaskedLM`)."""
    config = transformers.AutoConfig.for_model(family, **(SIZES[family] | changes))
    # read for a deit with a head, which may not find None
    config.architectures = []
    auto = transformers.AutoModel if not head else getattr(transformers, f"AutoModel{head}")
    model = auto.from_config(config).eval()
    sharpen(model)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model, with a tokenizer if it reads text."""
    model.save_pretrained(folder, **options)
    if "image_size" not in model.config.to_dict():
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of whole words that cuts at 3 tokens and pads to 7, as some on the hub do."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(names[:5])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(folder / "tokenizer.json"))


def inputs(family: str, batch: int = 3, tokens: int = 29) -> Tensor:
    """Ids above every special token, or images."""
    if family in TEXT:
        return torch.randint(5, VOCAB, (batch, tokens))
    pixels: Tensor = torch.randn(batch, IMAGES["num_channels"], *IMAGES["image_size"])
    return pixels


def reference(model: Any, given: Tensor, **masks: Tensor) -> Tensor:
    """The last hidden state of the encoder inside `model`."""
    base = model.base_model
    with torch.no_grad():
        hidden: Tensor = base(given, **masks).last_hidden_state
    return hidden


def difference(ours: Tensor, theirs: Tensor, real: Tensor | None = None) -> float:
    """Largest absolute difference, at real tokens; both must vary, or nothing was compared."""
    if real is not None:
        ours, theirs = ours[real], theirs[real]
    assert theirs.std() > 0.1
    return (ours - theirs).abs().max().item()
