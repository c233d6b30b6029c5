"""Plans: what a file means, and every way in which it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compression.tasks import FULL, plan_of
from trilevel.compression.distill import DistillConfig
from trilevel.compression.plan import CompressionPlan, Recovery, Scan, Stage, read_plan
from trilevel.compression.prune import PruneConfig
from trilevel.compression.quantize import QuantizeConfig
from trilevel.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("compress-*.toml"))


def test_a_file_is_its_stages_in_the_order_they_run(tmp_path: Path) -> None:
    # the order of the tables does not count
    parts = FULL.split("[quantize]\n")
    plan = plan_of(tmp_path, "[quantize]\n" + parts[1] + parts[0])
    assert plan == plan_of(tmp_path, FULL)
    prune, distill, quantize = plan.stages
    assert prune.config == PruneConfig(keep_heads=0.7, keep_ffn=0.5, multiple=8)
    assert (prune.recovery.steps, prune.recovery.train.learning_rate) == (7, 1e-3)
    assert (distill.config, distill.recovery.steps) == (DistillConfig(layers=(0, -1)), 5)
    assert plan.losses == distill.config
    assert quantize.config == QuantizeConfig()
    assert quantize.scan is None
    assert dict(plan.data) == {"batch_size": 16, "crop_padding": 1}


def test_distill_without_training_only_says_what_is_learned(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "[quantize]\n[quantize.train]\nepochs = 2\n[distill]\ntemperature = 3.0\n")
    assert [stage.name for stage in plan.stages] == ["quantize"]
    assert plan.losses == DistillConfig(temperature=3.0)
    train = plan.stages[0].recovery.config(lambda epochs: 50 * epochs, seed=3)
    assert (train.steps, train.warmup_steps, train.seed) == (100, 10, 3)
    # smaller steps than a pruned model gets
    assert train.learning_rate < Recovery().train.learning_rate


def test_none_and_the_scan_are_words_of_the_file(tmp_path: Path) -> None:
    text = "[quantize]\nactivations = 'none'\nsmooth = 'none'\nweight_bits = 4\nskip = ['head']\nmax_skips = 2\n"
    (stage,) = plan_of(tmp_path, text).stages
    assert stage.config == QuantizeConfig(activations=None, smooth=None, weight_bits=4, skip=("head",))
    assert stage.scan == Scan(max_skips=2)


def test_a_plan_is_json(tmp_path: Path) -> None:
    import json

    plan = plan_of(tmp_path, FULL)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values == plan.to_dict()
    assert values["prune"]["config"]["keep_heads"] == 0.7
    assert values["losses"]["layers"] == [0, -1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_are_plans(path: Path) -> None:
    plan = read_plan(path)
    assert plan.stages[-1].name == "quantize"
    assert plan.losses is not None


def test_there_is_a_recipe_for_each_application() -> None:
    kinds = {path.stem.removeprefix("compress-") for path in RECIPES}
    assert kinds == {"images", "classification", "documents", "embedding"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the plan does nothing"),
        ("[distill]\n", "the plan does nothing"),
        ("[purne]\n", "unknown table purne; known are prune, exits, distill, quantize and data"),
        ("[prune]\nkeep_head = 0.5\n", r"\[prune\] PruneConfig: unknown key 'keep_head'"),
        ("[prune]\nkeep_heads = 0.0\n", r"\[prune\] PruneConfig: keep_heads=0.0 must lie in \(0, 1\]"),
        ("[prune]\nkeep_ffn = 1.5\n", r"\[prune\] PruneConfig: keep_ffn=1.5 must lie in \(0, 1\]"),
        ("[prune]\nkeep_ffn = 'half'\n", r"\[prune\] PruneConfig: a value has the wrong type"),
        ("[quantize]\nweight_bits = 3\n", r"\[quantize\] .*weight_bits=3"),
        ("[quantize]\nbits = 8\n", r"\[quantize\] QuantizeConfig: unknown key 'bits'"),
        ("[quantize]\nskip_budget = -0.1\n", r"\[quantize\] skip_budget=-0.1 must be >= 0"),
        ("[quantize]\nmax_skips = 0\n", r"\[quantize\] max_skips=0"),
        ("[quantize]\nscan_examples = 5\n", r"\[quantize\] scan_examples needs skip_budget or max_skips"),
        ("[prune]\n[prune.train]\nsteps = -1\n", r"\[prune.train\] Recovery: steps=-1"),
        ("[prune]\n[prune.train]\nsteps = 1\nepochs = 1\n", r"\[prune.train\] .*both given"),
        ("[prune]\n[prune.train]\nsteps = 1\nwarmup_fraction = 1.0\n", r"\[prune.train\] .*warmup_fraction=1.0"),
        ("[prune]\n[prune.train]\nstep = 1\n", r"\[prune.train\] TrainConfig: unknown key 'step'"),
        (
            "[prune]\n[prune.train]\nsteps = 1\nlearning_rate = 0.0\n",
            r"\[prune.train\] .*learning_rate=0.0 must be > 0",
        ),
        ("[prune]\n[prune.train]\nlearning_rate = 1.0\n", r"\[prune.train\] says how to train but not how long"),
        ("[prune]\n[prune.train]\nsteps = 1\nwarmup_steps = 1\n", "warmup_steps follows from warmup_fraction"),
        ("[prune]\n[prune.train]\nsteps = 1\nseed = 1\n", "seed follows from the option --seed"),
        ("[distill]\nlayers = 'all'\n[prune]\n", r"\[distill\] "),
        ("[distill]\nhead_weight = 0.5\n[prune]\nkeep_heads = 0.5\n", "keep_heads=0.5 takes some away"),
        ("[[quantize]]\n[[quantize]]\n", r"quantize must be one table, written \[quantize\]; each stage .* once"),
        ("prune = 0.5\n", "prune must be one table"),
        ("[quantize]\n[quantize]\n", "not TOML"),
    ],
)
def test_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        plan_of(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'plan.toml'}: ")
    assert str(caught.value).count("plan.toml") == 1


def test_a_missing_file_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe there .* --plan"):
        read_plan(tmp_path / "none.toml")


def test_stages_in_another_order_or_twice() -> None:
    rounded = Stage(name="quantize", config=QuantizeConfig())
    for stages in ((rounded, rounded), (rounded, Stage(name="prune", config=PruneConfig()))):
        with pytest.raises(ConfigError, match="each once, in the order prune, exits, distill, quantize"):
            CompressionPlan(stages=stages)
    with pytest.raises(ConfigError, match="distill without training is nothing"):
        CompressionPlan(stages=(Stage(name="distill", config=DistillConfig()),), losses=DistillConfig())
