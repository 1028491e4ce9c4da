"""Search spaces as they are written, their conditions, and what a category's data make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssn.config import Config, ModelConfig, flatten
from ssn.data.sampling import attainable_ratios
from ssn.errors import SSNError
from ssn.loader import load_config
from tests.made_up_benchmark import make_info
from tuning.execution.weights import weights_key
from tuning.search.feature_groups import FEATURE_KEYS, category_space, enumerate_configs, models_of
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import (
    RATIO_KEY,
    WEAK_KEY,
    AttainableRatio,
    CategorySpace,
    Choice,
    Condition,
    Fixed,
    FloatRange,
    Follows,
    IntRange,
    check_combinations,
    describe_axis,
    order_axes,
    resolve_space,
    validate_space,
)
from tuning.search.space_syntax import parse_space
from tuning.settings import SearchSettings, SweepSettings

RESNET, WIDE = "resnet18.tv_in1k", "wide_resnet50_2.tv_in1k"
IS_JIMS = Condition("model.variant", "in", ("jims",))


@pytest.mark.parametrize(
    ("key", "written", "axis", "described"),
    [
        (
            "synthesis.noise_sigma",
            {"low": "1e-3", "high": 0.3, "log": True},
            FloatRange(1e-3, 0.3, log=True),
            "0.001 to 0.3, log",
        ),
        ("train.lr_heads", {"low": "1e-4", "high": 1}, FloatRange(1e-4, 1.0), "0.0001 to 1"),
        ("train.batch_size", {"low": 8, "high": 32, "step": 8}, IntRange(8, 32, step=8), "8 to 32 in steps of 8"),
        (
            "model.seg_channels",
            {"low": "8", "high": 64, "log": True},
            IntRange(8, 64, log=True),
            "8 to 64, log",
        ),
        ("model.variant", ["icpr", "jims"], Choice(("icpr", "jims")), "icpr | jims"),
        ("train.lr_heads", ["1e-4", 2], Choice((1e-4, 2.0)), "0.0001 | 2"),
        ("train.draws_per_epoch", [None, 64], Choice((None, 64)), "null | 64"),
        ("data.antialias", {"values": [True, False]}, Choice((True, False)), "true | false"),
        ("model.layers", [[2, 3], [1, 2]], Choice(((2, 3), (1, 2))), "[2, 3] | [1, 2]"),
        ("data.image_size", {"values": [256, [128, 64]]}, Choice(((256, 256), (128, 64))), "[256, 256] | [128, 64]"),
        (RATIO_KEY, "attainable", AttainableRatio(), "attainable ratios within 0 to 1"),
        (RATIO_KEY, {"attainable": [0.5, 1]}, AttainableRatio(0.5, 1.0), "attainable ratios within 0.5 to 1"),
        ("train.lr_heads", "2e-4", Fixed(2e-4), "0.0002"),
        ("model.layers", {"value": [1, 2]}, Fixed((1, 2)), "[1, 2]"),
        (
            "model.weights",
            {"follows": "model.backbone", "values": {RESNET: "a.safetensors", WIDE: "b.safetensors"}},
            Follows("model.backbone", ((RESNET, "a.safetensors"), (WIDE, "b.safetensors"))),
            f"a.safetensors with {RESNET} | b.safetensors with {WIDE}",
        ),
        (
            "train.truncation",
            {"low": 0.1, "high": 0.5, "when": {"model.variant": "jims"}},
            FloatRange(0.1, 0.5, when=(IS_JIMS,)),
            "0.1 to 0.5, when model.variant is jims",
        ),
        (
            WEAK_KEY,
            {"values": ["drop", "use"], "when": {RATIO_KEY: "< 1"}},
            Choice(("drop", "use"), (Condition(RATIO_KEY, "<", (1.0,)),)),
            "drop | use, when train.supervision_ratio < 1",
        ),
        (
            "train.batch_size",
            {"values": [8, 16], "when": {"train.epochs": [2, 3], "model.layers": [1, 2], "model.variant": "!= jims"}},
            Choice(
                (8, 16),
                (
                    Condition("train.epochs", "in", (2, 3)),
                    Condition("model.layers", "in", ((1, 2),)),
                    Condition("model.variant", "!=", ("jims",)),
                ),
            ),
            "8 | 16, when train.epochs is 2 or 3, when model.layers is [1, 2], when model.variant != jims",
        ),
    ],
)
def test_every_form_of_an_axis(key: str, written: Any, axis: Any, described: str) -> None:
    space = parse_space({key: written})
    assert space == {key: axis}
    assert describe_axis(space[key]) == described
    validate_space(space)


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        ("train.lr_heads", {"lo": 1}, "has lo, but an axis has low and high, values, value"),
        ("train.lr_heads", {}, "has nothing, but an axis has"),
        ("train.lr_heads", {"low": 1e-4}, "has low, but no high"),
        ("train.lr_heads", {"low": 1e-4, "high": 1, "lgo": True}, "has no field 'lgo' beside 'low'; did you mean log?"),
        ("train.lr_heads", {"value": 1, "when": {}}, "has no field 'when' beside 'value'; there are value"),
        ("train.lr_heads", {"low": 1e-4, "high": 1, "log": "yes"}, r"train\.lr_heads\.log is 'yes', but must be true"),
        ("train.lr_heads", {"low": 1e-4, "high": 1, "step": 2}, "is continuous, so it has no step"),
        ("train.lr_heads", {"low": "small", "high": 1}, r"train\.lr_heads is 'small', but must be a finite number"),
        ("train.lr_heads", [1e-4, "much"], r"train\.lr_heads is 'much', but must be a finite number"),
        ("train.batch_size", {"low": 8, "high": 9, "step": 1.5}, "step is 1.5, but must be an integer"),
        ("train.batch_size", [8, 8.5], "train.batch_size is 8.5, but must be an integer"),
        ("train.draws_per_epoch", {"low": None, "high": 9}, "both ends must be numbers"),
        ("train.epochs", {"low": 3, "high": 9}, "trials compare only with trials as long; give a list"),
        ("model.variant", {"low": 1, "high": 2}, "is not a number, so it has no range"),
        ("model.variant", ["icpr", "cvpr"], "model.variant is 'cvpr', but must be icpr or jims"),
        ("model.variant", {"values": "icpr"}, "has the values 'icpr', but they must be a list"),
        ("model.layers", [1, 2], r"may be one value or several; write \{value: \[1, 2\]\} for one"),
        ("data.image_size", [128, 256], "may be one value or several"),
        (RATIO_KEY, {"attainable": 0.5}, "attainable is 0.5, but must be two ratios"),
        ("train.lr_heads", "attainable", "cannot be 'attainable'"),
        ("train.train_seed", [0, 1], "the same for all trials"),
        ("eval.size", [[64, 64]], "the same for all trials"),
        ("eval.batch_size", 3, "the same for all trials"),
        ("train.lr_heads", {"values": [1], "when": "x"}, "when is 'x', but must be keys and conditions"),
        ("train.lr_heads", {"values": [1], "when": {"train.epoch": 1}}, "did you mean train.epochs"),
        ("train.lr_heads", {"values": [1], "when": {"model.variant": "< 2"}}, "model.variant is '2'"),
        ("train.lr_heads", {"values": [1], "when": {"model.backbone": "< 2"}}, "model.backbone, which is not a number"),
        ("train.lr_heads", {"values": [1], "when": {"train.lr_heads": "< 2"}}, "in a circle"),
        ("model.weights", {"follows": "model.backbone", "values": ["a"]}, "must be a mapping from those of"),
        ("model.weights", {"follows": "model.backbon", "values": {}}, "did you mean model.backbone"),
        ("model.weights", {"follows": "model.backbone", "values": {}}, "has no values"),
    ],
)
def test_an_axis_that_cannot_be_read_is_one_line(key: str, written: Any, message: str) -> None:
    with pytest.raises(SSNError, match=message) as caught:
        validate_space(parse_space({key: written}))
    assert "\n" not in str(caught.value)
    assert "search.space" in str(caught.value)


def test_a_key_is_not_searched_once_it_is_null() -> None:
    settings = SweepSettings(search=SearchSettings(space={"train.lr_heads": None, "model.variant": ["icpr", "jims"]}))
    assert set(settings.space()) == {"model.variant"}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"model.backbone": [RESNET, WIDE], "model.weights": {"follows": "model.backbone", "values": {WIDE: "a"}}},
            f"model.weights has no value for model.backbone={RESNET}; name it",
        ),
        (
            {
                "train.lr_heads": {"low": 1e-4, "high": 1e-3},
                "train.truncation": {"follows": "train.lr_heads", "values": {1e-4: 0.5}},
            },
            "follows train.lr_heads, which must be a list of values then",
        ),
        (
            {
                "train.lr_heads": {"values": [1e-4], "when": {"model.variant": "jims"}},
                "model.variant": {"values": ["icpr", "jims"], "when": {"train.lr_heads": "< 1"}},
            },
            "train.lr_heads and model.variant depend on each other in a circle",
        ),
        (
            {"train.sampling": ["balanced", "official"], "train.draws_per_epoch": [None, 32]},
            "train.draws_per_epoch is 32, but must be null with train.sampling=official",
        ),
    ],
)
def test_axes_that_do_not_go_together(space: dict[str, Any], message: str) -> None:
    with pytest.raises(SSNError, match=message):
        SweepSettings(search=SearchSettings(space=space))


def test_a_condition_keeps_apart_what_does_not_go_together() -> None:
    space = parse_space(
        {
            "train.draws_per_epoch": {"values": [None, 32], "when": {"train.sampling": "balanced"}},
            "train.sampling": ["balanced", "official"],
        }
    )
    check_combinations(space, flatten(Config()))
    assert order_axes(space) == ["train.sampling", "train.draws_per_epoch"]


def test_every_space_is_checked_before_anything_starts() -> None:
    own = {"screw": {"train.lr_heads": {"low": 1.0, "high": 0.5}}}
    with pytest.raises(SSNError, match=r"^search\.categories\.screw: train\.lr_heads is 1\.0\.\.0\.5, but low must be"):
        SweepSettings(search=SearchSettings(categories=own))
    shortest = {"screw": {"train.epochs": [4, 300]}}
    with pytest.raises(SSNError, match=r"search\.grace_epochs is 5, but must be in 1\.\.4"):
        SweepSettings(search=SearchSettings(grace_epochs=5, categories=shortest))
    nothing = {"screw": dict.fromkeys(SearchSettings().space)}
    with pytest.raises(SSNError, match=r"search\.categories\.screw leaves nothing to search"):
        SweepSettings(search=SearchSettings(categories=nothing))


def test_a_category_may_differ_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "search:\n"
        "  space: {train.epochs: [100, 300], synthesis.perlin_threshold: null}\n"
        "  categories:\n"
        "    screw: {train.epochs: 40, synthesis.perlin_threshold: {low: 0.1, high: 0.3}}\n"
    )
    settings = load_config(SweepSettings, files=[file])
    assert list(settings.space("tile")) == ["synthesis.noise_sigma", RATIO_KEY, "train.epochs"]
    assert settings.space("tile") == settings.space()
    screw = settings.space("screw")
    assert screw["synthesis.noise_sigma"] == FloatRange(1e-3, 0.3, log=True)
    assert (screw["train.epochs"], screw["synthesis.perlin_threshold"]) == (Fixed(40), FloatRange(0.1, 0.3))
    assert (settings.epochs("tile"), settings.epochs("screw")) == ([100, 300], [40])
    resolved = category_space(settings, make_info("screw", masks=2))
    assert resolved.base["train.epochs"] == 40
    assert "train.epochs" not in resolved.axes


def resolve(space: dict[str, Any], num_masks: int = 4, **changes: Any) -> CategorySpace:
    return resolve_space(
        parse_space(space),
        category="screw",
        base=flatten(Config()) | changes,
        attainable=attainable_ratios(num_masks),
        num_defective=num_masks,
    )


def test_an_axis_that_never_applies_is_not_searched_with_a_notice() -> None:
    jims = {"train.truncation": {"low": 0.1, "high": 0.4, "when": {"model.variant": "jims"}}}
    found = resolve(jims)
    assert dict(found.axes) == {}
    assert found.notices == ("screw: model.variant is jims in no trial, so train.truncation is not searched",)
    # the default lies outside of the range, which does not apply to it
    assert set(resolve({**jims, "model.variant": ["icpr", "jims"]}).axes) == {"train.truncation", "model.variant"}
    with pytest.raises(
        SSNError, match=r"screw: the default train\.truncation=0\.5 is not in the search space \(0\.1 to"
    ):
        resolve(jims, **{"model.variant": "jims"})


@pytest.mark.parametrize(
    ("condition", "searched"),
    [("< 0.2", True), ("<= 0.001", True), ("< 0.001", False), ("> 0.3", False), (">= 0.3", True), ("!= 0.1", True)],
)
def test_conditions_on_ranges(condition: str, searched: bool) -> None:
    space = {
        "synthesis.noise_sigma": {"low": 1e-3, "high": 0.3},
        "train.truncation": {"low": 0.1, "high": 0.9, "when": {"synthesis.noise_sigma": condition}},
    }
    assert ("train.truncation" in resolve(space).axes) == searched


def test_what_follows_is_part_of_the_first_trial_too() -> None:
    space = {
        "model.backbone": [RESNET, WIDE],
        "model.weights": {"follows": "model.backbone", "values": {RESNET: "r.safetensors", WIDE: "w.safetensors"}},
        "train.lr_heads": "3e-4",
    }
    found = resolve(space)
    assert (found.base["model.weights"], found.base["train.lr_heads"]) == ("w.safetensors", 3e-4)
    assert resolve(space, **{"model.backbone": RESNET}).base["model.weights"] == "r.safetensors"
    assert [m.weights for m in models_of(found)] == ["r.safetensors", "w.safetensors"]
    with pytest.raises(SSNError, match=r"screw: model\.weights has no value for model\.backbone=resnet34; name it"):
        resolve({"model.weights": space["model.weights"]}, **{"model.backbone": "resnet34"})


# What trials get of it.


def search_of(space: CategorySpace, trials: int) -> MultiplexSearcher:
    digests = {weights_key(model): f"digest of {model.backbone}" for model in models_of(space)}
    one = CategorySearch("screw", space.base, space.axes, "data", digests, 0)
    return MultiplexSearcher([one], sweep_id="sweep", trials_per_category=trials)


def drive(space: CategorySpace, trials: int = 40) -> list[dict[str, Any]]:
    search, found = search_of(space, trials), []
    while (suggestion := search.suggest(f"t{len(found)}")) != "FINISHED":
        found.append(suggestion)
        epochs = suggestion["config"]["train.epochs"]
        search.on_trial_complete(f"t{len(found) - 1}", {"epoch": epochs, "objective": 0.5})
    assert {record.state for record in search.records()} == {"complete"}, "at its own number of epochs"
    return found


def test_trials_are_consistent_in_everything_that_depends() -> None:
    space = resolve(
        {
            "model.backbone": [RESNET, WIDE],
            "model.weights": {"follows": "model.backbone", "values": {RESNET: "r.safetensors", WIDE: "w.safetensors"}},
            "model.layers": [[2, 3], [1, 2]],
            "model.variant": ["icpr", "jims"],
            "train.truncation": {"low": 0.1, "high": 0.9, "when": {"model.variant": "jims"}},
            "train.batch_size": {"low": 8, "high": 32, "step": 8},
            "train.epochs": [100, 300],
        }
    )
    trials = drive(space)
    assert len(trials) == 40
    assert trials[0]["config"] == flatten(Config(model=ModelConfig(weights="w.safetensors")).resolved())
    seen = {key: {str(t["config"][key]) for t in trials} for key in space.axes}
    assert [len(seen[k]) for k in ("model.backbone", "model.layers", "model.variant", "train.epochs")] == [2, 2, 2, 2]
    assert seen["train.batch_size"] <= {"8", "16", "24", "32"}
    for trial in trials:
        config = trial["config"]
        jims = config["model.variant"] == "jims"
        assert config["model.weights"] == ("r" if config["model.backbone"] == RESNET else "w") + ".safetensors"
        assert (config["data.antialias"], config["model.align_corners"]) == (jims, not jims)
        assert jims or config["train.truncation"] == 0.5
        assert trial["tags"]["backbone"] == config["model.backbone"]
        assert trial["tags"]["backbone_digest"] == f"digest of {config['model.backbone']}"
    assert len({t["trial_key"] for t in trials}) == 40


def test_identity_is_of_the_trials_own_backbone() -> None:
    space = resolve({"model.backbone": [RESNET, WIDE]})

    def identity(backbone: str, wide_digest: str) -> str:
        digests = {weights_key(m): wide_digest if m.backbone == WIDE else "r" for m in models_of(space)}
        search = CategorySearch("screw", space.base, space.axes, "data", digests, 0)
        return search.identity({**space.base, "model.backbone": backbone})

    assert identity(RESNET, "w") == identity(RESNET, "other")
    assert identity(WIDE, "w") != identity(WIDE, "other")


def test_a_single_backbone_is_not_said_again() -> None:
    tags = drive(resolve({"train.lr_heads": [2e-4, 3e-4]}), 2)[0]["tags"]
    assert not {"backbone", "backbone_digest"} & set(tags)


# Features.


def test_feature_groups_are_those_that_trials_can_have() -> None:
    space = resolve(
        {
            "model.backbone": [RESNET, WIDE],
            "model.layers": {"values": [[2, 3], [1, 2]], "when": {"model.backbone": RESNET}},
            "data.image_size": [[256, 256], [128, 128]],
            "train.lr_heads": {"low": 1e-4, "high": 1e-3},
            WEAK_KEY: ["drop", "use"],
            RATIO_KEY: "attainable",
        }
    )
    configs = enumerate_configs(space, FEATURE_KEYS)
    assert len(configs) == 3 * 2 * 2
    found = {(c.model.backbone, c.model.layers) for c in configs}
    assert found == {(RESNET, (2, 3)), (RESNET, (1, 2)), (WIDE, (2, 3))}
    assert {weights_key(m) for m in models_of(space)} == {
        weights_key(ModelConfig(backbone=b, layers=layers)) for b, layers in found
    }
    reached = {(c.model.backbone, c.model.layers, c.data.image_size) for c in configs}
    for trial in drive(space, 60):
        config = trial["config"]
        assert (config["model.backbone"], tuple(config["model.layers"]), tuple(config["data.image_size"])) in reached


def test_feature_keys_are_all_that_features_depend_on() -> None:
    from ssn.config import unflatten
    from ssn.features import feature_key

    info = make_info(masks=2, defective=4)

    def key(**changes: Any) -> str:
        config = unflatten(flatten(Config()) | changes)
        return feature_key(config, info, data_uri="d", weights_digest=weights_key(config.model), device="cpu")

    changes: dict[str, Any] = {}
    for name, value in flatten(Config()).items():
        if name.startswith("eval.") or value is None:
            continue
        other: dict[type, Any] = {int: 3, float: 0.4, list: [32, 48], str: "bf16", bool: not value}
        changes[name] = other[type(value)]
    changes |= {"model.variant": "jims", WEAK_KEY: "use", "data.antialias": True, "model.align_corners": False}
    changes |= {"synthesis.perlin_rescale_empty": True, "train.draws_per_epoch": 5, "train.sampling": "official"}
    moved = {name for name, value in changes.items() if key(**{name: value}) != key()}
    assert moved == set(FEATURE_KEYS)
