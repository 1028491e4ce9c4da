"""What a benchmark runs, what it shares, and what it refuses; nothing is trained."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssn.config import Config, TrainConfig, flatten, trial_identity, unflatten
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.reader import SplitCount, open_search_data, open_test_data
from ssn.data.sampling import supervised_subset
from ssn.errors import SSNError
from tests.made_up_benchmark import digest_of, make_info, plan_of
from tests.raw_folders import write_mvtec
from tuning.benchmarking.benchmark import check_tuning, common_protocol, cost_unit, describe_code, describe_settings
from tuning.benchmarking.plan import (
    Configuration,
    Plan,
    Variant,
    canonical,
    configure,
    count_used,
    make_plan,
    make_variants,
    read_configurations,
)
from tuning.champions.registry import ChampionOrigin

DEFAULT = Configuration("default", "default", {})


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_configurations_come_from_files_and_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "own.yaml", "small: {train.epochs: 2}\nlarge:\n  train: {epochs: 9}\nas_is:\n")
    found = read_configurations(["default", file, "champion"])
    assert [c.name for c in found] == ["default", "small", "large", "as_is", "champion"]
    assert found[1].settings == {"train.epochs": 2}
    assert found[3].settings == {}
    assert found[2].origin == f"{file}: large"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("small: 3\n", ["own.yaml: small must hold settings", "not 3"]),
        ("champion: {train.epochs: 2}\n", ["champion is a built-in configuration", "another name"]),
        ("a: {}\na: {}\n", ["key a occurs twice"]),
        ("- a\n", ["own.yaml must hold"]),
        ("", ["names no configuration"]),
    ],
)
def test_file_of_something_else_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    file = write(tmp_path / "own.yaml", text)
    with pytest.raises(SSNError) as error:
        read_configurations([file])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_name_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SSNError, match=r"^--configs champoin: give default, champion or the path of a YAML file$"):
        read_configurations(["champoin"])
    with pytest.raises(SSNError, match="the configuration default is named twice"):
        read_configurations(["default", "default"])
    with pytest.raises(SSNError, match="cannot read the configuration file"):
        read_configurations([str(tmp_path / "missing.yaml")])


def test_overs_multiply() -> None:
    variants = make_variants(
        [DEFAULT, Configuration("small", "own.yaml: small", {})],
        ["train.supervision_ratio=0, 0.5,1", "data.image_size=[64,64],[32,48]"],
    )
    assert len(variants) == 12
    assert variants[0].label == "default, supervision_ratio=0, image_size=[64,64]"
    assert variants[1].over == (("train.supervision_ratio", "0"), ("data.image_size", "[32,48]"))
    assert variants[-1].label == "small, supervision_ratio=1, image_size=[32,48]"
    assert variants[0].chosen("train.supervision_ratio") == "0"
    assert variants[0].chosen("train.epochs") is None
    assert [v.label for v in make_variants([DEFAULT], [])] == ["default"]


@pytest.mark.parametrize(
    ("overs", "message"),
    [
        (["train.epochs"], "--over 'train.epochs' is not of the form section.name=value,value,..."),
        (["train.epochs=1,,2"], "is not of the form"),
        (["train.epochs=1", "train.epochs=2"], "--over names train.epochs twice; give all its values in one"),
        (["train.epochs=1,1"], "--over train.epochs=1,1 names a value twice"),
        (["train.label_seed=0,1"], "say how many with --seeds"),
        (["resources.num_workers=0,1"], "use --set"),
    ],
)
def test_over_that_cannot_be_is_refused(overs: list[str], message: str) -> None:
    with pytest.raises(SSNError) as error:
        make_variants([DEFAULT], overs)
    assert message in str(error.value)


def settings_of(variant: Variant, **options: Any) -> Config:
    info = make_info(defaults={"train.epochs": 5, "train.batch_size": 5, "synthesis.noise_sigma": 0.5})
    return configure(variant, info, options.pop("sets", ()), **options).config()


def test_what_wins() -> None:
    """Manifest, then configuration, then --set, then --over."""
    own = Configuration("own", "own.yaml: own", {"train": {"epochs": 6, "batch_size": 6, "supervision_ratio": 0.25}})
    variant = Variant(own, (("train.supervision_ratio", "1"),))
    config = settings_of(variant, sets=["train.epochs=7", "train.supervision_ratio=0.5"])
    assert (config.synthesis.noise_sigma, config.train.batch_size) == (0.5, 6)
    assert (config.train.epochs, config.train.supervision_ratio) == (7, 1.0)
    assert settings_of(Variant(DEFAULT)).train.batch_size == 5


def test_champion_starts_from_its_whole_configuration() -> None:
    champion = replace(Config(), train=TrainConfig(epochs=9, train_seed=4, label_seed=3))
    variant = Variant(Configuration("champion", "champion", {}))
    config = settings_of(variant, champion=champion, sets=["train.lr_gamma=0.5"])
    expected = replace(champion, train=TrainConfig(epochs=9, lr_gamma=0.5))
    assert config == expected, "its seeds are the benchmark's, and the manifest has no say"


@pytest.mark.parametrize(
    ("variant", "sets", "message"),
    [
        (Variant(Configuration("own", "own.yaml: own", {"train.epoch": 1})), [], "train.epoch (own.yaml: own); did"),
        (Variant(DEFAULT, (("train.epoch", "1"),)), [], "unknown config key train.epoch (--over train.epoch=1); did"),
        (Variant(DEFAULT, (("train.epochs", "no"),)), [], "must be an integer (--over train.epochs=no)"),
        (Variant(DEFAULT), ["train.train_seed=3"], "default sets train.train_seed, but repetition r has"),
        (Variant(Configuration("own", "o", {"train": {"label_seed": 1}})), [], "own sets train.label_seed, but"),
        (Variant(Configuration("own", "o: own", {"resources": {"num_workers": 1}})), [], "o: own: resources are the"),
    ],
)
def test_setting_that_cannot_be_is_refused(variant: Variant, sets: list[str], message: str) -> None:
    with pytest.raises(SSNError) as error:
        settings_of(variant, sets=sets)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("masks", [0, 1, 3, 8, 49])
def test_masks_are_counted_as_training_chooses_them(masks: int) -> None:
    pool = SplitCount(0, masks + 2, masks)
    ids = [f"{i:064x}" for i in range(masks + 2)]
    for step in range(41):
        train = TrainConfig(supervision_ratio=step / 40)
        chosen = supervised_subset(["dent"] * len(ids), [i < masks for i in range(len(ids))], ids, step / 40, 0)
        assert count_used(train, pool) == (len(chosen), len(chosen))
        assert count_used(replace(train, weak_labels="use"), pool) == (masks + 2, len(chosen))
        written = canonical(Config(train=train), pool)
        assert count_used(written.train, pool)[1] == len(chosen)
        assert canonical(written, pool) == written


@pytest.mark.parametrize(
    ("ratio", "weak", "masks", "defective", "expected"),
    [
        (0.3, "drop", 4, 4, (0.25, "drop")),
        (0.3, "use", 4, 4, (0.25, "use")),
        (1.0, "use", 4, 4, (1.0, "drop")),
        (1.0, "use", 4, 5, (1.0, "use")),
        (1.0, "drop", 0, 0, (0.0, "drop")),
        (0.5, "use", 0, 3, (0.0, "use")),
        (0.5, "use", 0, 0, (0.0, "drop")),
    ],
)
def test_settings_that_come_to_the_same_are_written_alike(
    ratio: float, weak: Any, masks: int, defective: int, expected: tuple[float, str]
) -> None:
    config = Config(train=TrainConfig(supervision_ratio=ratio, weak_labels=weak))
    train = canonical(config, SplitCount(0, defective, masks)).train
    assert (train.supervision_ratio, train.weak_labels) == expected


def test_plan_has_a_cell_for_everything_and_no_run_twice() -> None:
    infos = [make_info("bolt", masks=4), make_info("nut", masks=3, defective=5)]
    plan = plan_of(
        infos,
        overs=["train.supervision_ratio=0,0.3,0.25,1", "train.weak_labels=drop,use"],
        seeds=3,
    )
    assert len(plan.cells) == 2 * 8 * 3
    keys = [run.key for run in plan.runs]
    assert len(set(keys)) == len(keys)
    assert set(plan.cells.values()) == set(keys)
    # bolt: 0, 1 and 4 masks, the last with and without weak labels the same; nut: 0, 1 and 3, all twice
    assert sum(run.category == "bolt" for run in plan.runs) == 5 * 3
    assert sum(run.category == "nut" for run in plan.runs) == 6 * 3
    assert [run.index for run in plan.runs if run.category == "nut"] == list(range(18))

    def at(category: str, ratio: str, weak: str, seed: int = 0) -> str:
        return plan.cells[category, f"default, supervision_ratio={ratio}, weak_labels={weak}", seed]

    assert at("bolt", "1", "drop") == at("bolt", "1", "use")
    assert at("bolt", "0.3", "use") == at("bolt", "0.25", "use")
    assert at("nut", "1", "drop") != at("nut", "1", "use"), "two defects have no mask"
    assert at("bolt", "1", "drop", 0) != at("bolt", "1", "drop", 1)
    shared = plan.run("bolt", "default, supervision_ratio=1, weak_labels=use", 2)
    assert (shared.train_labels, shared.train_masks, shared.seed) == (4, 4, 2)
    assert [label.rpartition("=")[2] for label in shared.labels] == ["drop", "use"]


def test_repetition_has_its_seeds_and_the_identity_of_what_it_trains() -> None:
    info = make_info(masks=4)
    plan = plan_of([info], sets=["train.supervision_ratio=0.5", "model.weights=random"], seeds=2)
    for seed, run in enumerate(plan.runs):
        config = unflatten(run.config)
        assert (config.train.train_seed, config.train.label_seed, config.train.epochs) == (seed, seed, 5)
        expected = trial_identity(
            config,
            search_fingerprint=info.search_fingerprint,
            weights_digest=digest_of(config.model),
            split_seed=info.split_seed,
        )
        assert run.identity == expected


def test_other_test_split_is_another_run_of_the_same_network() -> None:
    before, after = (plan_of([make_info(test_fingerprint=f * 64)], seeds=1).runs[0] for f in "01")
    assert before.identity == after.identity
    assert before.key != after.key


def test_same_images_in_two_categories_are_two_runs() -> None:
    twin = replace(make_info("bolt"), category="twin")
    first, second = plan_of([make_info("bolt"), twin], seeds=1).runs
    assert first.identity == second.identity
    assert first.key != second.key


def test_champion_that_is_the_default_shares_its_runs() -> None:
    info = make_info()
    champion = replace(Config(), train=TrainConfig(epochs=5, train_seed=7))
    plan: Plan = make_plan(
        {"bolt": info},
        make_variants(read_configurations(["default", "champion"]), []),
        2,
        [],
        champions={"bolt": champion},
        weights_digest=digest_of,
    )
    assert len(plan.runs) == 2
    assert plan.runs[0].labels == ("default", "champion")


def test_nothing_to_repeat_is_refused() -> None:
    with pytest.raises(SSNError, match="--seeds is 0"):
        plan_of([make_info()], seeds=0)


def test_protocols_do_not_mix() -> None:
    bolt, nut = make_info("bolt"), make_info("nut", protocol="official")
    assert common_protocol({"nut": nut}) == "official"
    with pytest.raises(SSNError, match=r"^bolt \(validation\) and nut \(official\) were ingested under different"):
        common_protocol({"bolt": bolt, "nut": nut})


@pytest.fixture(scope="module")
def official_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of ``tiny_data``'s widget under the official protocol."""
    base = tmp_path_factory.mktemp("official")
    write_mvtec(base / "raw", "widget")
    ingest(Manifest(name="tiny", layout="mvtec"), base / "raw", str(base / "shards"), protocol="official")
    return base / "shards"


def origin(data: Path, category: str = "widget", **changes: Any) -> ChampionOrigin:
    info = open_search_data(str(data), "tiny", category).info
    found = ChampionOrigin(Config(), "run", "1", str(data), info.search_fingerprint)
    return replace(found, **changes)


def test_champion_is_accepted_on_the_test_split_kept_apart_for_it(tiny_data: Path) -> None:
    test = open_test_data(str(tiny_data), "tiny", "widget")
    check_tuning(origin(tiny_data), test)
    check_tuning(origin(tiny_data, data_uri="/gone"), test)


def test_champion_tuned_on_published_test_images_is_refused(tiny_data: Path, official_data: Path) -> None:
    """MVTec AD's published defects are all in its test split, and a search trains and validates on some of them."""
    test = open_test_data(str(official_data), "tiny", "widget")
    search = open_search_data(str(tiny_data), "tiny", "widget")
    tuned_on = {sample.id for sample in [*search.stream("pool"), *search.stream("validation")]}
    shared = len(tuned_on & {sample.id for sample in test.stream()})
    assert shared > 0
    with pytest.raises(SSNError) as error:
        check_tuning(origin(tiny_data), test)
    assert str(error.value).startswith(f"tiny/widget: its champion was tuned on {shared} images of this test split")
    assert "leave the configuration champion out" in str(error.value)


def test_champion_whose_images_share_nothing_with_the_test_split_is_accepted(
    tiny_data: Path, official_data: Path
) -> None:
    other = origin(tiny_data, "gadget")
    test = open_test_data(str(official_data), "tiny", "widget")
    # as if widget had been searched on other images: gadget's, at a place where they lie under widget's name
    found = replace(other, data_uri=str(_as_widget(tiny_data)))
    check_tuning(found, test)


def _as_widget(data: Path) -> Path:
    """``data`` with gadget's shards under the name widget."""
    place = data.parent / "renamed"
    if not place.exists():
        shutil.copytree(data / "tiny" / "gadget", place / "tiny" / "widget")
    return place


@pytest.mark.parametrize("changes", [{"data_uri": "/gone"}, {"data_uri": None}, {"search_fingerprint": "0" * 64}])
def test_champion_whose_images_are_not_to_be_found_is_refused(
    tiny_data: Path, official_data: Path, changes: dict[str, Any]
) -> None:
    test = open_test_data(str(official_data), "tiny", "widget")
    with pytest.raises(SSNError, match="tuned on images that are no longer at"):
        check_tuning(origin(tiny_data, **changes), test)


def test_what_tables_say_of_code_and_settings() -> None:
    assert describe_code({"git_commit": "0123456789", "git_dirty": "false", "code_digest": "f"}) == "commit 0123456"
    assert describe_code({"git_commit": "0123456789", "git_dirty": "true"}) == "commit 0123456 with changes"
    assert describe_code({"code_digest": "abcdef0123456789"}) == "code abcdef012345"
    plan = plan_of([make_info()], overs=["train.epochs=5,7"], sets=["model.weights=random"])
    assert describe_settings(plan) == [
        "default: wide_resnet50_2.tv_in1k (icpr, weights random), 5 or 7 epochs, 256 x 256 pixels"
    ]
    assert cost_unit([]) == "core-seconds"


def test_flat_configurations_read_back() -> None:
    (run,) = plan_of([make_info(masks=3)], sets=["train.supervision_ratio=0.4"], seeds=1).runs
    assert flatten(unflatten(run.config)) == run.config
