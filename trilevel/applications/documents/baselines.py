"""What a model has to beat: Lead, Random, LexRank, TextRank, embeddings; all as rankings of the same sentences."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trilevel.applications.documents.units import words_of
from trilevel.conversion.embedder import Embedder
from trilevel.data.places import cache_dir
from trilevel.errors import require

# a ranking stored by another version is made anew
_VERSION = 1


def lead(sentences: Sequence[str]) -> list[int]:
    """Document order."""
    return list(range(len(sentences)))


def random(sentences: Sequence[str], *, seed: int = 0) -> list[int]:
    """An order drawn from the seed and the number of sentences."""
    return [int(i) for i in np.random.default_rng((seed, len(sentences))).permutation(len(sentences))]


def lexrank(sentences: Sequence[str]) -> list[int]:
    """LexRank by `sumy` (cosine of tf-idf, threshold 0.1), rankings cached on disk by the sentences' hash.

    Raises:
        MissingExtraError: `sumy` is not installed (extra `baselines`).
    """
    return _cached("lexrank", sentences, lambda: _by_sumy("lex_rank", "LexRankSummarizer", sentences))


def textrank(sentences: Sequence[str]) -> list[int]:
    """TextRank by `sumy` (shared words over log lengths), rankings cached on disk by the sentences' hash.

    Raises:
        MissingExtraError: `sumy` is not installed (extra `baselines`).
    """
    return _cached("textrank", sentences, lambda: _by_sumy("text_rank", "TextRankSummarizer", sentences))


def centroid(embedder: Embedder) -> Callable[[Sequence[str]], list[int]]:
    """By similarity of each sentence's embedding to the mean of all, rankings cached by encoder and sentences.

    Each sentence is embedded alone and cut where the encoder was trained to cut; vectors have length one before the
    mean is taken. Source: centroid-based summarisation, Rossiello et al. 2017, with sentence embeddings.
    """
    source = embedder.source

    def rank(sentences: Sequence[str]) -> list[int]:
        vectors = F.normalize(embedder.embed(sentences, max_tokens=source.sentence.max_tokens), dim=-1)
        nearness = vectors @ F.normalize(vectors.mean(0), dim=0)
        return [int(i) for i in torch.argsort(-nearness, stable=True)]

    return lambda sentences: _cached(f"centroid-{source.sha256[:16]}", sentences, lambda: rank(sentences))


RANKINGS: dict[str, Callable[[Sequence[str]], list[int]]] = {
    "lead": lead,
    "random": random,
    "lexrank": lexrank,
    "textrank": textrank,
}


def _cached(name: str, sentences: Sequence[str], make: Callable[[], list[int]]) -> list[int]:
    digest = hashlib.sha256("\x1e".join([str(_VERSION), *sentences]).encode()).hexdigest()[:32]
    folder = cache_dir() / "rankings" / name
    path = folder / f"{digest}.json"
    if path.exists():
        return [int(i) for i in json.loads(path.read_text(encoding="utf-8"))]
    ranking = make()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ranking), encoding="utf-8")
    return ranking


def _by_sumy(module: str, name: str, sentences: Sequence[str]) -> list[int]:
    """Rank by a summarizer of sumy; our own sentences and words go in, so only the ranking is sumy's."""
    with warnings.catch_warnings():
        # sumy imports a deprecated part of setuptools
        warnings.simplefilter("ignore")
        summarizers = require(f"sumy.summarizers.{module}", extra="baselines")
        dom = require("sumy.models.dom", extra="baselines")
        stem = require("sumy.nlp.stemmers", extra="baselines").Stemmer("english")
        stop_words = require("sumy.utils", extra="baselines").get_stop_words("english")
    tokenizer = _Words()
    parsed = [dom.Sentence(sentence, tokenizer) for sentence in sentences]
    document = dom.ObjectDocumentModel([dom.Paragraph(parsed)])
    summarizer = getattr(summarizers, name)(stem)
    summarizer.stop_words = stop_words
    return _ranked(summarizer, document, len(parsed))


class _Words:
    """The tokenizer that sumy asks for: our words, and sentences that are never split again."""

    def to_words(self, text: str) -> tuple[str, ...]:
        return tuple(words_of(text))

    def to_sentences(self, text: str) -> tuple[str, ...]:
        return (text,)


def _ranked(summarizer: Any, document: Any, count: int) -> list[int]:
    """All sentences by falling rating, ties by position."""
    ratings: dict[int, float] = {}

    def keep(sentences: Any, _count: int, rating: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        for index, sentence in enumerate(sentences):
            ratings[index] = float(rating[sentence] if isinstance(rating, dict) else rating(sentence))
        return ()

    # both summarizers hand their ratings to this method last
    summarizer._get_best_sentences = keep
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summarizer(document, count)
    return sorted(range(count), key=lambda i: (-ratings.get(i, float("-inf")), i))
