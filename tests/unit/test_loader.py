"""Files and --set options become configurations, and mistakes become one line that helps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ssn.config import Config, flatten
from ssn.errors import SSNError
from ssn.loader import load_config
from tuning.search.space import FloatRange
from tuning.settings import SearchSettings, SweepSettings


def load_set(*sets: str) -> Config:
    return load_config(Config, sets=sets)


def error_of(*sets: str, cls: type = Config) -> str:
    with pytest.raises(SSNError) as caught:
        load_config(cls, sets=sets)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_given_gives_the_defaults() -> None:
    assert load_config(Config) == Config()
    assert load_config(SweepSettings) == SweepSettings()


def test_precedence_is_defaults_then_manifest_then_files_in_order_then_sets_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {epochs: 11, batch_size: 12}\nsynthesis.perlin_threshold: 0.3\n")
    second.write_text("train:\n  batch_size: 13\n")
    config = load_config(
        Config,
        defaults={"train.epochs": 1, "train.batch_size": 2, "train.train_seed": 3, "synthesis.perlin_threshold": 0.6},
        files=[first, second],
        sets=["train.label_seed=4", "train.label_seed=5"],
    )
    assert (config.train.epochs, config.train.batch_size, config.train.train_seed) == (11, 13, 3)
    assert config.train.label_seed == 5
    assert config.synthesis.perlin_threshold == 0.3
    assert config.train.lr_heads == Config().train.lr_heads


def test_every_field_survives_a_round_trip_through_set() -> None:
    changed = load_set(
        "model.variant=jims", "model.align_corners=true", "train.draws_per_epoch=77", "data.image_size=96"
    )
    text = [f"{key}={'null' if value is None else value}" for key, value in flatten(changed).items()]
    assert load_config(Config, sets=text) == changed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.lr_heads=1e-4", 1e-4),  # PyYAML reads a string
        ("train.lr_heads=1E-4", 1e-4),
        ("train.lr_heads=1", 1.0),
        ("train.epochs= 7 ", 7),
        ("train.draws_per_epoch=null", None),
        ("train.draws_per_epoch=None", None),
        ("data.image_size=256", (256, 256)),
        ("data.image_size=[64, 96]", (64, 96)),
        ("data.image_size=64,96", (64, 96)),
        ("model.layers=2", (2,)),
        ("model.layers=[1, 2, 3]", (1, 2, 3)),
        ("model.weights=/a b/w=1.safetensors", "/a b/w=1.safetensors"),
        ("model.weights=12", "12"),
        ("model.weights=s3://bucket/key?region=eu#x", "s3://bucket/key?region=eu#x"),
        ("data.antialias=false", False),
    ],
)
def test_set_reads_the_value_as_its_field_wants_it(text: str, value: Any) -> None:
    key = text.partition("=")[0]
    loaded = flatten(load_set(text))[key]
    loaded = tuple(loaded) if isinstance(loaded, list) else loaded
    assert loaded == value
    assert type(loaded) is type(value)


def test_scientific_notation_in_files_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "synthesis:\n  noise_sigma: 5e-2\nsearch:\n  space:\n    synthesis.noise_sigma: {low: 1e-3, high: 3e-1}\n"
    )
    settings = load_config(SweepSettings, files=[file])
    assert settings.synthesis.noise_sigma == 0.05
    assert settings.space()["synthesis.noise_sigma"] == FloatRange(0.001, 0.3)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("train.epoch=3", "train.epochs"),
        ("epochs=3", "train.epochs"),
        ("synthesis.sigma=0.1", "synthesis.noise_sigma"),
        ("modle.backbone=x", "model.backbone"),
        ("train.train_sed=1", "train.train_seed"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest_valid_one(text: str, nearest: str) -> None:
    message = error_of(text)
    assert text.partition("=")[0] in message
    assert f"did you mean {nearest}?" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=many", "an integer"),
        ("train.epochs=2.5", "an integer"),
        ("train.epochs=true", "an integer"),
        ("train.epochs=", "an integer"),
        ("train.lr_heads=fast", "a finite number"),
        ("train.lr_heads=.nan", "a finite number"),
        ("train.lr_heads=-.inf", "a finite number"),
        ("model.variant=cvpr", "icpr or jims"),
        ("data.image_size=[1, 2, 3]", "two integers"),
        ("data.image_size=[64, 64.5]", "two integers"),
        ("model.layers=[two]", "a list of integers"),
        ("model.align_corners=1", "true or false or null"),
        ("train.draws_per_epoch=x", "an integer or null"),
        ("train.epochs={a: 1}", "an integer"),
    ],
)
def test_a_wrong_type_names_key_value_and_expected_type(text: str, expected: str) -> None:
    key, _, value = text.partition("=")
    message = error_of(text)
    assert f"{key} is {value!r}, but must be {expected} " in message


def test_a_value_out_of_range_names_the_key() -> None:
    assert error_of("train.epochs=0") == "train.epochs is 0, but must be at least 1"
    assert "search.eta" in error_of("search.eta=1", cls=SweepSettings)
    assert "train.epochs" in error_of("train.epochs=0", cls=SweepSettings)


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train.epochs: 3", ""])
def test_set_without_key_or_equals_sign(text: str) -> None:
    assert "section.name=value" in error_of(text)


def test_a_section_is_not_a_setting(tmp_path: Path) -> None:
    assert "train is a section" in error_of("train=3")
    file = tmp_path / "c.yaml"
    file.write_text("train: 3\n")
    with pytest.raises(SSNError, match=r"train is 3, but it is a section and must hold keys such as train\.epochs"):
        load_config(Config, files=[file])


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("")
    assert load_config(Config, files=[file]) == Config()
    file.write_text("train:\n#  epochs: 3\n")
    assert load_config(Config, files=[file]) == Config()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [1\n", ["c.yaml line", "not valid YAML"]),
        (b"train: {epochs: 3}\ntrain: {epochs: 4}\n", ["line 2", "train occurs twice"]),
        (b"- train\n", ["must hold sections"]),
        (b"train: {epochs: \xff}\n", ["not UTF-8"]),
        (b"train: {epoch: 3}\n", ["train.epoch", "c.yaml", "did you mean train.epochs?"]),
        (b"train: {epochs: '3'}\n", ["train.epochs is '3'", "an integer"]),
        (b"train: {epochs: {value: 3}}\n", ["train.epochs", "an integer"]),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, words: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(SSNError) as caught:
        load_config(Config, files=[file])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SSNError, match=r"cannot read the configuration file .*none\.yaml: No such file"):
        load_config(Config, files=[tmp_path / "none.yaml"])


def test_an_unknown_manifest_default_is_refused() -> None:
    with pytest.raises(SSNError, match=r"unknown config key data\.size \(the dataset's defaults\)"):
        load_config(Config, defaults={"data.size": 3})


@dataclass(frozen=True)
class Needed:
    path: str


@dataclass(frozen=True)
class Outer:
    inner: Needed


def test_a_field_without_default_must_be_given() -> None:
    assert error_of(cls=Outer) == "inner.path has no default; give it with --set inner.path=..."
    assert load_config(Outer, sets=["inner.path=no"]) == Outer(Needed("no"))


def test_sweep_settings_nest_every_training_section() -> None:
    settings = load_config(
        SweepSettings,
        sets=[
            "train.epochs=9",
            "search.trials=3",
            "resources.use_gpu=false",
            "resources.num_workers=0",
            "objective.metric=mean(image_auroc, pixel_ap)",
        ],
    )
    assert settings.config() == load_set("train.epochs=9")
    assert settings.resources.use_gpu is False
    assert settings.resources.num_workers == 0
    assert set(flatten(Config())) < set(flatten(settings))
    assert {f.name for f in dataclasses.fields(Config)} < {f.name for f in dataclasses.fields(SweepSettings)}


def test_use_gpu_is_auto_or_a_truth_value() -> None:
    assert load_config(SweepSettings, sets=["resources.use_gpu=auto"]).resources.use_gpu == "auto"
    assert "auto or true or false" in error_of("resources.use_gpu=maybe", cls=SweepSettings)


def test_a_search_bound_can_be_switched_off_and_a_sweep_of_nothing_is_refused() -> None:
    off = ["search.space.synthesis.noise_sigma=null", "search.space.synthesis.perlin_threshold=null"]
    assert set(load_config(SweepSettings, sets=off).space()) == {"train.supervision_ratio"}
    nothing = [*off, "search.space.train.supervision_ratio=null"]
    assert "search.space leaves nothing to search" in error_of(*nothing, cls=SweepSettings)
    assert load_config(SweepSettings, sets=[*nothing, "search.trials=1"]).space() == {}


def test_a_source_that_names_one_key_of_a_mapping_keeps_the_rest(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "search:\n  space:\n    train.lr_heads: [1e-4, 2e-4]\n    train.epochs: [2, 300]\n"
        "  categories:\n    a.b: {train.lr_heads: 1e-4}\n    screw: {train.lr_heads: 1e-4, train.epochs: 300}\n"
    )
    second.write_text("search.space: {train.epochs: [300]}\nsearch.categories.screw: {train.epochs: 20}\n")
    search = load_config(
        SweepSettings,
        files=[first, second],
        sets=[
            "search.space.synthesis.noise_sigma={low: 1e-2, high: 0.1}",
            "search.space={train.truncation: [0.4, 0.5]}",
            "search.categories.screw.train.lr_heads=[1e-4, 2e-4]",
            "search.categories.tile={train.epochs: 30}",
        ],
    ).search
    assert search.space == {
        **SearchSettings().space,
        "synthesis.noise_sigma": {"low": "1e-2", "high": 0.1},
        "train.lr_heads": ["1e-4", "2e-4"],
        "train.epochs": [300],
        "train.truncation": [0.4, 0.5],
    }
    assert search.categories == {
        "a.b": {"train.lr_heads": "1e-4"},
        "screw": {"train.lr_heads": ["1e-4", "2e-4"], "train.epochs": 20},
        "tile": {"train.epochs": 30},
    }
    assert SearchSettings().space["synthesis.noise_sigma"] == {"low": 1e-3, "high": 0.3, "log": True}


def test_a_mapping_must_be_one(tmp_path: Path) -> None:
    expected = "search.space is [1, 2], but it must hold keys and their values (--set search.space=[1, 2])"
    assert error_of("search.space=[1, 2]", cls=SweepSettings) == expected
    assert "search.categories.screw is 3, but it must hold" in error_of("search.categories.screw=3", cls=SweepSettings)
    file = tmp_path / "c.yaml"
    file.write_text("search:\n  space:\n#    train.epochs: [2]\n  categories:\n    screw:\n")
    assert load_config(SweepSettings, files=[file]) == SweepSettings()


def test_an_unknown_key_of_the_search_space_names_the_nearest() -> None:
    message = error_of("search.space.synthesis.noise_sgima=0.1", cls=SweepSettings)
    assert message == "search.space: unknown config key 'synthesis.noise_sgima'; did you mean synthesis.noise_sigma?"
    message = error_of("search.categories.screw.train.epoch=1", cls=SweepSettings)
    assert message == "search.categories.screw: unknown config key 'train.epoch'; did you mean train.epochs?"
    message = error_of("search.space={synthesis: {noise_sigma: 1}}", cls=SweepSettings)
    assert (
        message
        == "search.space: synthesis is a section; write its keys whole and dotted, such as synthesis.noise_sigma"
    )


def test_grace_defaults_to_two_rungs() -> None:
    assert load_config(SweepSettings, sets=["train.epochs=90"]).rungs().epochs(90) == (10, 30)
    assert load_config(SweepSettings, sets=["train.epochs=4"]).rungs().epochs(4) == (1, 3)
    assert "in 1..4" in error_of("train.epochs=4", "search.grace_epochs=5", cls=SweepSettings)
