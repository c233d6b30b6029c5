"""What the report shows of one summarised document: its units with their global tokens marked, and the level maps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trilevel.applications.documents.encoded import Encoded
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.passes import prepare
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import Kind, Unit
from trilevel.errors import ConfigError
from trilevel.report.content import GlobalToken, LevelMap, Piece, UnitKind, UnitView
from trilevel.report.level_map import Recorded, explain, level_maps, record_layers, spread

_KINDS: dict[Kind, UnitKind] = {
    Kind.TITLE: "title",
    Kind.HEADING: "heading",
    Kind.SENTENCE: "sentence",
    Kind.ITEM: "item",
}
_SHOWN_LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One pass of the model with everything it looked at; scores (units,), global tokens in the order of the text."""

    scores: np.ndarray
    global_tokens: tuple[GlobalToken, ...]
    level_maps: tuple[LevelMap, ...]


def look(
    model: DocumentModel,
    tokenizer: DocumentTokenizer,
    units: Sequence[Unit],
    encoded: Encoded,
    *,
    is_drawn: bool = True,
) -> Look:
    """Run the model once on a document and say what its levels looked at; `is_drawn` makes the level maps."""
    if model.encoder is None:
        raise ConfigError("the model's pretrained encoder is not attached; attach it first.")
    with record_layers(model.encoder) as tokens, record_layers(model.units) as sentences:
        scores = prepare(model, encoded, "trilevel")()
    maps: list[LevelMap] = []
    for recorded, name, element in ((tokens, "Tokens", "token"), (sentences, "Sentences", "sentence")):
        for index in spread(recorded, _SHOWN_LAYERS) if is_drawn else []:
            maps += level_maps(recorded[index], layer=f"{name}, layer {index + 1}", element=element)
    spans = token_spans(tokenizer, units, encoded)
    return Look(scores=scores, global_tokens=_global_tokens(tokens, units, encoded, spans), level_maps=tuple(maps))


def token_spans(tokenizer: DocumentTokenizer, units: Sequence[Unit], encoded: Encoded) -> list[tuple[int, int]]:
    """Where each token stands in the text of its unit, (start, end) by character."""
    counts = np.bincount(encoded.unit_ids, minlength=len(encoded.unit_prior))
    texts = [unit.text for unit in units[: len(counts)]]
    # of one package: the wrapped tokenizer alone knows offsets
    encodings = tokenizer._inner.encode_batch(texts, add_special_tokens=False)
    found: list[tuple[int, int]] = []
    for encoding, count in zip(encodings, counts, strict=True):
        # a unit without tokens stands as one padding token
        found += ([(start, end) for start, end in encoding.offsets] or [(0, 0)])[:count]
    return found


def _global_tokens(
    recorded: Sequence[Recorded], units: Sequence[Unit], encoded: Encoded, spans: list[tuple[int, int]]
) -> tuple[GlobalToken, ...]:
    layers: dict[int, list[int]] = defaultdict(list)
    why: dict[int, tuple[float, float, bool]] = {}
    for number, call in enumerate(recorded, start=1):
        if not (call.layer.levels and call.layer.levels.ratio.global_):
            continue
        seen = explain(call)
        for place, position in enumerate(seen.global_index[0].tolist()):
            if seen.global_valid[0, place]:
                layers[position].append(number)
                parts = (seen.global_score, seen.global_prior, seen.global_forced)
                score, prior, forced = (part[0, place].item() for part in parts)
                why.setdefault(position, (float(score), float(prior), bool(forced)))
    return tuple(
        GlobalToken(
            text=units[encoded.unit_ids[position]].text[slice(*spans[position])],
            position=position,
            layers=tuple(layers[position]),
            score=why[position][0],
            prior=why[position][1],
            is_forced=why[position][2],
        )
        for position in sorted(layers)
    )


def unit_views(
    units: Sequence[Unit],
    encoded: Encoded,
    spans: list[tuple[int, int]],
    *,
    chosen: Sequence[int],
    scores: np.ndarray,
    global_tokens: Sequence[GlobalToken],
) -> tuple[UnitView, ...]:
    """The units as the report shows them."""
    marks: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for token in global_tokens:
        marks[int(encoded.unit_ids[token.position])].append((*spans[token.position], token.reason))
    return tuple(
        UnitView(
            pieces=pieces(unit.text, marks[index]),
            kind=_KINDS[unit.kind],
            level=unit.level,
            is_chosen=index in chosen,
            opens_paragraph=unit.in_paragraph == 0,
            score=float(scores[index]),
        )
        for index, unit in enumerate(units[: len(scores)])
    )


def pieces(text: str, marks: Sequence[tuple[int, int, str]]) -> tuple[Piece, ...]:
    """Cut a text at its marks (start, end, reason); empty and overlapping ones are passed over.

    >>> [piece.text for piece in pieces("a key word", [(2, 5, "score")])]
    ['a ', 'key', ' word']
    """
    found: list[Piece] = []
    done = 0
    for start, end, reason in sorted(marks):
        if start < done or start >= end:
            continue
        found += [Piece(text=text[done:start]), Piece(text=text[start:end], reason=reason)]
        done = end
    found.append(Piece(text=text[done:]))
    return tuple(piece for piece in found if piece.text)
