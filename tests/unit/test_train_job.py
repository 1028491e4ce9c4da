"""Train, evaluate and predict on one machine, from shards to files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssn import train_job
from ssn.checkpoint import load_checkpoint
from ssn.config import Config
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.reader import open_test_data
from ssn.data.splits import SplitPolicy
from ssn.errors import SSNError
from ssn.evaluation import evaluate_samples
from ssn.feature_cache import FeatureCache
from ssn.predictor import Predictor
from ssn.train_job import evaluate, predict, train, unique_names
from tests.raw_folders import draw_image, write_image, write_mvtec
from tests.tolerances import TRAINED_RTOL


def test_training_reports_and_leaves_a_model(tiny_data: Path, tiny_config: Config, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = train(
        tiny_config,
        data_uri=str(tiny_data),
        dataset="tiny",
        category="widget",
        out=tmp_path / "model",
        on_progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert result["model"] == str(tmp_path / "model")
    assert (result["masks_used"], result["weak_labels_used"], result["feature_source"]) == (6, 0, "cached")
    assert {"train_loss", "val_image_auroc", "val_pixel_ap"} <= set(result["metrics"])
    assert result["undefined"] == {}
    assert [entry for entry in seen if entry[0] == "training widget"] == [("training widget", e, 2) for e in (1, 2)]
    assert seen[0][0] == "features of widget"
    checkpoint = load_checkpoint(tmp_path / "model")
    assert checkpoint.backbone is not None
    assert checkpoint.config == tiny_config.resolved()
    assert not [name for name in checkpoint.tensors if "." in name and name.split(".")[0] in ("optimizer",)]


def test_weak_labels_are_used_and_missing_ones_noticed(tiny_config: Config, tmp_path: Path) -> None:
    """Without masks, with more than enough memory and next to none; and without a defective image in the pool."""
    raw = write_mvtec(tmp_path / "raw", masks=False)
    ingest(Manifest(name="unmasked", layout="mvtec"), raw, str(tmp_path / "shards"))
    no_pool = SplitPolicy(rows={"test_defective": {"validation": 0.5, "test": 0.5}})
    ingest(Manifest(name="unlabelled", layout="mvtec", splits=no_pool), raw, str(tmp_path / "shards"))
    config = replace(tiny_config, train=replace(tiny_config.train, supervision_ratio=0.0, weak_labels="use"))
    notices: list[str] = []

    def run(dataset: str, out: str, memory_bytes: int = 10**9) -> dict[str, Any]:
        return train(
            config,
            data_uri=str(tmp_path / "shards"),
            dataset=dataset,
            category="widget",
            out=tmp_path / out,
            memory_bytes=memory_bytes,
            on_notice=notices.append,
        )

    cached = run("unmasked", "cached")
    assert (cached["masks_used"], cached["weak_labels_used"], cached["feature_source"]) == (0, 6, "cached")
    assert notices == []
    assert run("unmasked", "streamed", 300_000)["feature_source"] == "streamed"
    same_model(tmp_path / "cached", tmp_path / "streamed")
    notices.clear()
    result = run("unlabelled", "unsupervised")
    assert (result["masks_used"], result["weak_labels_used"]) == (0, 0)
    assert notices == ["widget: the pool has no defective images, so train.weak_labels=use adds none"]


def test_training_twice_gives_the_same_model(
    tiny_data: Path, tiny_config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    train(tiny_config, data_uri=str(tiny_data), dataset="tiny", category="widget", out=tmp_path / "again")
    first, again = load_checkpoint(tiny_model), load_checkpoint(tmp_path / "again")
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(value, again.tensors[name]) for name, value in first.tensors.items())


def test_validation_metrics_are_those_of_the_written_model(
    tiny_data: Path, tiny_config: Config, tmp_path: Path
) -> None:
    """Features kept in fp32, so that training's validation sees what inference sees."""
    config = replace(tiny_config, data=replace(tiny_config.data, feature_dtype="fp32"))
    result = train(config, data_uri=str(tiny_data), dataset="tiny", category="gadget", out=tmp_path / "model")
    evaluated = evaluate(tmp_path / "model", data_uri=str(tiny_data), split="validation")
    trained = {k.removeprefix("val_"): v for k, v in result["metrics"].items() if k.startswith("val_")}
    del trained["loss"]
    assert evaluated["metrics"] == pytest.approx(trained, rel=1e-3)


def test_folder_of_something_else_is_not_overwritten(
    tiny_data: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_job, "load_features", lambda *a, **k: pytest.fail("worked for nothing"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
    (tmp_path / "file").write_text("")
    for out in ("out", "file"):
        with pytest.raises(SSNError, match=rf"{out} exists and is not a model directory; choose another --out$"):
            train(tiny_config, data_uri=str(tiny_data), dataset="tiny", category="widget", out=tmp_path / out)


def test_model_directory_is_replaced(tiny_data: Path, tiny_config: Config, tiny_model: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = replace(tiny_config, train=replace(tiny_config.train, train_seed=9, epochs=1))
    train(config, data_uri=str(tiny_data), dataset="tiny", category="widget", out=out)
    assert load_checkpoint(out).config == config.resolved()


def same_model(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a), load_checkpoint(b)
    assert first.tensors.keys() == second.tensors.keys()
    for name, value in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], value, rtol=TRAINED_RTOL, atol=TRAINED_RTOL, msg=name)
    assert first.backbone is not None
    assert second.backbone is not None
    assert all(torch.equal(value, second.backbone[name]) for name, value in first.backbone.items())


def test_without_memory_the_backbone_runs_on_every_batch(
    tiny_data: Path, tiny_config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    notices: list[str] = []
    result = train(
        tiny_config,
        data_uri=str(tiny_data),
        dataset="tiny",
        category="widget",
        out=tmp_path / "model",
        memory_bytes=300_000,
        on_notice=notices.append,
    )
    assert result["feature_source"] == "streamed"
    (notice,) = notices
    assert "tiny/widget take 0.8 MB, more than the 0.3 MB" in notice
    same_model(tiny_model, tmp_path / "model")


def test_cached_features_serve_the_next_run(
    tiny_data: Path, tiny_config: Config, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one with other training settings, and for a model that is the same as without a cache."""
    cache = FeatureCache(tmp_path / "cache", 10**9)
    seen: list[str] = []

    def run(out: str, config: Config = tiny_config, category: str = "widget") -> None:
        result = train(
            config,
            data_uri=str(tiny_data),
            dataset="tiny",
            category=category,
            out=tmp_path / out,
            cache=cache,
            memory_bytes=0,  # what is mapped from a disk needs none
            on_progress=lambda what, done, total: seen.append(what),
            on_notice=lambda line: pytest.fail(line),
        )
        assert result["feature_source"] == "cached"

    run("first")
    assert "features of widget" in seen
    same_model(tiny_model, tmp_path / "first")
    seen.clear()
    monkeypatch.setattr(train_job, "extract", lambda *a, **k: pytest.fail("computed again"))
    run("second")
    run("third", replace(tiny_config, train=replace(tiny_config.train, train_seed=9, epochs=1)))
    assert set(seen) == {"training widget"}
    same_model(tiny_model, tmp_path / "second")
    monkeypatch.undo()
    run("other", category="gadget")
    run("larger", replace(tiny_config, data=replace(tiny_config.data, image_size=(48, 48))))
    assert len(list(cache.folder.iterdir())) == 3


def test_features_larger_than_the_cache_stay_in_memory(
    tiny_data: Path, tiny_config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path / "cache", 100)
    notices: list[str] = []
    result = train(
        tiny_config,
        data_uri=str(tiny_data),
        dataset="tiny",
        category="widget",
        out=tmp_path / "model",
        cache=cache,
        on_notice=notices.append,
    )
    assert result["feature_source"] == "cached"
    assert notices == [
        f"the features of widget take 0.8 MB, more than the 0.0 MB of the cache {cache.folder}; they are not kept there"
    ]
    assert list(cache.folder.iterdir()) == []
    same_model(tiny_model, tmp_path / "model")


@pytest.mark.parametrize("split", ["test", "validation", "pool", "train"])
def test_every_split_can_be_evaluated(tiny_data: Path, tiny_model: Path, split: str) -> None:
    result = evaluate(tiny_model, data_uri=str(tiny_data), split=split)
    counts = open_test_data(str(tiny_data), "tiny", "widget").info.counts[split]  # type: ignore[index]
    assert (result["dataset"], result["category"], result["split"]) == ("tiny", "widget", split)
    assert result["num_images"] == counts.normal + counts.defective
    assert result["num_defective"] == counts.defective
    assert ("image_auroc" in result["metrics"]) == (split in ("test", "validation"))
    assert ("image_auroc" in result["undefined"]) == (split in ("pool", "train"))


def test_test_metrics_are_those_of_the_predictor(tiny_data: Path, tiny_model: Path) -> None:
    stream = open_test_data(str(tiny_data), "tiny", "widget").stream()
    expected = evaluate_samples(Predictor.from_directory(tiny_model), stream).metrics.values
    assert evaluate(tiny_model, data_uri=str(tiny_data))["metrics"] == expected


def test_unknown_split_is_refused(tiny_data: Path, tiny_model: Path) -> None:
    with pytest.raises(SSNError, match=r"^unknown split 'tset'; choose test, train, pool, validation$"):
        evaluate(tiny_model, data_uri=str(tiny_data), split="tset")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Equal file names in two folders."""
    for seed, name in enumerate(("left/000.png", "right/000.png", "right/001.png")):
        write_image(tmp_path / "pictures" / name, draw_image(seed, 30, 40))
    return tmp_path / "pictures"


def test_predictions_come_with_heatmaps_of_their_own(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    rows = predict(
        tiny_model,
        [str(pictures)],
        heatmaps=tmp_path / "heatmaps",
        on_progress=lambda what, done, total: seen.append((what, done, total)),
    )
    names = ["left/000.png", "right/000.png", "right/001.png"]
    assert [row["path"] for row in rows] == [str(pictures / name) for name in names]
    assert [row["heatmap"] for row in rows] == [str(tmp_path / "heatmaps" / name) for name in names]
    expected = list(Predictor.from_directory(tiny_model).predict([pictures / name for name in names]))
    for row, prediction in zip(rows, expected, strict=True):
        assert row["score"] == prediction.score
        assert row["map_max"] == pytest.approx(float(prediction.map_HW.max()))
        with Image.open(row["heatmap"]) as heatmap, Image.open(row["path"]) as image:
            assert heatmap.height == image.height
            assert not np.array_equal(np.asarray(heatmap.convert("RGB").resize(image.size)), np.asarray(image))
    assert seen[-1] == ("predicting", 3, 3)


def test_heatmap_is_turned_as_the_photo_is(tiny_model: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw_image(1, 24, 48)).save(tmp_path / "photo.jpg", exif=exif)
    (row,) = predict(tiny_model, [str(tmp_path / "photo.jpg")], heatmaps=tmp_path / "heatmaps")
    with Image.open(row["heatmap"]) as heatmap:
        assert heatmap.height == 48


def test_without_heatmaps_nothing_is_written(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    rows = predict(tiny_model, [str(pictures)])
    assert all(set(row) == {"path", "score", "map_max"} for row in rows)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_input_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SSNError, match=r"^no image at .*nothing\.png"):
        predict(tmp_path / "no model either", [str(tmp_path / "nothing.png")])


@pytest.mark.parametrize(
    "paths",
    [
        ["a/x.png", "b/x.png"],
        ["a/x.png", "x.png"],
        ["a/x.png"],
        ["a/x.png", "a/x.jpg"],
        ["a/x.png", "a/x.png"],
    ],
)
def test_heatmap_names_do_not_collide(tmp_path: Path, paths: list[str]) -> None:
    names = unique_names([tmp_path / p for p in paths])
    assert len(set(names)) == len(set(paths))
    assert all(name.suffix == ".png" and not name.is_absolute() and ".." not in name.parts for name in names)
