"""The registered champion against the next one: what may be compared, how, and who gets the alias. No Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ssn.checkpoint import Checkpoint, load_checkpoint
from ssn.config import EvalConfig
from ssn.data.reader import open_search_data, open_test_data
from ssn.engine import TRAINED_ON
from ssn.errors import SSNError
from tuning.champions.incumbent import (
    Incumbent,
    Rescored,
    compare_recorded,
    compare_rescored,
    favour_cheaper,
    images_to_leave_out,
    not_comparable,
    out_of_bounds,
    recorded_objective,
    rescore,
    yardstick,
)
from tuning.execution.objective import compute_objective
from tuning.settings import ObjectiveSettings

JUDGED_BY = yardstick(ObjectiveSettings(), EvalConfig())
INCUMBENT = Incumbent(
    "widgets.bolt", "3", "run", {"search_fingerprint": "f1", "validation_objective": "0.912346", **JUDGED_BY}
)


def recorded(incumbent: Incumbent, fingerprint: str = "f1", objective: ObjectiveSettings | None = None) -> float | None:
    judged_by = yardstick(objective or ObjectiveSettings(), EvalConfig())
    return recorded_objective(incumbent, search_fingerprint=fingerprint, judged_by=judged_by)


def test_recorded_objective_counts_on_the_same_data_and_yardstick_alone() -> None:
    assert recorded(INCUMBENT) == 0.912346
    assert recorded(INCUMBENT, fingerprint="f2") is None
    assert recorded(INCUMBENT, objective=ObjectiveSettings(metric="image_auroc")) is None
    assert recorded(INCUMBENT, objective=ObjectiveSettings(cost_per_mask=0.001)) is None
    by_hand = replace(INCUMBENT, tags={"search_fingerprint": "f1"})
    assert recorded(by_hand) is None, "promoted by hand, without numbers"
    earlier = {key: value for key, value in INCUMBENT.tags.items() if key != "cost_per_mask"}
    assert recorded(replace(INCUMBENT, tags=earlier)) is None


@pytest.mark.parametrize(("candidate", "promoted"), [(0.95, True), (0.9123456, False), (0.912346, False), (0.5, False)])
def test_better_recorded_objective_has_the_alias_and_of_equals_the_incumbent(candidate: float, promoted: bool) -> None:
    """Tags hold six digits; the same sweep again is no better than itself."""
    verdict = compare_recorded("bolt", INCUMBENT, candidate, 0.912346)
    assert (verdict.promoted, verdict.way) == (promoted, "recorded")
    assert "widgets.bolt/3" in verdict.reason
    assert verdict.reason.endswith("and takes its place" if promoted else "and does not take its place")
    assert verdict.as_dict()["incumbent"] == "widgets.bolt/3"


@pytest.mark.parametrize(("candidate", "promoted"), [(0.71, True), (0.7, False), (0.6, False)])
def test_rescored_models_compare_on_the_same_images(candidate: float, promoted: bool) -> None:
    verdict = compare_rescored("bolt", INCUMBENT, Rescored(candidate, 0.7, 20, 4))
    assert (verdict.promoted, verdict.way) == (promoted, "rescored")
    assert "on 20 validation images (without 4 that the champion trained on)" in verdict.reason


def test_candidate_without_a_rival_that_can_be_scored_is_promoted_and_says_so() -> None:
    verdict = not_comparable("bolt", INCUMBENT, "its weights are gone")
    assert verdict.promoted
    assert verdict.reason == (
        "bolt: the champion widgets.bolt/3 is replaced without a comparison, because its weights are gone"
    )


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (ObjectiveSettings(), None),
        (ObjectiveSettings(max_masks=12, max_latency_ms=7.5), None),
        (ObjectiveSettings(max_masks=5), "its 12 masks are more than objective.max_masks=5"),
        (ObjectiveSettings(max_latency_ms=7), "its 7.5 ms are more than objective.max_latency_ms=7"),
    ],
)
def test_incumbent_beyond_a_bound_gives_way(objective: ObjectiveSettings, reason: str | None) -> None:
    verdict = out_of_bounds("bolt", replace(INCUMBENT, tags={"train_masks": "12", "latency_ms": "7.5"}), objective)
    if reason is None:
        assert verdict is None
        return
    assert verdict is not None
    assert (verdict.promoted, verdict.way) == (True, "out of bounds")
    assert verdict.reason == f"bolt: the champion widgets.bolt/3 gives way, because {reason}"


def test_costs_that_were_not_recorded_keep_every_bound() -> None:
    assert out_of_bounds("bolt", INCUMBENT, ObjectiveSettings(max_masks=0, max_latency_ms=0.1)) is None


KNEE = ObjectiveSettings(against="labels", pick="knee")
KNEE_MS = ObjectiveSettings(against="latency", pick="knee")


@pytest.mark.parametrize(
    ("objective", "tags", "cost", "promoted"),
    [
        (KNEE, {"train_masks": "4", "train_weak_labels": "3"}, 6, True),
        (KNEE, {"train_masks": "4", "train_weak_labels": "3"}, 7, False),
        (KNEE, {"train_masks": "4"}, 4, True),
        (KNEE_MS, {"latency_ms": "7.5"}, 7.0, True),
        (KNEE_MS, {"latency_ms": "7.5"}, 7.5, False),
        (KNEE_MS, {}, 99.0, True),
        (ObjectiveSettings(against="labels"), {"train_masks": "4", "train_weak_labels": "3"}, 6, False),
        (ObjectiveSettings(), {"train_masks": "4", "train_weak_labels": "3"}, 0, False),
    ],
)
def test_better_incumbent_gives_way_to_a_knee_that_costs_less(
    objective: ObjectiveSettings, tags: dict[str, str], cost: float, promoted: bool
) -> None:
    incumbent = replace(INCUMBENT, tags=tags)
    verdict = favour_cheaper("bolt", compare_recorded("bolt", incumbent, 0.8, 0.9), objective, cost)
    assert verdict.promoted is promoted
    assert verdict.reason.endswith("takes its place" if promoted else "does not take its place")
    better = compare_recorded("bolt", incumbent, 0.9, 0.8)
    assert favour_cheaper("bolt", better, objective, 99.0) is better


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Checkpoint:
    return load_checkpoint(tiny_model)


def test_checkpoint_names_the_images_it_trained_on(model: Checkpoint, tiny_data: Path) -> None:
    data = open_search_data(str(tiny_data), "tiny", "widget")
    train, pool, validation = ({s.id for s in data.stream(split)} for split in ("train", "pool", "validation"))  # type: ignore[arg-type]
    assert set(model.meta[TRAINED_ON]) == train | pool, "at supervision ratio 1"
    assert not set(model.meta[TRAINED_ON]) & (validation | open_test_data(str(tiny_data), "tiny", "widget").ids())
    assert images_to_leave_out(model, data_changed=True) == train | pool
    assert images_to_leave_out(model, data_changed=False) == frozenset()


def test_checkpoint_of_an_earlier_release_cannot_be_compared_on_other_data(model: Checkpoint) -> None:
    earlier = replace(model, meta={k: v for k, v in model.meta.items() if k != TRAINED_ON})
    assert images_to_leave_out(earlier, data_changed=False) == frozenset()
    with pytest.raises(SSNError, match="does not name the images it trained on"):
        images_to_leave_out(earlier, data_changed=True)


def test_both_models_are_scored_on_what_is_left_by_one_yardstick(model: Checkpoint, tiny_data: Path) -> None:
    from ssn.bundle import find_backbone
    from ssn.evaluation import evaluate_samples
    from ssn.predictor import Predictor

    data = open_search_data(str(tiny_data), "tiny", "widget")
    samples = list(data.stream("validation"))
    left_out = {next(s.id for s in samples if s.label == 1), next(s.id for s in samples if s.label == 0)}
    rival = replace(model, config=replace(model.config, eval=EvalConfig(size=(16, 16))), meta={**model.meta})
    rival.meta["masks_used"] = 0
    objective = ObjectiveSettings(cost_per_mask=0.01)
    found = rescore(model, rival, data, left_out, objective, model.config.eval, "cpu", 1)
    assert (found.num_images, found.num_left_out) == (len(samples) - 2, 2)
    # the same network, judged alike but for the six masks that the one paid for
    assert found.incumbent_objective - found.candidate_objective == pytest.approx(0.06)
    predictor = Predictor.from_checkpoint(model, find_backbone(model))
    kept = evaluate_samples(predictor, [s for s in samples if s.id not in left_out]).metrics.values
    values = {f"val_{name}": value for name, value in kept.items()}
    expected = compute_objective(objective, values, has_masks=True, masks_used=6)
    assert found.candidate_objective == pytest.approx(expected, abs=1e-9)


def test_nothing_is_compared_on_images_of_one_label(model: Checkpoint, tiny_data: Path) -> None:
    data = open_search_data(str(tiny_data), "tiny", "widget")
    normal = {s.id for s in data.stream("validation") if s.label == 0}
    with pytest.raises(SSNError, match=r"^image_auroc is undefined on the \d+ validation images it did not train on"):
        rescore(model, model, data, normal, ObjectiveSettings(), model.config.eval, "cpu", 1)
