"""Manifests: every shipped one loads, and a wrong one is refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from ssn.config import Config, flatten, unflatten
from ssn.data.layouts import LAYOUTS
from ssn.data.manifest import Manifest, load_manifest, parse_manifest
from ssn.errors import SSNError
from ssn.resources import list_resources, resource_dir

SHIPPED = sorted(list_resources("datasets"))


def parse(**changes: Any) -> Manifest:
    return parse_manifest({"name": "parts", "layout": "folder", **changes}, source="parts.yaml")


def test_the_datasets_are_all_shipped() -> None:
    assert set(SHIPPED) == {
        *("mvtec_ad", "visa", "btad", "mpdd", "magnetic_tile", "ksdd", "ksdd2", "sensum", "dagm"),
        *("folder_template", "synthetic_surfaces"),
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_manifest_loads(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.name == name or name == "folder_template"
    assert manifest.layout in LAYOUTS
    for category in ("", *manifest.categories):
        config = unflatten({**flatten(Config()), **manifest.defaults_of(category)})
        assert config.data.image_size == config.eval.size
    assert pickle.loads(pickle.dumps(manifest)) == manifest


@pytest.mark.parametrize(
    ("name", "num_categories", "threshold"),
    [
        ("mvtec_ad", 15, 0.2),
        ("visa", 12, 0.6),
        ("btad", 3, 0.2),
        ("mpdd", 6, 0.2),
        ("magnetic_tile", 1, 0.6),
        ("ksdd", 1, 0.6),
        ("ksdd2", 1, 0.6),
        ("sensum", 2, 0.6),
        ("dagm", 10, 0.6),
    ],
)
def test_published_datasets_start_from_the_papers_thresholds(name: str, num_categories: int, threshold: float) -> None:
    manifest = load_manifest(name)
    assert len(manifest.categories) == num_categories
    assert manifest.defaults["synthesis.perlin_threshold"] == threshold
    assert manifest.title
    assert manifest.license
    assert manifest.homepage.startswith("https://")


@pytest.mark.parametrize(
    ("name", "category", "image_size"),
    [
        ("ksdd2", "ksdd2", [640, 232]),
        ("sensum", "capsule", [320, 192]),
        ("sensum", "softgel", [144, 144]),
        ("mvtec_ad", "bottle", [256, 256]),
        ("visa", "candle", [256, 256]),
    ],
)
def test_image_sizes_are_the_paper_s(name: str, category: str, image_size: list[int]) -> None:
    """Height and width, as in the configuration of ICPR 2024's own code."""
    assert load_manifest(name).defaults_of(category)["data.image_size"] == image_size


def test_a_category_s_defaults_go_before_the_dataset_s() -> None:
    manifest = parse(
        categories=["a", "b"],
        defaults={"train.epochs": 5, "data.image_size": [64, 64]},
        category_defaults={"b": {"data.image_size": [32, 48]}},
    )
    assert manifest.defaults_of("a") == {"train.epochs": 5, "data.image_size": [64, 64]}
    assert manifest.defaults_of("b") == {"train.epochs": 5, "data.image_size": [32, 48]}


def test_the_template_shows_every_key() -> None:
    text = (resource_dir("datasets") / "folder_template.yaml").read_text()
    for key in Manifest.__dataclass_fields__:
        assert f"\n{key}:" in text


def test_a_manifest_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nlayout: folder\nmasks: required\ndefaults: {synthesis.noise_sigma: 1}\n")
    manifest = load_manifest(path)
    assert manifest == Manifest(
        name="mine", layout="folder", masks="required", defaults={"synthesis.noise_sigma": 1}, splits=manifest.splits
    )


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SSNError, match=r"^unknown dataset 'mvtecad'; did you mean 'mvtec_ad'\?$"):
        load_manifest("mvtecad")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SSNError, match=r"manifest .*nowhere.yaml does not exist"):
        load_manifest(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["name: [unclosed", "- just\n- a list\n", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(SSNError, match=r"broken.yaml (is not valid YAML|must be a mapping)") as error:
        load_manifest(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categorys": ["a"]}, "unknown key in parts.yaml 'categorys'; did you mean 'categories'?"),
        ({"layout": "mvtek"}, "unknown layout in parts.yaml 'mvtek'; did you mean 'mvtec'?"),
        ({"name": ""}, "key 'name' is missing"),
        ({"name": "my/parts"}, "may hold only letters"),
        ({"title": 7}, "title is 7, but must be text"),
        ({"masks": "require"}, "did you mean 'required'?"),
        ({"mask_threshold": 0}, "mask_threshold is 0"),
        ({"mask_threshold": True}, "mask_threshold is True"),
        ({"categories": [1, 2]}, "categories must be a list of text"),
        ({"splits": {"kind": "random"}}, "splits.kind is 'random'"),
        ({"defaults": {"synthesis.noise_sigm": 1}}, "did you mean 'synthesis.noise_sigma'?"),
        ({"defaults": {"train.lr_heads": "1e-4"}}, "train.lr_heads is '1e-4', but must be like 0.0002 (YAML wants"),
        ({"defaults": {"synthesis.noise_sigma": -1.0}}, "default synthesis.noise_sigma is -1.0, but must be in"),
        ({"defaults": ["train.epochs"]}, "defaults must map"),
        ({"category_defaults": ["a"]}, "category_defaults must map categories to defaults"),
        (
            {"category_defaults": {"a": {"train.epoch": 1}}},
            "under category_defaults.a in parts.yaml 'train.epoch'; did",
        ),
        ({"category_defaults": {"a": 3}}, "category_defaults.a must map"),
        (
            {"categories": ["gasket"], "category_defaults": {"gaskets": {}}},
            "unknown category under category_defaults in parts.yaml 'gaskets'; did you mean 'gasket'?",
        ),
    ],
)
def test_a_wrong_manifest_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SSNError) as error:
        parse(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
