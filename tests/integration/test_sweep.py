"""Whole sweeps on Ray: search, tracking, champions, and the same numbers as without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssn.config import Config, flatten, unflatten
from ssn.data.preprocess import decode_image
from ssn.data.reader import open_search_data, open_test_data
from ssn.engine import EpochReport, fit
from ssn.evaluation import evaluate_samples
from ssn.features import extract, prepare_backbone
from ssn.predictor import Predictor
from tests.tolerances import GOLDEN_ATOL, GOLDEN_RTOL
from tuning.tracking import MLflowTracker
from tuning.tracking.mlflow_tracker import default_tracking_uri

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES, TRIALS = ("gadget", "widget"), 2

# One Ray for four sweeps: starting it takes longer than any of them.
DRIVER = """
import json, sys
from dataclasses import replace
from pathlib import Path

import ray

from ssn.config import unflatten
from ssn.errors import SSNError
from tuning.settings import FinalistSettings, ResourceSettings, SearchSettings, SweepSettings
from tuning.sweep import connect_ray, sweep

folder, data_uri, tracking_uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = unflatten(json.loads((folder / "config.json").read_text()))
settings = SweepSettings(
    model=config.model, data=config.data, synthesis=config.synthesis, train=config.train, eval=config.eval,
    search=SearchSettings(trials=2, grace_epochs=config.train.epochs),
    finalists=FinalistSettings(count=1),
    resources=ResourceSettings(use_gpu=False),
)


def run(settings, categories=None):
    result = sweep(
        settings, dataset="tiny", data_uri=data_uri, categories=categories, tracking_uri=tracking_uri,
        out=folder / "runs",
    )
    keys = ("trial_key", "index", "state", "epoch", "objective", "config", "metrics")
    return {
        **result.to_dict(),
        "leaderboard": result.leaderboard.markdown(),
        "sweep_id": result.leaderboard.sweep_id,
        "trials": {c.category: [{k: getattr(t, k) for k in keys} for t in c.trials] for c in result.categories},
    }


def refuse(settings):
    try:
        run(settings, ["widget"])
    except SSNError as error:
        return str(error)


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
said = {}
said["impossible"] = refuse(replace(settings, resources=ResourceSettings(num_workers=64, use_gpu=False)))
said["started_nothing"] = not Path(folder, "runs").exists()
said["sweep"] = run(settings)
one = replace(settings, search=replace(settings.search, trials=1))
said["worker"] = run(replace(one, resources=ResourceSettings(num_workers=1, use_gpu=False)), ["widget"])
said["diverged"] = refuse(replace(one, train=replace(one.train, lr_heads=1e30)))
(folder / "said.json").write_text(json.dumps(said))
"""

LOAD_CHAMPION = """
import json, sys
import mlflow
import numpy as np

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
images = np.load(sys.argv[3])
found = model.predict(images)
print(json.dumps({"score": found["score"].tolist(), "shape": list(found["anomaly_map"].shape)}))
"""


@dataclass(frozen=True)
class Outcome:
    """What the driver left."""

    said: dict[str, Any]
    tracker: MLflowTracker
    log: str


def python(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=cwd, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def outcome(tiny_data: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "config.json").write_text(json.dumps(flatten(tiny_config)))
    tracking_uri = default_tracking_uri(folder)
    done = python(DRIVER, folder, tiny_data, tracking_uri, cwd=folder)
    assert done.stdout == "", "standard output is the caller's"
    return Outcome(json.loads((folder / "said.json").read_text()), MLflowTracker(tracking_uri), done.stderr)


def validation_metrics(trial: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in trial["metrics"].items() if k.startswith("val_") or k == "train_loss"}


def test_every_category_has_a_champion(outcome: Outcome) -> None:
    sweep = outcome.said["sweep"]
    assert sorted(sweep["categories"]) == sorted(CATEGORIES)
    for category in CATEGORIES:
        found, trials = sweep["categories"][category], sweep["trials"][category]
        assert found["failure"] is None
        assert [t["state"] for t in trials] == ["complete"] * TRIALS
        assert found["trials"] == {"complete": TRIALS, "pruned": 0, "failed": 0}
        assert found["validation"]["objective"] == max(t["objective"] for t in trials)
        assert found["default"]["objective"] == trials[0]["objective"]
        assert found["champion"]["name"] == f"tiny.{category}"
        assert set(found["test"]) >= {"image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"}
        assert f"| {category} |" in sweep["leaderboard"]
    assert len({t["trial_key"] for trials in sweep["trials"].values() for t in trials}) == TRIALS * len(CATEGORIES)


def test_objective_is_of_validation_metrics(outcome: Outcome) -> None:
    for trials in outcome.said["sweep"]["trials"].values():
        for trial in trials:
            mean = (trial["metrics"]["val_image_auroc"] + trial["metrics"]["val_pixel_ap"]) / 2
            assert trial["objective"] == pytest.approx(mean)
            assert not any("test" in key for key in trial["metrics"])


def test_tracker_has_a_parent_per_category_and_a_run_per_trial(outcome: Outcome) -> None:
    sweep = outcome.said["sweep"]
    runs = outcome.tracker.find_runs("tiny", sweep_id=sweep["sweep_id"])
    parents = {r.category: r for r in runs if r.parent_run_id is None}
    assert sorted(parents) == sorted(CATEGORIES)
    assert {r.status for r in runs} == {"FINISHED"}
    for category, parent in parents.items():
        children = [r for r in runs if r.parent_run_id == parent.run_id]
        assert [r.trial_state for r in children] == ["COMPLETE"] * TRIALS
        by_key = {t["trial_key"]: t for t in sweep["trials"][category]}
        for child in children:
            trial = by_key[child.tags["trial_identity"]]
            assert len(outcome.tracker.list_artifacts(child.run_id)) == 3
            history = dict(outcome.tracker.metric_history(child.run_id, "val_loss"))
            assert sorted(history) == [1, 2]
            assert history[2] == pytest.approx(trial["metrics"]["val_loss"])
            assert child.params["synthesis.noise_sigma"] == str(trial["config"]["synthesis.noise_sigma"])
        assert parent.tags["champion_run_id"] == sweep["categories"][category]["run_id"]


def test_no_run_is_left_running(outcome: Outcome) -> None:
    runs = outcome.tracker.find_runs("tiny")
    assert len({r.tags["sweep_id"] for r in runs}) == 3
    assert not [r.name for r in runs if r.status == "RUNNING"]


def test_trials_compute_what_the_engine_computes_without_ray(outcome: Outcome, tiny_data: Path) -> None:
    """Also without anything of the test split on disk: see test_features.py."""
    torch.set_num_threads(1)
    search = open_search_data(str(tiny_data), "tiny", "widget")
    trials = outcome.said["sweep"]["trials"]["widget"]
    features = extract(unflatten(trials[0]["config"]), search, prepare_backbone(unflatten(trials[0]["config"]), search))
    for trial in trials:
        reports: list[EpochReport] = []
        fit(unflatten(trial["config"]), features, report=lambda report, save, to=reports: to.append(report))  # type: ignore[misc]
        expected = {k: v for k, v in reports[-1].metrics.items() if k in validation_metrics(trial)}
        assert validation_metrics(trial) == pytest.approx(expected, rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)
        assert set(expected) >= {"val_loss", "val_image_auroc", "val_pixel_ap", "val_aupro"}


def test_worker_group_computes_what_the_trial_process_computes(outcome: Outcome) -> None:
    (trial,) = outcome.said["worker"]["trials"]["widget"]
    default = outcome.said["sweep"]["trials"]["widget"][0]
    assert trial["trial_key"] == default["trial_key"]
    assert (trial["state"], trial["epoch"]) == ("complete", 2)
    expected = validation_metrics(default)
    assert validation_metrics(trial) == pytest.approx(expected, rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)


def test_champion_of_the_same_data_stays_unless_it_is_beaten(outcome: Outcome) -> None:
    """The second sweep's one trial is the first sweep's default, which is no better than its champion."""
    first, second = (outcome.said[which]["categories"]["widget"] for which in ("sweep", "worker"))
    assert second["champion"] == {**first["champion"], "created": False}
    assert second["registered_champion"]["way"] == "recorded"
    assert second["registered_champion"]["promoted"] is False
    assert second["test"] is None, "what is not registered is not scored on test"
    assert "does not take its place" in outcome.said["worker"]["leaderboard"]


def test_registered_champion_scores_as_the_predictor(outcome: Outcome, tiny_data: Path, tmp_path: Path) -> None:
    from ssn.bundle import find_backbone
    from tuning.champions.registry import load_trial_model

    found = outcome.said["sweep"]["categories"]["gadget"]
    model = load_trial_model(found["run_id"], outcome.tracker.tracking_uri)
    predictor = Predictor.from_checkpoint(model, find_backbone(model))
    test = open_test_data(str(tiny_data), "tiny", "gadget")
    images = np.stack([decode_image(s.image, source=s.source_path) for s in test.stream()])
    expected = [p.score for p in predictor.predict(list(images))]
    np.save(tmp_path / "images.npy", images)
    done = python(
        LOAD_CHAMPION,
        outcome.tracker.tracking_uri,
        "models:/tiny.gadget@champion",
        tmp_path / "images.npy",
        cwd=tmp_path,
    )
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded["score"] == pytest.approx(expected, rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)
    assert loaded["shape"] == [len(images), 32, 48]
    evaluation = evaluate_samples(predictor, test.stream())
    assert found["test"] == pytest.approx(dict(evaluation.metrics.values), rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)


def test_impossible_placement_is_refused_before_anything_starts(outcome: Outcome) -> None:
    assert "64 workers" in outcome.said["impossible"]
    assert "\n" not in outcome.said["impossible"]
    assert outcome.said["started_nothing"]


def test_error_inside_a_trial_reaches_the_tracker_as_one_line(outcome: Outcome) -> None:
    assert "widget: no winner, because no trial has finished its 2 epochs (1 failed)" in outcome.said["diverged"]
    assert "mend what failed (trial 0: the training loss became nan" in outcome.said["diverged"]
    assert "\n" not in outcome.said["diverged"]
    (failed,) = [r for r in outcome.tracker.find_runs("tiny") if r.trial_state == "FAIL"]
    assert failed.status == "FAILED"
    assert failed.tags["error"].startswith("the training loss became nan in epoch 1 (noise_sigma 0.015);")
    assert "\n" not in failed.tags["error"]
