"""A sweep with finalists, another after images were added, and a shared one: how champions are chosen, on Ray."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from ssn.config import Config, flatten
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.reader import open_search_data
from tests.raw_folders import draw_image, draw_mask, write_image, write_mvtec
from tuning.champions.registry import ALIAS
from tuning.reporting.report import leaderboard_from_runs
from tuning.tracking import MLflowTracker
from tuning.tracking.mlflow_tracker import default_tracking_uri
from tuning.tracking.protocol import RunRecord

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
COUNT, SEEDS = 2, 3

DRIVER = """
import json, sys
from dataclasses import replace
from pathlib import Path

import ray

from ssn.config import unflatten
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from tests.integration.test_finalists import COUNT, SEEDS, add_images
from tuning.settings import FinalistSettings, ResourceSettings, SearchSettings, SweepSettings
from tuning.sweep import sweep

folder, data_uri, tracking_uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = unflatten(json.loads((folder / "config.json").read_text()))
settings = SweepSettings(
    model=config.model, data=config.data, synthesis=config.synthesis, train=config.train, eval=config.eval,
    search=SearchSettings(trials=2, grace_epochs=config.train.epochs),
    finalists=FinalistSettings(count=COUNT, seeds=SEEDS),
    resources=ResourceSettings(use_gpu=False),
)


def run(settings, categories=("widget",)):
    result = sweep(
        settings, dataset="tiny", data_uri=data_uri, categories=categories, tracking_uri=tracking_uri,
        out=folder / "runs",
    )
    return {**result.to_dict(), **{k: v for k, v in result.leaderboard.as_dict().items() if k == "rows"}}


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
said = {"first": run(settings)}
add_images(folder / "raw")
ingest(Manifest(name="tiny", layout="mvtec"), folder / "raw", data_uri)
one = replace(settings, finalists=FinalistSettings(count=1))
said["grown"] = run(one)
said["shared"] = run(replace(one, search=replace(one.search, shared=True)), ("widget", "gadget"))
(folder / "said.json").write_text(json.dumps(said))
"""


def add_images(raw: Path) -> None:
    """Six more normal images for training, six for validation and test, six more defects."""
    for at in range(6):
        write_image(raw / f"widget/train/good/1{at:02d}.png", draw_image(5000 + at))
        write_image(raw / f"widget/test/good/1{at:02d}.png", draw_image(6000 + at))
        write_image(raw / f"widget/test/dent/1{at:02d}.png", draw_image(7000 + at))
        write_image(raw / f"widget/ground_truth/dent/1{at:02d}_mask.png", draw_mask())


@dataclass(frozen=True)
class Outcome:
    """What the driver left."""

    said: Mapping[str, Any]
    tracker: MLflowTracker
    shards: str
    first_fingerprint: str

    def runs(self, which: str) -> list[RunRecord]:
        return self.tracker.find_runs("tiny", sweep_id=self.said[which]["sweep_id"])


@pytest.fixture(scope="module")
def outcome(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("finalists")
    write_mvtec(folder / "raw", "widget")
    write_mvtec(folder / "raw", "gadget", first_seed=1000)
    ingest(Manifest(name="tiny", layout="mvtec"), folder / "raw", str(folder / "shards"))
    fingerprint = open_search_data(str(folder / "shards"), "tiny", "widget").info.search_fingerprint
    (folder / "config.json").write_text(json.dumps(flatten(tiny_config)))
    tracking_uri = default_tracking_uri(folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(folder), str(folder / "shards"), tracking_uri]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder, timeout=1200)
    assert done.returncode == 0, done.stderr
    said = json.loads((folder / "said.json").read_text())
    return Outcome(said, MLflowTracker(tracking_uri), str(folder / "shards"), fingerprint)


def test_finalists_run_below_the_categorys_parent(outcome: Outcome) -> None:
    runs = outcome.runs("first")
    (parent,) = [r for r in runs if r.parent_run_id is None]
    finalists = [r for r in runs if r.stage == "finalist"]
    assert len(finalists) == COUNT * (SEEDS - 1)
    assert {r.parent_run_id for r in finalists} == {parent.run_id}
    assert {r.trial_state for r in finalists} == {"COMPLETE"}
    assert {r.status for r in runs} == {"FINISHED"}
    seeds = sorted(
        (r.tags["finalist_of"], r.params["train.train_seed"], r.params["train.label_seed"]) for r in finalists
    )
    assert seeds == [(str(trial), str(seed), str(seed)) for trial in range(COUNT) for seed in range(1, SEEDS)]


def test_champion_has_the_best_mean_and_its_median_run_is_registered(outcome: Outcome) -> None:
    found = outcome.said["first"]["categories"]["widget"]
    runs = outcome.runs("first")
    by_trial: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.parent_run_id is not None:
            by_trial.setdefault(run.tags.get("finalist_of", run.tags["trial_index"]), []).append(run)
    assert {trial: len(same) for trial, same in by_trial.items()} == {"0": SEEDS, "1": SEEDS}
    objectives = {trial: [r.metrics["objective"] for r in same] for trial, same in by_trial.items()}
    best = max(objectives, key=lambda trial: statistics.fmean(objectives[trial]))
    assert found["validation"]["objective"] == pytest.approx(statistics.fmean(objectives[best]))
    assert found["validation"]["objective_std"] == pytest.approx(statistics.stdev(objectives[best]))
    registered = next(r for r in by_trial[best] if r.run_id == found["run_id"])
    assert registered.metrics["objective"] == statistics.median(objectives[best])
    assert found["champion"]["run_id"] == registered.run_id

    scored = {r.run_id for r in runs if any(m.startswith("test_") for m in r.metrics) and r.parent_run_id is not None}
    assert scored == {r.run_id for r in by_trial[best]}, "test is scored for the winner's seeds alone"
    assert sorted(r.tags["test_split_scored_times"] for r in by_trial[best]) == ["1", "2", "3"]
    of_test = [r.metrics["test_image_auroc"] for r in by_trial[best]]
    assert found["test"]["image_auroc"] == pytest.approx(statistics.fmean(of_test))
    assert found["test_std"]["image_auroc"] == pytest.approx(statistics.stdev(of_test))


def test_decision_is_on_the_version_and_below_the_parent(outcome: Outcome) -> None:
    found = outcome.said["first"]["categories"]["widget"]
    client = outcome.tracker.client
    version = client.get_model_version("tiny.widget", "1")
    assert version.run_id == found["run_id"]
    assert (version.tags["seeds"], version.tags["test_split_scored_times"]) == ("3", "3")
    assert float(version.tags["validation_objective"]) == pytest.approx(found["validation"]["objective"], abs=1e-5)
    assert version.tags["finalists"].count("(n=3)") == COUNT
    assert version.tags["decision_rule"].startswith("highest mean validation objective over seeds")
    (parent,) = [r for r in outcome.runs("first") if r.parent_run_id is None]
    decision = json.loads(Path(client.download_artifacts(parent.run_id, "decision.json")).read_text())
    assert [f["n"] for f in decision["selection"]["finalists"]] == [SEEDS] * COUNT
    assert decision["selection"]["finalists"] == found["finalists"]
    assert decision["registered_champion"]["way"] == "unopposed"
    assert decision["test"]["image_auroc"]["mean"] == found["test"]["image_auroc"]


@pytest.mark.parametrize("which", ["first", "grown"])
def test_report_reads_the_same_leaderboard_back(outcome: Outcome, which: str) -> None:
    told = outcome.said[which]
    board = leaderboard_from_runs("tiny", told["sweep_id"], outcome.runs(which))
    (row,), (expected,) = board.rows, told["rows"]
    again = asdict(row)
    for each in (again, expected):
        each.pop("duration_s")  # the sweep counts training alone
    assert again == pytest.approx(expected)
    assert set(board.as_dict()["notes"]) <= set(told["notes"])
    assert (which == "first") == any("±" in note for note in told["notes"])


def test_incumbent_is_scored_again_when_images_were_added(outcome: Outcome) -> None:
    found, verdict = (
        outcome.said["grown"]["categories"]["widget"],
        outcome.said["grown"]["categories"]["widget"]["registered_champion"],
    )
    info = open_search_data(outcome.shards, "tiny", "widget").info
    assert info.search_fingerprint != outcome.first_fingerprint
    assert verdict["way"] == "rescored"
    assert verdict["incumbent"] == "tiny.widget/1"
    counts = info.counts["validation"]
    assert (verdict["num_images"], verdict["num_left_out"]) == (counts.normal + counts.defective, 0)
    assert verdict["promoted"] == (verdict["candidate_objective"] > verdict["incumbent_objective"])
    # the candidate's objective is the one that its own training computed, from features kept in half precision
    assert verdict["candidate_objective"] == pytest.approx(found["validation"]["objective"], abs=0.02)
    champion = outcome.tracker.client.get_model_version_by_alias("tiny.widget", ALIAS)
    assert str(champion.version) == str(found["champion"]["version"]) == ("2" if verdict["promoted"] else "1")
    assert (found["test"] is not None) == verdict["promoted"]
    first = outcome.tracker.client.get_model_version("tiny.widget", "1")
    assert ("kept_by_sweep" in first.tags) == (not verdict["promoted"])


def test_shared_search_tries_the_same_settings_on_every_category(outcome: Outcome) -> None:
    told = outcome.said["shared"]
    assert sorted(told["categories"]) == ["gadget", "widget"]
    runs = [r for r in outcome.runs("shared") if r.parent_run_id is not None]
    by_configuration: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_configuration.setdefault(run.tags["configuration"], []).append(run)
    assert len(by_configuration) == 2
    for same in by_configuration.values():
        assert {r.trial_state for r in same} == {"COMPLETE"}, "nothing is pruned within a trial"
        for key in ("synthesis.noise_sigma", "synthesis.perlin_threshold", "train.train_seed"):
            assert len({r.params[key] for r in same}) == 1
    # both are trained on widget; on gadget too, unless the other was ahead there by then, whichever ended first
    on_widget = {c: next(r for r in same if r.category == "widget") for c, same in by_configuration.items()}
    on_gadget = {c for c, same in by_configuration.items() if any(r.category == "gadget" for r in same)}
    best = max(on_widget, key=lambda c: on_widget[c].metrics["objective"])
    assert best in on_gadget
    assert all(len(same) == 1 + (c in on_gadget) for c, same in by_configuration.items())


def test_shared_winner_is_one_configuration_and_bows_to_better_champions(outcome: Outcome) -> None:
    told = outcome.said["shared"]
    gadget, widget = told["categories"]["gadget"], told["categories"]["widget"]
    assert gadget["params"]["synthesis.noise_sigma"] == widget["params"]["synthesis.noise_sigma"]
    assert gadget["registered_champion"]["way"] == "unopposed"
    assert (gadget["champion"]["name"], str(gadget["champion"]["version"])) == ("tiny.gadget", "1")
    assert outcome.tracker.client.get_model_version("tiny.gadget", "1").tags["searched"].startswith("one configuration")
    verdict = widget["registered_champion"]
    assert verdict["way"] in ("recorded", "rescored")
    assert verdict["promoted"] == (verdict["candidate_objective"] > verdict["incumbent_objective"])


def test_shared_search_is_reported_against_tuning_by_category(outcome: Outcome) -> None:
    told = outcome.said["shared"]
    verdict = told["categories"]["widget"]["registered_champion"]
    rows = {row["category"]: row for row in told["comparison"]["rows"]}
    assert rows["widget"]["tuned"] == verdict["incumbent_objective"]
    assert rows["widget"]["source"] == verdict["incumbent"]
    assert rows["widget"]["difference"] == pytest.approx(
        verdict["incumbent_objective"] - verdict["candidate_objective"]
    )
    assert (rows["gadget"]["tuned"], rows["gadget"]["difference"]) == (None, None)
    assert told["comparison"]["mean_difference"] == rows["widget"]["difference"]
    parents = [r for r in outcome.runs("shared") if r.parent_run_id is None]
    assert all("comparison.md" in outcome.tracker.list_artifacts(r.run_id, "") for r in parents)
