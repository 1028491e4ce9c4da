"""Train, evaluate and predict on one machine, from shards to files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssn import train_job
from ssn.checkpoint import load_checkpoint
from ssn.config import Config
from ssn.data.reader import open_test_data
from ssn.errors import SSNError
from ssn.evaluation import evaluate_samples
from ssn.predictor import Predictor
from ssn.train_job import evaluate, predict, train, unique_names
from tests.raw_folders import draw_image, write_image


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
    assert result["masks_used"] == 6
    assert {"train_loss", "val_image_auroc", "val_pixel_ap"} <= set(result["metrics"])
    assert result["undefined"] == {}
    assert [entry for entry in seen if entry[0] == "training widget"] == [("training widget", e, 2) for e in (1, 2)]
    assert seen[0][0] == "features of widget"
    checkpoint = load_checkpoint(tmp_path / "model")
    assert checkpoint.backbone is not None
    assert checkpoint.config == tiny_config.resolved()
    assert not [name for name in checkpoint.tensors if "." in name and name.split(".")[0] in ("optimizer",)]


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
    monkeypatch.setattr(train_job, "extract", lambda *a, **k: pytest.fail("worked for nothing"))
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
