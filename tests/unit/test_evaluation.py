"""Scoring a split: metrics against scikit-learn on the very scores, masks that are missing, cases to draw."""

from __future__ import annotations

import json
import mmap
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from typer.testing import CliRunner

from ssn.cli import app
from ssn.data.preprocess import decode_image, decode_mask, resize_mask
from ssn.data.reader import open_test_data
from ssn.data.records import Sample
from ssn.errors import SSNError
from ssn.evaluation import evaluate_samples
from ssn.metrics import bootstrap_intervals
from ssn.predictor import Predictor
from tests.tolerances import FLOAT64_RTOL, GOLDEN_ATOL, GOLDEN_RTOL

EVAL_SIZE = (24, 32)


@pytest.fixture(scope="module")
def predictor(tiny_model: Path) -> Predictor:
    return Predictor.from_directory(tiny_model)


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    return list(open_test_data(str(tiny_data), "tiny", "widget").stream())


def test_metrics_are_those_of_the_scores(predictor: Predictor, samples: list[Sample]) -> None:
    found = evaluate_samples(predictor, samples)
    assert found.ids == tuple(s.id for s in samples)
    assert found.labels.tolist() == [s.label for s in samples]
    expected = [p.score for p in predictor.predict([s.image for s in samples])]
    assert found.scores.tolist() == pytest.approx(expected, rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)

    masks = np.zeros((len(samples), *EVAL_SIZE), bool)
    for i, sample in enumerate(samples):
        if sample.mask is not None:
            masks[i] = resize_mask(decode_mask(sample.mask, source="x"), EVAL_SIZE)
    values = found.metrics.values
    reference = {
        "image_auroc": roc_auc_score(found.labels, found.scores),
        "image_ap": average_precision_score(found.labels, found.scores),
        "pixel_auroc": roc_auc_score(masks.ravel(), found.maps.ravel()),
        "pixel_ap": average_precision_score(masks.ravel(), found.maps.ravel()),
    }
    assert {k: values[k] for k in reference} == pytest.approx(reference, rel=FLOAT64_RTOL)
    assert 0 <= values["aupro"] <= 1
    assert found.metrics.undefined == {}


def test_report_counts_what_was_scored(predictor: Predictor, samples: list[Sample]) -> None:
    seen: list[int] = []
    found = evaluate_samples(predictor, samples, on_progress=seen.append)
    report = found.to_dict()
    assert report["metrics"] == found.metrics.values
    intervals = bootstrap_intervals(found.scores, found.labels)
    assert report["intervals_95"] == {name: list(bounds) for name, bounds in intervals.items()}
    assert (report["num_images"], report["num_defective"], report["num_masks"]) == (11, 8, 8)
    assert seen == [4, 8, 11]


def test_defective_images_without_masks_count_as_images_alone(predictor: Predictor, samples: list[Sample]) -> None:
    defective = [s for s in samples if s.label]
    unmasked = {s.id for s in defective[:3]}
    partly = [replace(s, mask=None) if s.id in unmasked else s for s in samples]
    found = evaluate_samples(predictor, partly).metrics.values
    whole = evaluate_samples(predictor, samples).metrics.values
    known = evaluate_samples(predictor, [s for s in samples if s.id not in unmasked]).metrics.values
    for name in ("pixel_auroc", "pixel_ap", "aupro"):
        assert found[name] == pytest.approx(known[name], rel=GOLDEN_RTOL)
        assert found[name] != pytest.approx(whole[name], rel=GOLDEN_RTOL)
    assert found["image_auroc"] == whole["image_auroc"]


def test_without_masks_pixel_metrics_are_undefined(predictor: Predictor, samples: list[Sample]) -> None:
    found = evaluate_samples(predictor, [replace(s, mask=None) for s in samples])
    assert set(found.metrics.undefined) == {"pixel_auroc", "pixel_ap", "aupro"}
    assert "image_auroc" in found.metrics.values
    assert found.num_masks == 0


def test_one_class_leaves_image_metrics_undefined(predictor: Predictor, samples: list[Sample]) -> None:
    found = evaluate_samples(predictor, [s for s in samples if s.label == 0])
    assert found.metrics.values == {}
    assert all(found.metrics.undefined.values())
    assert found.to_dict()["intervals_95"] == {}
    assert {"image_auroc", "image_ap", "pixel_ap", "aupro"} <= set(found.metrics.undefined)


def test_no_images_are_refused(predictor: Predictor) -> None:
    with pytest.raises(SSNError, match="the split to evaluate has no images; choose another"):
        evaluate_samples(predictor, [])


def test_image_that_cannot_be_decoded_is_named(predictor: Predictor, samples: list[Sample]) -> None:
    broken = replace(samples[2], image=samples[2].image[:60])
    with pytest.raises(SSNError, match=samples[2].source_path):
        evaluate_samples(predictor, [*samples[:2], broken])


def test_cases_carry_what_is_drawn(predictor: Predictor, samples: list[Sample]) -> None:
    found = evaluate_samples(predictor, samples, keep_images=True)
    cases = found.cases()
    assert [c.title for c in cases] == [s.source_path for s in samples]
    for case, sample, score in zip(cases, samples, found.scores, strict=True):
        assert case.image_HW3.shape == (*EVAL_SIZE, 3)
        assert case.map_HW.shape == EVAL_SIZE
        assert (case.label, case.score) == (sample.label, score)
        assert (case.mask_HW is None) == (sample.mask is None)
        original = decode_image(sample.image, source="x")
        assert abs(float(case.image_HW3.mean()) - float(original.mean())) < 5
    with pytest.raises(ValueError, match="keep_images=True"):
        evaluate_samples(predictor, samples).cases()


def test_maps_masks_and_images_are_read_from_files_that_are_gone(
    predictor: Predictor, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = evaluate_samples(predictor, samples, keep_images=True)
    assert list(tmp_path.iterdir()) == []
    assert found.maps.shape == (len(samples), *EVAL_SIZE)
    assert found.maps.dtype == np.float32
    assert found.images.shape == (len(samples), *EVAL_SIZE, 3)
    assert isinstance(found.maps.base, mmap.mmap)
    for sample, mask in zip(samples, found.masks, strict=True):
        if sample.mask is None:
            assert mask is None
        else:
            assert mask is not None
            assert np.array_equal(mask, resize_mask(decode_mask(sample.mask, source="x"), EVAL_SIZE))
    with pytest.raises(SSNError):
        evaluate_samples(predictor, [*samples, replace(samples[0], image=b"")])
    assert list(tmp_path.iterdir()) == []


def test_command_prints_and_writes_intervals(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    result = CliRunner().invoke(app, ["evaluate", str(tiny_model), "--data", str(tiny_data), "--json", str(file)])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert json.loads(file.read_text()) == content
    assert set(content["intervals_95"]) == {"image_auroc", "image_ap", "image_f1_max"}
    for name, (low, high) in content["intervals_95"].items():
        assert 0 <= low <= content["metrics"][name] <= high <= 1
