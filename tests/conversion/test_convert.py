"""Conversion from end to end, on a small model of transformers with random weights."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conversion.pretrained import VOCAB, make, save
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.conversion import convert as module
from trilevel.conversion.assign import HeadClass
from trilevel.conversion.convert import ConvertConfig, convert
from trilevel.conversion.converted import FILES, read_converted
from trilevel.conversion.fit import DistillBatches
from trilevel.conversion.judge import compare
from trilevel.conversion.load import load_encoder
from trilevel.conversion.source import Source, load_source
from trilevel.errors import CheckpointError, ConfigError, InputError, QualityError
from trilevel.training import loop
from trilevel.training.interrupt import TrainingInterrupted

pytest.importorskip("scipy", reason="scipy comes with the extra 'convert'")
pytest.importorskip("matplotlib", reason="matplotlib comes with the extra 'convert'")
CONFIG = ConvertConfig(
    levels=Levels(window=5, region_size=3, num_global_tokens=4, ratio=LevelRatio(1, 1, 1)),
    num_profiled=6, num_held_out=3, steps=6, batch_size=4, lengths=(31,), learning_rate=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(0)
    return load_source(save(make("bert"), tmp_path_factory.mktemp("bert")))


def sequences(count: int = 19) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(17, 41, (count,), generator=generator).tolist()
    return [torch.randint(5, VOCAB, (length,), generator=generator) for length in lengths]


def run(source: Source, out: Path | None = None, config: ConvertConfig = CONFIG) -> module.Conversion:
    return convert(source, sequences(), config, out=out, show_progress=False)


def test_what_is_written_is_read_back_and_computes_the_same(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    made = run(source, out)
    assert {path.name for path in out.iterdir()} == {*FILES, "config.json"} - {"preprocessor_config.json"}
    found = load_encoder(out)
    given = sequences()[0][None]
    with torch.no_grad():
        assert torch.equal(found.encoder(given), made.encoder(given))
    assert not found.encoder.training
    assert found.encoder.config == made.encoder.config
    assert (found.family, found.sha256, found.sentence) == (source.family, source.sha256, source.sentence)
    assert found.tokenizer.encode("w3 w5").ids == source.tokenizer.encode("w3 w5").ids
    assert (out / "head_map.png").read_bytes().startswith(b"\x89PNG")
    # nothing beside it
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def test_the_report_says_what_was_done(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    made = run(source, out)
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(made.report))
    assert report["heads_of_class"] == {"local": 3, "regional": 3, "global": 3, "dense": 0}
    head = report["layers"][1]["heads"][2]
    assert head["class"] == HeadClass(made.classes[1, 2]).name.lower()
    assert head["error_as"]["global"] == made.profile.error[1, 2, 2]
    assert head["near"] + head["sink"] + head["far"] == pytest.approx(1)
    cosine = compare(source.encoder, made.encoder, sequences()[::7][:3], source.sentence).cosine
    assert report["quality"]["loss"] == pytest.approx(1 - made.after.cosine)
    assert made.after.num_sequences == 3
    assert cosine > 0
    assert report["costs"][0]["tokens"] == 31
    assert report["costs"][0]["speedup"] > 0
    assert report["source"]["sha256"] == source.sha256


def test_distillation_brings_it_closer(source: Source) -> None:
    narrow = replace(CONFIG.levels, window=1, ratio=LevelRatio(1, 0, 0))
    made = run(source, config=replace(CONFIG, levels=narrow, steps=60))
    assert made.after.hidden_error < 0.8 * made.before.hidden_error
    # the teacher is the one that was given
    assert source.encoder.config.levels is None


def test_without_distillation_before_is_after(source: Source) -> None:
    made = run(source, config=replace(CONFIG, steps=0))
    assert made.before == made.after


def test_dense_heads_are_as_many_as_asked_for(source: Source) -> None:
    made = run(source, config=replace(CONFIG, steps=0, num_dense_heads=4))
    assert int((made.classes == HeadClass.DENSE).sum()) == 4
    dense = made.encoder.config.num_dense_heads
    assert isinstance(dense, tuple)
    # a layer of three dense heads has no levels, and counts none beside them
    assert sum(dense) + 3 * int((made.classes == HeadClass.DENSE).all(1).sum()) == 4


def test_the_error_bound_decides_the_ratio(source: Source) -> None:
    tight = run(source, config=replace(CONFIG, steps=0, max_error=0.0))
    assert (tight.classes == HeadClass.DENSE).all()
    assert tight.after.cosine == pytest.approx(1)
    loose = run(source, config=replace(CONFIG, steps=0, max_error=1e9, lengths=(997,)))
    assert (loose.classes == HeadClass.LOCAL).all()
    middle = run(source, config=replace(CONFIG, steps=0, max_error=0.004, lengths=(997,)))
    assert middle.report["profiled_error"] <= 0.004
    assert len(np.unique(middle.classes)) > 1


@pytest.mark.parametrize("family", ["roberta", "distilbert", "modernbert"])
def test_other_families_of_text(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = load_source(save(make(family), tmp_path / "original"))
    made = run(other, tmp_path / "converted", replace(CONFIG, steps=2))
    # ModernBERT's sliding layers stay what they are
    assert len(made.classes) == (2 if family == "modernbert" else 3)
    assert read_converted(tmp_path / "converted").family == family


def test_images_convert_from_tensors(tmp_path: Path) -> None:
    torch.manual_seed(1)
    vit = load_source(save(make("vit"), tmp_path / "original"))
    pixels = list(torch.randn(11, 2, 10, 21, generator=torch.Generator().manual_seed(3)))
    made = convert(vit, pixels, replace(CONFIG, steps=0), out=tmp_path / "converted", show_progress=False)
    # one length: the tokens of an image
    assert [cost.tokens for cost in made.costs] == [vit.trained_tokens]
    found = load_encoder(tmp_path / "converted")
    assert (found.tokenizer, found.preprocessor) == (None, None)


# interruptions and refusals


def test_an_interrupted_distillation_goes_on_to_the_same_result(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(source, tmp_path / "whole", replace(CONFIG, steps=8))
    real = loop.fit
    seen: list[int] = []

    def stopped(*arguments: object, **options: object) -> object:
        class Stops(DistillBatches):
            def batch(self, step: int) -> dict[str, Tensor]:
                seen.append(step)
                if step == 5 and len(seen) == 6:
                    signal.raise_signal(signal.SIGINT)
                return super().batch(step)

        given = arguments[1]
        assert isinstance(given, DistillBatches)
        stops = Stops(**{name: getattr(given, name) for name in ("sequences", "batch_size", "padding_id", "seed")})
        return real(arguments[0], stops, *arguments[2:], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit", stopped)
    out = tmp_path / "stopped"
    with pytest.raises(TrainingInterrupted, match="Run the same command again"):
        run(source, out, replace(CONFIG, steps=8))
    assert not out.exists()
    assert (tmp_path / ".stopped.work" / "checkpoint").is_dir()
    resumed = run(source, out, replace(CONFIG, steps=8))
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7]
    for name, tensor in whole.encoder.state_dict().items():
        assert torch.equal(tensor, resumed.encoder.state_dict()[name]), name
    assert not (tmp_path / ".stopped.work").exists()


def test_the_state_of_another_conversion_is_not_gone_on_from(source: Source, tmp_path: Path) -> None:
    work = tmp_path / ".converted.work"
    work.mkdir()
    (work / "conversion.sha256").write_text("of another")
    (work / "checkpoint").write_text("what is left of another")
    run(source, tmp_path / "converted")
    assert not work.exists()


def test_a_model_above_the_bound_is_not_written(source: Source, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"max_loss=0\.0 is allowed; nothing is written"):
        run(source, tmp_path / "converted", replace(CONFIG, max_loss=0.0))
    assert not (tmp_path / "converted").exists()
    run(source, tmp_path / "converted", replace(CONFIG, max_loss=2.0))
    assert (tmp_path / "converted").exists()


def test_what_else_lies_at_the_place_is_left_alone(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="left alone"):
        run(source, out, replace(CONFIG, steps=0))
    assert (out / "thesis.tex").read_text() == "years of work"


def test_an_old_conversion_is_replaced(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    run(source, out, replace(CONFIG, steps=0))
    run(source, out, replace(CONFIG, steps=0, num_dense_heads=9))
    assert read_converted(out).encoder.config.levels == (None, None, None)


def test_a_changed_file_is_refused(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    run(source, out, replace(CONFIG, steps=0))
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        load_encoder(out)
    with pytest.raises(CheckpointError, match="no converted encoder at"):
        read_converted(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_profiled": 0}, "num_profiled=0 must be >= 1"),
        ({"steps": -1}, "steps=-1 must be >= 0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 > 0"),
        ({"levels": Levels(dense_below=99)}, "dense_below hides"),
        ({"max_error": -1.0}, r"max_error=-1\.0 must be >= 0"),
        ({"max_error": 1.0, "num_dense_heads": 2}, "leave num_dense_heads=2 at 0"),
        ({"max_loss": 3.0}, r"max_loss=3\.0 must lie in \[0, 2\]"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_too_little_to_learn_from_is_refused(source: Source) -> None:
    with pytest.raises(InputError, match="too few to hold 3 out"):
        convert(source, sequences(2), CONFIG)
    with pytest.raises(InputError, match="2 sequences remain to learn from; 4 or more"):
        convert(source, sequences(5), CONFIG)


def test_nothing_to_convert_is_said(source: Source, tmp_path: Path) -> None:
    run(source, tmp_path / "converted", replace(CONFIG, steps=0))
    with pytest.raises(ConfigError, match="has no dense attention to convert"):
        run(load_encoder(tmp_path / "converted"))
