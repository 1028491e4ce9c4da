"""The label value curve: its points, its sentence, and that it is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from tests.made_up_benchmark import make_info, plan_of, results_of
from tuning.benchmarking.label_curve import (
    LabelCurve,
    Point,
    curve_rows,
    draw_label_curve,
    make_curves,
    read_gain,
    sum_up,
)
from tuning.benchmarking.plan import PlannedRun

OVERS = ["train.supervision_ratio=0,0.5,1", "train.weak_labels=drop,use"]


def score(run: PlannedRun) -> dict[str, float]:
    base = 0.4 + 0.05 * run.train_masks + 0.02 * (run.train_labels - run.train_masks) + 0.01 * run.seed
    return {"pixel_ap": base, "image_ap": min(base + 0.3, 1.0), "image_auroc": 0.9}


def curves_of(*infos: object, overs: Sequence[str] = OVERS, seeds: int = 2) -> tuple[list[LabelCurve], list[str]]:
    plan = plan_of(list(infos), overs=overs, seeds=seeds)  # type: ignore[arg-type]
    by_name = {info.category: info for info in infos}  # type: ignore[attr-defined]
    return make_curves(plan, by_name, results_of(plan, score), "made_up")


def test_points_are_masks_used_and_what_came_of_them() -> None:
    (curve,), notes = curves_of(make_info(masks=4, defective=6))
    assert notes == []
    assert (curve.category, curve.configuration, curve.available) == ("bolt", "default", 4)
    assert curve.heading == "made_up, bolt"
    assert {weak: [p.masks for p in points] for weak, points in curve.points.items()} == {
        "drop": [0, 0, 2, 2, 4, 4],
        "use": [0, 0, 2, 2, 4, 4],
    }
    last = curve.points["use"][-1]
    assert (last.labels, last.ratio, last.repetition) == (6, "1", 1)
    assert last.values["pixel_ap"] == pytest.approx(0.4 + 0.2 + 0.04 + 0.01)
    assert sum_up(curve.points["drop"], "pixel_ap")[1] == (2, pytest.approx(0.505), pytest.approx(0.01 / 2**0.5), 2)


def test_lines_meet_where_every_defect_has_its_mask() -> None:
    (curve,), _ = curves_of(make_info(masks=4))
    ends = [[p.values for p in points if p.masks == 4] for points in curve.points.values()]
    assert ends[0] == ends[1], "one network, trained once"


def test_pool_without_masks_is_said() -> None:
    curves, notes = curves_of(make_info("bolt", masks=0, defective=5), make_info("nut", masks=3))
    assert [curve.category for curve in curves] == ["nut"]
    assert notes == ["no label value curve of bolt: none of its training images has a mask"]


def test_too_few_numbers_of_masks_are_said() -> None:
    curves, notes = curves_of(make_info(masks=1), overs=["train.supervision_ratio=0.6,1"])
    assert curves == []
    assert notes == ["no label value curve of bolt: fewer than two numbers of masks have finished"]


def test_without_ratios_there_is_no_curve() -> None:
    assert curves_of(make_info(), overs=[]) == ([], [])
    assert curves_of(make_info(), overs=["train.weak_labels=drop,use"]) == ([], [])


def test_categories_have_a_mean() -> None:
    curves, _ = curves_of(make_info("bolt", masks=2), make_info("nut", masks=4), seeds=1)
    assert [curve.category for curve in curves] == ["bolt", "nut", "mean of 2 categories"]
    mean = curves[-1]
    assert mean.available == 3
    assert [p.masks for p in mean.points["drop"]] == [0, 1.5, 3]
    assert mean.points["drop"][-1].values["pixel_ap"] == pytest.approx(0.4 + 0.05 * 3)
    assert len({curve.name for curve in curves}) == 3


def test_other_overs_have_curves_of_their_own() -> None:
    curves, _ = curves_of(make_info(), overs=["train.supervision_ratio=0,1", "train.epochs=1,2"])
    assert [curve.configuration for curve in curves] == ["default, epochs=1", "default, epochs=2"]
    assert [curve.heading for curve in curves] == [
        "made_up, bolt, default, epochs=1",
        "made_up, bolt, default, epochs=2",
    ]
    assert [curve.name for curve in curves] == [f"label_value-bolt-default-epochs={n}" for n in (1, 2)]


def test_rows_are_the_dots() -> None:
    (curve,), _ = curves_of(make_info(masks=4, defective=6))
    rows = curve_rows([curve])
    assert len(rows) == 12
    assert rows[0]["weak_labels"] == "drop"
    assert rows[-1] == {
        "dataset": "made_up",
        "category": "bolt",
        "configuration": "default",
        "weak_labels": "use",
        "supervision_ratio": "1",
        "masks": 4,
        "labels": 6,
        "repetition": 1,
        "test_pixel_ap": pytest.approx(0.65),
        "test_image_ap": pytest.approx(0.95),
    }


def points(levels: dict[int, Sequence[float]]) -> list[Point]:
    return [
        Point(masks, masks, "", repetition, {"pixel_ap": value})
        for masks, values in levels.items()
        for repetition, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        (
            {0: (0.40, 0.42), 3: (0.60, 0.62), 6: (0.70, 0.72), 12: (0.71, 0.73)},
            "41.0 without defects, 71.0 with 6 masks, 72.0 with 12",
        ),
        (
            {0: (0.40, 0.42), 3: (0.70, 0.72), 6: (0.60, 0.62), 12: (0.71, 0.73)},
            "41.0 without defects, 71.0 with 3 masks, 72.0 with 12",
        ),
        (
            {0: (0.40, 0.42), 3: (0.50, 0.52), 12: (0.71, 0.73)},
            "41.0 without defects, 72.0 with all 12 masks; fewer bring less than 90 % of the gain",
        ),
        ({0: (0.40, 0.50), 12: (0.44, 0.56)}, "45.0 without defects, 50.0 with 12 masks: no clear gain"),
        ({0: (0.50, 0.51), 12: (0.40, 0.41)}, "50.5 without defects, 40.5 with 12 masks: no clear gain"),
        ({0: (0.40,), 12: (0.70,)}, ""),
        ({3: (0.40, 0.41), 12: (0.70, 0.71)}, ""),
        ({}, ""),
    ],
)
def test_sentence_says_where_most_of_the_gain_is_had_if_repetitions_tell(
    levels: dict[int, Sequence[float]], sentence: str
) -> None:
    assert read_gain(points(levels), "pixel_ap") == sentence


def test_picture_is_drawn() -> None:
    (curve,), _ = curves_of(make_info(masks=4, defective=6), seeds=3)
    with Image.open(io.BytesIO(draw_label_curve(curve, notes="commit 1234567"))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert picture.format == "PNG"
    assert pixels.shape[1] > 1.5 * pixels.shape[0], "two panels side by side"
    for colour in ((11, 95, 165), (200, 84, 26)):
        assert (np.abs(pixels - colour).max(axis=2) < 12).sum() > 500
    assert draw_label_curve(curve, notes="commit 1234567") == draw_label_curve(curve, notes="commit 1234567")


def test_picture_of_a_category_without_pixel_metrics_has_one_panel() -> None:
    plan = plan_of([make_info(masks=4)], overs=OVERS[:1], seeds=1)
    results = results_of(plan, lambda run: {"image_ap": 0.5 + 0.01 * run.train_masks})
    (curve,), _ = make_curves(plan, {"bolt": make_info(masks=4)}, results, "made_up")
    with Image.open(io.BytesIO(draw_label_curve(curve))) as picture:
        assert picture.width < 1.5 * picture.height
