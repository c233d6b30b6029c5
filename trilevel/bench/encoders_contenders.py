"""Whole encoders of MiniLM's size, each as a call from token ids to token vectors."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio
from trilevel.conversion.assign import HeadClass
from trilevel.conversion.convert import ConvertConfig
from trilevel.conversion.load import load_encoder
from trilevel.conversion.multilevel import with_classes
from trilevel.conversion.source import Source, load_source
from trilevel.errors import InputError, require
from trilevel.model.config import uniform_heads
from trilevel.model.encoder import Encoder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
RATIO = LevelRatio(6, 3, 1)
WINDOW = 128
"""Attention windows of the peers: their configuration's own word for keys seen, ours being 129."""

Encode = Callable[[Tensor], Tensor]
Build = Callable[["Models", torch.dtype], Encode]
Kind = Literal["dense", "converted", "sparse peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What the contenders are made of.

    Args:
        folder: a converted MiniLM; None for one whose heads took their classes without a profile.
        tokens: of the document, up to which the peers' tables of positions must reach.
    """

    folder: str | None
    tokens: int

    @property
    def dense(self) -> Source:
        """MiniLM as it came."""
        return _minilm()

    def converted(self) -> Encoder:
        """MiniLM with levels."""
        return _unprofiled(_minilm().encoder) if self.folder is None else converted_source(self.folder).encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderContender:
    """One encoder.

    Args:
        name: as the table shows it.
        scope: what it is and what is inside the measured call.
        kind: the fastest `dense` one is what the converted one is compared with.
        build: ids (1, tokens) to (1, tokens, dim).
        define: what it must equal, in any precision; None for random weights without a definition of ours.
        is_checked_whole: the check reads the whole document, else its first tokens.
        peak_bytes: predicted memory of the call, from (tokens, bytes of an element).
    """

    name: str
    scope: str
    kind: Kind
    build: Build
    define: Build | None = None
    is_checked_whole: bool = False
    peak_bytes: Callable[[int, int], int] = lambda tokens, size: 64 * 384 * tokens * size
    package: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether a failed check is ours to answer for."""
        return "trilevel" in self.name

    @property
    def absence(self) -> str | None:
        """Why it cannot run here, None if it can."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed: pip install 'trilevel[bench]'"


def _materialised_bert(models: Models, dtype: torch.dtype) -> Encode:
    return bert(models, dtype, attention="eager")


def contenders() -> list[EncoderContender]:
    """All of them, ours first."""
    random = "random weights, speed only"
    return [
        EncoderContender(
            name="trilevel converted",
            scope="MiniLM with 6:3:1 heads",
            kind="converted",
            build=lambda models, dtype: _ours(models.converted(), dtype),
            define=lambda models, dtype: _ours(_blocked(models.converted()), dtype),
            is_checked_whole=True,
        ),
        EncoderContender(
            name="trilevel dense",
            scope="MiniLM in our Encoder, SDPA",
            kind="dense",
            build=lambda models, dtype: _ours(models.dense.encoder, dtype),
            define=_materialised_bert,
            package="transformers",
        ),
        EncoderContender(
            name="transformers sdpa",
            scope="MiniLM in BertModel, its table of positions repeated",
            kind="dense",
            build=partial(bert, attention="sdpa"),
            define=_materialised_bert,
            package="transformers",
        ),
        EncoderContender(
            name="transformers eager",
            scope="the same, attention materialised",
            kind="dense",
            build=partial(bert, attention="eager"),
            define=_materialised_bert,
            # scores, scaled scores and their softmax, which is float32 in any precision
            peak_bytes=lambda tokens, size: 12 * tokens**2 * (2 * size + 4),
            package="transformers",
        ),
        EncoderContender(
            name="transformers, attention by trilevel",
            scope='the same with attn_implementation="trilevel", exact',
            kind="dense",
            build=partial(bert, attention="trilevel"),
            define=_materialised_bert,
            package="transformers",
        ),
        EncoderContender(
            name="HF Longformer",
            scope=f"LongformerModel of this size, window {WINDOW}, {random}",
            kind="sparse peer",
            build=_longformer,
            package="transformers",
        ),
        EncoderContender(
            name="HF ModernBERT",
            scope=f"ModernBertModel of this size, 4 of 6 layers sliding over {WINDOW}, sdpa, {random}",
            kind="sparse peer",
            build=partial(_modernbert, attention="sdpa"),
            peak_bytes=lambda tokens, size: tokens**2 * (2 + size) + 64 * 384 * tokens * size,
            package="transformers",
        ),
        EncoderContender(
            name="HF ModernBERT, attention by trilevel",
            scope='the same with attn_implementation="trilevel", exact',
            kind="sparse peer",
            build=partial(_modernbert, attention="trilevel"),
            define=partial(_modernbert, attention="eager"),
            package="transformers",
        ),
    ]


def converted_source(folder: str) -> Source:
    """A converted encoder, compared with MiniLM in everything that time depends on.

    Raises:
        InputError: it is no converted encoder, or of another size.
        CheckpointError: it cannot be read.
    """
    source = load_encoder(Path(folder))
    own, wanted = source.encoder.config, _minilm().encoder.config
    sizes = ("vocab_size", "dim", "num_layers", "num_heads", "ffn_dim")
    if any(getattr(own, size) != getattr(wanted, size) for size in sizes) or own.levels is None:
        raise InputError(
            f"{folder} is no converted MiniLM ({', '.join(f'{size}={getattr(own, size)}' for size in sizes)}, "
            f"levels {'absent' if own.levels is None else 'present'}). Make one with `trilevel convert {MINILM} "
            "FOLDER`."
        )
    return source


@cache
def _minilm() -> Source:
    return load_source(MINILM)


def forget() -> None:
    """Let MiniLM go; it is loaded again when it is asked for."""
    _minilm.cache_clear()


def _unprofiled(dense: Encoder) -> Encoder:
    """The first heads local, the next regional, the last global: speed does not depend on which."""
    config = dense.config
    split = RATIO.split(uniform_heads(config))
    row = [HeadClass.LOCAL] * split.local + [HeadClass.REGIONAL] * split.regional + [HeadClass.GLOBAL] * split.global_
    generator = torch.Generator().manual_seed(0)
    scorers = [torch.randn(config.dim, generator=generator) for _ in range(config.num_layers)]
    return with_classes(dense, np.array([row] * config.num_layers), ConvertConfig().levels, scorers)


def _ours(encoder: Encoder, dtype: torch.dtype) -> Encode:
    own: Encode = copy.deepcopy(encoder).to(dtype).eval()
    return own


def _blocked(encoder: Encoder) -> Encoder:
    """A copy whose attention is computed by the portable implementation."""
    own = copy.deepcopy(encoder)
    for module in own.modules():
        if isinstance(module, MultiLevelAttention):
            module.impl = "blocked"
    return own


def bert(models: Models, dtype: torch.dtype, *, attention: str) -> Encode:
    """MiniLM in transformers, its table of positions repeated up to the tokens of `models`."""
    transformers = require("transformers", extra="bench")
    _register()
    # its pooler runs along, on one token
    model = transformers.AutoModel.from_pretrained(
        models.dense.folder, attn_implementation=attention, dtype=dtype
    ).eval()
    table = model.embeddings.position_embeddings.weight
    rows = torch.arange(max(models.tokens, len(table))) % len(table)
    embeddings = model.embeddings
    embeddings.position_embeddings = nn.Embedding.from_pretrained(table.detach()[rows])
    embeddings.register_buffer("position_ids", torch.arange(len(rows))[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, len(rows), dtype=torch.int64), persistent=False)
    model.config.max_position_embeddings = len(rows)
    return _hidden_of(model)


def _longformer(models: Models, dtype: torch.dtype) -> Encode:
    transformers = require("transformers", extra="bench")
    config = transformers.LongformerConfig(
        **_sizes(), intermediate_size=1_536, attention_window=WINDOW, max_position_embeddings=models.tokens + 2,
        vocab_size=30_522, type_vocab_size=2, pad_token_id=0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _hidden_of(transformers.LongformerModel(config, add_pooling_layer=False).to(dtype).eval())


def _modernbert(models: Models, dtype: torch.dtype, *, attention: str) -> Encode:
    transformers = require("transformers", extra="bench")
    _register()
    config = transformers.ModernBertConfig(
        # gated feed-forward parts have three matrices in place of two
        **_sizes(), intermediate_size=1_024, local_attention=WINDOW, max_position_embeddings=models.tokens,
        vocab_size=30_522, pad_token_id=0, bos_token_id=101, eos_token_id=102, cls_token_id=101, sep_token_id=102,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        # the same weights for every kind of attention
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, attn_implementation=attention)
    return _hidden_of(model.to(dtype).eval())


def _sizes() -> dict[str, int]:
    return {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}


def _hidden_of(model: Any) -> Encode:
    return lambda ids: model(input_ids=ids).last_hidden_state


def _register() -> None:
    from trilevel.integrations.transformers import register

    register()


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and warnings of transformers' own: they would tear ours, and nothing of them is ours to report."""
    if importlib.util.find_spec("transformers") is None:
        yield
        return
    logging = require("transformers", extra="bench").utils.logging
    has_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
