"""What a search maximises, what it refuses, and what a trial reports."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssn.checkpoint import load_checkpoint
from ssn.config import flatten
from ssn.data.reader import CategoryInfo, SearchData
from ssn.errors import SSNError
from ssn.features import CategoryFeatures
from tests.planted_features import CONFIG, plant_features, with_train
from tuning.execution.objective import (
    TrialContext,
    check_objective,
    check_protocol,
    compute_objective,
    masks_available,
    run_trial,
)
from tuning.search.rungs import Rungs
from tuning.settings import ObjectiveMetric, ObjectiveSettings, SweepSettings
from tuning.sweep import sweep

METRICS = {"val_image_auroc": 0.9, "val_image_ap": 0.8, "val_pixel_ap": 0.4, "val_aupro": 0.6}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("mean(image_auroc, pixel_ap)", 0.65),
        ("image_auroc", 0.9),
        ("image_ap", 0.8),
        ("pixel_ap", 0.4),
        ("aupro", 0.6),
    ],
)
def test_objective_is_the_chosen_metric(metric: ObjectiveMetric, expected: float) -> None:
    value = compute_objective(ObjectiveSettings(metric=metric), METRICS, has_masks=True, masks_used=9)
    assert value == pytest.approx(expected)


def test_without_masks_the_mean_is_the_image_metric() -> None:
    metrics = {"val_image_auroc": 0.9, "val_image_ap": 0.8}
    assert compute_objective(ObjectiveSettings(), metrics, has_masks=False, masks_used=0) == 0.9


@pytest.mark.parametrize(("masks_used", "expected"), [(0, 0.65), (5, 0.6), (65, 0.0)])
def test_masks_have_a_price(masks_used: int, expected: float) -> None:
    settings = ObjectiveSettings(cost_per_mask=0.01)
    value = compute_objective(settings, METRICS, has_masks=True, masks_used=masks_used)
    assert value == pytest.approx(expected)


def info(normal: int, defective: int, masks: int) -> CategoryInfo:
    return plant_features(validation=(normal, defective), validation_masks=masks).info


@pytest.mark.parametrize(
    ("metric", "normal", "defective", "masks"),
    [
        ("mean(image_auroc, pixel_ap)", 3, 2, 0),
        ("image_auroc", 3, 2, 0),
        ("image_ap", 1, 1, 0),
        ("pixel_ap", 3, 2, 1),
        ("aupro", 3, 2, 2),
    ],
)
def test_category_that_can_rank_trials_passes(metric: ObjectiveMetric, normal: int, defective: int, masks: int) -> None:
    found = info(normal, defective, masks)
    assert masks_available(found) == (masks > 0)
    check_objective(ObjectiveSettings(metric=metric), found)


@pytest.mark.parametrize(("normal", "defective", "missing"), [(0, 3, "normal"), (3, 0, "defective"), (0, 0, "normal")])
def test_category_of_one_class_is_refused(normal: int, defective: int, missing: str) -> None:
    with pytest.raises(SSNError, match=f"^made_up/plate has no {missing} validation images, so no metric can rank"):
        check_objective(ObjectiveSettings(), info(normal, defective, defective))


@pytest.mark.parametrize("metric", ["pixel_ap", "aupro"])
def test_pixel_metric_without_masks_is_refused(metric: ObjectiveMetric) -> None:
    with pytest.raises(SSNError, match=rf"^made_up/plate has no validation masks, so objective\.metric {metric} is"):
        check_objective(ObjectiveSettings(metric=metric), info(3, 2, 0))


def test_published_split_is_not_searched_on() -> None:
    found = info(0, 0, 0)
    check_protocol(found)
    with pytest.raises(SSNError, match=r"^made_up/plate was ingested with --protocol official, which leaves no valid"):
        check_protocol(replace(found, protocol="official"))


def test_sweep_refuses_published_splits_before_it_starts_anything(tiny_data: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(tiny_data, tmp_path / "shards"))
    path = shards / "tiny" / "gadget" / "category.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocol": "official"}))
    tracking_uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(SSNError, match=r"^tiny/gadget was ingested with --protocol official"):
        sweep(
            SweepSettings(),
            dataset="tiny",
            data_uri=str(shards),
            categories=None,
            tracking_uri=tracking_uri,
            out=tmp_path / "runs",
        )
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "mlflow.db").exists()


Report = tuple[dict[str, Any], Callable[[Path], None] | None]


def run(
    features: CategoryFeatures, *, resume_from: Path | None = None, save_to: Path | None = None, **train: Any
) -> list[Report]:
    config = with_train(CONFIG, epochs=5, **train)
    context = TrialContext(
        data=SearchData(features.info, {}),
        objective=ObjectiveSettings(cost_per_mask=0.01),
        rungs=Rungs(2, 2),
    )
    reports: list[Report] = []

    def report(result: dict[str, Any], save: Callable[[Path], None] | None) -> None:
        reports.append((result, save))
        if save is not None and save_to is not None:
            save(save_to / str(result["epoch"]))

    trial = {"trial_key": "k", "category": "plate", "index": 0, "config": flatten(config)}
    run_trial(trial, context, features, report=report, resume_from=resume_from, device="cpu")
    return reports


def test_trial_reports_every_epoch_and_its_objective_at_the_rungs(tmp_path: Path) -> None:
    features = plant_features(pool=4)
    reports = run(features, supervision_ratio=0.5, save_to=tmp_path)
    assert [result["epoch"] for result, _ in reports] == [1, 2, 3, 4, 5]
    for result, save in reports:
        at_rung = result["epoch"] in (2, 4, 5)
        assert ("objective" in result) == at_rung == (save is not None)
        assert result["category"] == "plate"
        assert (result["masks_used"], result["weak_labels_used"]) == (2, 0)
        assert result["feature_source"] == "cached"
        if at_rung:
            mean = (result["val_image_auroc"] + result["val_pixel_ap"]) / 2
            assert result["objective"] == pytest.approx(mean - 0.02)
    # a trial may be resumed from a rung, and its last checkpoint is the model
    resumable, model = load_checkpoint(tmp_path / "2"), load_checkpoint(tmp_path / "5")
    assert any(name.startswith("optimizer.") for name in resumable.tensors)
    assert not any(name.startswith("optimizer.") for name in model.tensors)


def test_resumed_trial_reports_what_is_left(tmp_path: Path) -> None:
    features = plant_features()
    whole = run(features, save_to=tmp_path)
    rest = run(features, resume_from=tmp_path / "2")
    assert [result["epoch"] for result, _ in rest] == [3, 4, 5]
    assert rest[-1][0]["objective"] == whole[-1][0]["objective"]


def test_category_without_masks_is_judged_by_images_alone() -> None:
    reports = run(plant_features(pool=0, validation_masks=0))
    last = reports[-1][0]
    assert last["objective"] == last["val_image_auroc"]
    assert math.isfinite(last["objective"])
    assert last["masks_used"] == 0
    assert "val_pixel_ap" not in last


def test_labels_used_without_masks_are_counted_and_free() -> None:
    last = run(plant_features(pool=5, pool_masks=4), supervision_ratio=0.5, weak_labels="use")[-1][0]
    assert (last["masks_used"], last["weak_labels_used"]) == (2, 3)
    mean = (last["val_image_auroc"] + last["val_pixel_ap"]) / 2
    assert last["objective"] == pytest.approx(mean - 0.02)


def test_divergence_is_the_users_to_read() -> None:
    features = plant_features()
    broken = replace(features.train, maps_VhwC=tuple(m * math.nan for m in features.train.maps_VhwC))
    with pytest.raises(SSNError, match="the training loss became nan in epoch 1"):
        run(replace(features, train=broken))
