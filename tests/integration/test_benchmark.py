"""Whole benchmarks through the command line on Ray: results, resumption, tables, MLflow, refusals."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssn.config import Config, flatten, unflatten
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.data.reader import open_search_data, open_test_data
from ssn.engine import EpochReport, fit
from ssn.evaluation import evaluate_samples
from ssn.features import extract, prepare_backbone
from ssn.predictor import Predictor
from ssn.train_job import train
from tests.raw_folders import write_mvtec
from tests.tolerances import GOLDEN_ATOL, GOLDEN_RTOL
from tuning.benchmarking.results import ResultStore
from tuning.tracking import MLflowTracker
from tuning.tracking.mlflow_tracker import default_tracking_uri

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES, SEEDS = ("gadget", "widget"), 2
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")

# One Ray for all commands: starting it takes longer than any of them.
DRIVER = """
import contextlib, io, json, shutil, sys
from pathlib import Path

import ray

from ssn.console import run_app
from tuning.cli import app

folder, data, official = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
said, placed = {}, ["--no-use-gpu", "--num-workers", "0"]


def run(name, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_app(app, list(map(str, arguments)))
        except SystemExit as ended:
            status = ended.code
    said[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def benchmark(name, *arguments, data=data, out=folder / "out"):
    file = folder / f"{name}.json"
    run(name, "benchmark", "tiny", "--data", data, "--out", out, "--json", file, *placed, *arguments)
    said[name]["json"] = json.loads(file.read_text()) if file.exists() else None


def report(name):
    run(name, "report", "tiny", "--json", folder / f"{name}.json")
    run(f"{name} champions", "champions", "list", "--json", folder / f"{name} champions.json")


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
sets = ["--config", folder / "config.yaml", "--trials", "1", "--set", "search.grace_epochs=2"]
sets += ["--set", "finalists.count=1"]
run("sweep", "sweep", "tiny", "--data", data, "--out", folder / "runs", *placed, *sets)
report("before")

both = ["--configs", folder / "configs.yaml", "--configs", "champion", "--seeds", "2"]
benchmark("first", *both)
report("after")
by_key = {row["run"]: row for row in said["first"]["json"]["runs"]}
for file in Path(folder, "out/tiny/results/widget").glob("*.json"):
    row = by_key[file.stem]
    if (row["configuration"], row["repetition"]) == ("noisy", 0):
        file.unlink()

only = ["--configs", folder / "configs.yaml", "--category", "widget", "--seeds", "2"]
benchmark("labels", *only, "--over", "train.supervision_ratio=0,1", "--weak", "drop,use")
benchmark("again", *both)
worker = ["--category", "widget", "--seeds", "1", "--num-workers", "1"]
benchmark("worker", "--configs", folder / "configs.yaml", *worker, out=folder / "worker")

paper = ["--paper", folder / "paper.csv", "--paper-dataset", "tinies"]
one = ["--configs", folder / "configs.yaml", "--configs", folder / "wild.yaml", "--seeds", "1"]
benchmark("official", *one, *paper, data=official, out=folder / "official")
benchmark("refused", *only, "--configs", "champion", data=official, out=folder / "refused")
said["refused"]["left"] = Path(folder, "refused").exists()
benchmark("paper of another split", *both, *paper)
(folder / "said.json").write_text(json.dumps(said))
"""

PAPER = "dataset,category,metric,mean_percent,std_percent\ntinies,widget,aupro,91.5,0.4\n"


@dataclass(frozen=True)
class Outcome:
    """What the commands said and left."""

    folder: Path
    said: dict[str, dict[str, Any]]
    tracker: MLflowTracker
    config: Config

    def cells(self, name: str) -> dict[tuple[str, str, int], dict[str, Any]]:
        rows = self.said[name]["json"]["runs"]
        return {(row["category"], row["configuration"], row["repetition"]): row for row in rows}

    def rows(self, name: str) -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["category"], row["configuration"]): row for row in self.said[name]["json"]["table"]["rows"]}


@pytest.fixture(scope="module")
def outcome(tiny_data: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("benchmark")
    flat = flatten(tiny_config)
    files = {
        "config.yaml": flat,
        "configs.yaml": {"noisy": flat | {"synthesis.noise_sigma": 0.1}},
        "wild.yaml": {"wild": flat | {"train.lr_heads": 1e30}},
    }
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content))
    (folder / "paper.csv").write_text(PAPER)
    write_mvtec(folder / "raw", "widget")
    ingest(Manifest(name="tiny", layout="mvtec"), folder / "raw", str(folder / "shards"), protocol="official")
    tracking_uri = default_tracking_uri(folder)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": tracking_uri,
    }
    command = [sys.executable, "-c", DRIVER, str(folder), str(tiny_data), str(folder / "shards")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder, timeout=1800)
    assert done.returncode == 0, done.stderr
    return Outcome(folder, json.loads((folder / "said.json").read_text()), MLflowTracker(tracking_uri), tiny_config)


def test_every_cell_is_filled(outcome: Outcome) -> None:
    first = outcome.said["first"]
    assert first["status"] == 0, first["err"]
    assert "8 runs fill 8 cells; 0 of them are there already" in first["err"]
    assert "widget: 4 runs complete, 0 failed" in first["err"]
    cells = outcome.cells("first")
    assert set(cells) == {(c, d, r) for c in CATEGORIES for d in ("noisy", "champion") for r in range(SEEDS)}
    for row in cells.values():
        assert row["failure"] is None
        assert all(0 <= row[f"test_{metric}"] <= 1 for metric in METRICS)
        assert all(0 <= row[f"validation_{metric}"] <= 1 for metric in METRICS)
        assert row["test_image_ap_95_low"] <= row["test_image_ap"] <= row["test_image_ap_95_high"]
        assert row["elapsed_s"] > row["duration_s"] > 0
    rows = outcome.rows("first")
    assert {n["n"] for n in rows.values()} == {SEEDS}
    assert ("mean", "champion") in rows


def test_numbers_are_those_of_the_engine_and_the_predictor_without_ray(outcome: Outcome, tiny_data: Path) -> None:
    torch.set_num_threads(1)
    found = outcome.cells("first")["widget", "noisy", 1]
    flat = flatten(outcome.config) | {
        "synthesis.noise_sigma": 0.1,
        "train.train_seed": 1,
        "train.label_seed": 1,
    }
    config = unflatten(flat)
    search = open_search_data(str(tiny_data), "tiny", "widget")
    reports: list[EpochReport] = []
    fit(config, extract(config, search, prepare_backbone(config, search)), report=lambda r, save: reports.append(r))
    for metric in METRICS:
        expected = reports[-1].metrics[f"val_{metric}"]
        assert found[f"validation_{metric}"] == pytest.approx(expected, rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)
    out = outcome.folder / "by hand"
    train(config, data_uri=str(tiny_data), dataset="tiny", category="widget", out=out)
    test = open_test_data(str(tiny_data), "tiny", "widget")
    evaluation = evaluate_samples(Predictor.from_directory(out), test.stream())
    for metric in METRICS:
        expected = evaluation.metrics.values[metric]
        assert found[f"test_{metric}"] == pytest.approx(expected, rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)


def test_what_was_lost_is_done_again_and_nothing_else(outcome: Outcome) -> None:
    """The lost run is one of the label value curve's too, whose command does it again."""
    labels, again = outcome.said["labels"], outcome.said["again"]
    assert labels["status"] == 0, labels["err"]
    # ratio 1 is the noisy configuration of before, with weak labels and without
    assert "6 runs fill 8 cells; 1 of them are there already" in labels["err"]
    assert "5/5 runs, 0 running, 0 failed" in labels["err"]
    assert labels["json"]["num_already"] == 1
    assert "8 runs fill 8 cells; 8 of them are there already" in again["err"]
    assert "running" not in again["err"]
    before, after = (outcome.cells(name) for name in ("first", "again"))
    lost = ("widget", "noisy", 0)
    assert [cell for cell in before if before[cell] != after[cell]] == [lost]
    for metric in METRICS:
        assert after[lost][f"test_{metric}"] == pytest.approx(before[lost][f"test_{metric}"], rel=GOLDEN_RTOL)


def test_tables_and_runs_are_beside_the_results_and_in_mlflow(outcome: Outcome) -> None:
    folder = outcome.folder / "out/tiny"
    (parent,) = [r for r in outcome.tracker.find_runs("tiny") if r.stage == "benchmark" and not r.parent_run_id][:1]
    assert parent.tags["sweep_id"] == ResultStore.open(str(outcome.folder / "out"), "tiny").benchmark_id()
    artifacts = {name.rpartition("/")[2] for name in outcome.tracker.list_artifacts(parent.run_id, "benchmark")}
    names = {"table.md", "table.csv", "table.tex", "runs.csv", "label_value.csv", "label_value-widget-noisy.png"}
    assert artifacts == names
    assert names <= {file.name for file in folder.iterdir()}
    printed = outcome.said["first"]["out"]
    for word in ("protocol validation", "core-seconds", "noisy: resnet18", "image", "±", f"written: {folder}/table.md"):
        assert word in printed
    with (folder / "runs.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 8


def test_tracker_has_a_run_per_network_below_one_parent(outcome: Outcome) -> None:
    runs = [r for r in outcome.tracker.find_runs("tiny") if r.stage == "benchmark"]
    parent = next(r for r in runs if r.parent_run_id is None)
    children = [r for r in runs if r.parent_run_id == parent.run_id]
    # the label values are of the same folder and so of the same benchmark
    networks = {row["run"] for name in ("first", "labels") for row in outcome.cells(name).values()}
    assert len(children) == len(networks) == 8 + 4
    assert {(r.status, r.trial_state) for r in children} == {("FINISHED", "COMPLETE")}
    assert parent.status == "FINISHED"
    for child in children:
        assert set(child.metrics) >= {f"test_{metric}" for metric in METRICS} | {"val_image_ap", "train_loss"}
        assert child.tags["protocol"] == "validation"
        assert child.tags["configuration"]
        assert child.params["train.train_seed"] == child.params["train.label_seed"] == child.tags["repetition"]
        assert len(outcome.tracker.list_artifacts(child.run_id)) == 3
    times = {int(r.tags["test_split_scored_times"]) for r in children if r.category == "gadget"}
    assert max(times) >= 5, "the sweep's champion was the first"


def test_sweeps_are_none_the_wiser(outcome: Outcome) -> None:
    assert outcome.said["sweep"]["status"] == 0, outcome.said["sweep"]["err"]
    for name in ("", " champions"):
        files = [outcome.folder / f"{when}{name}.json" for when in ("before", "after")]
        before, after = (json.loads(file.read_text()) for file in files)
        assert before
        assert before == after


def test_labels_have_a_value(outcome: Outcome) -> None:
    dots = outcome.said["labels"]["json"]["label_value"]
    assert sorted((dot["weak_labels"], dot["masks"]) for dot in dots) == [
        (weak, masks) for weak in ("drop", "use") for masks in (0, 0, 6, 6)
    ]
    assert (outcome.folder / "out/tiny/label_value-widget-noisy.png").read_bytes()[:4] == b"\x89PNG"
    rows = outcome.rows("labels")
    weak = rows["widget", "noisy, supervision_ratio=0, weak_labels=use"]
    assert (weak["train_labels"], weak["train_masks"]) == (6, 0)
    assert rows["widget", "noisy, supervision_ratio=0, weak_labels=drop"]["metrics"] != weak["metrics"]


def test_worker_group_scores_as_the_trial_process_does(outcome: Outcome) -> None:
    assert outcome.said["worker"]["status"] == 0, outcome.said["worker"]["err"]
    (row,) = outcome.cells("worker").values()
    expected = outcome.cells("first")["widget", "noisy", 0]
    for metric in METRICS:
        assert row[f"test_{metric}"] == pytest.approx(expected[f"test_{metric}"], rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)


def test_failure_of_one_run_costs_no_other(outcome: Outcome) -> None:
    official = outcome.said["official"]
    assert official["status"] == 0, official["err"]
    assert "warning: 1 of 2 runs failed; the same command tries them again" in official["err"]
    (line,) = official["json"]["failures"]
    assert re.match(r"widget: wild, repetition 0 failed: .*the training loss became nan", line)
    assert "\n" not in line
    rows = outcome.rows("official")
    assert (rows["widget", "noisy"]["n"], rows["widget", "wild"]["n"]) == (1, 0)
    assert rows["widget", "wild"]["metrics"]["aupro"] == {
        "mean": None,
        "std": None,
        "n": 0,
        "undefined": "no repetition has finished",
    }
    (failed,) = [r for r in outcome.tracker.find_runs("tiny") if r.trial_state == "FAIL"]
    assert (failed.stage, failed.status) == ("benchmark", "FAILED")


def test_official_protocol_has_no_validation_and_the_papers_figures(outcome: Outcome) -> None:
    for row in outcome.cells("official").values():
        if row["configuration"] == "wild":
            continue
        assert all(row[f"validation_{metric}"] is None for metric in METRICS)
        assert all(0 <= row[f"test_{metric}"] <= 1 for metric in METRICS)
        assert row["protocol"] == "official"
    markdown = (outcome.folder / "official/tiny/table.md").read_text()
    assert "| widget | paper |  |  |  | — | — | — | — | 91.5 ± 0.4 |" in markdown
    assert "protocol official: the published train and test split" in markdown
    assert outcome.rows("official")["widget", "noisy"]["validation_labels"] == 0
    elsewhere = outcome.said["paper of another split"]
    assert elsewhere["status"] == 0, elsewhere["err"]
    assert "note: the paper's figures are left out: they are for the published split" in elsewhere["err"]
    assert "91.5" not in elsewhere["out"]


def test_champion_tuned_on_the_test_split_is_refused_before_anything_starts(outcome: Outcome) -> None:
    refused = outcome.said["refused"]
    assert refused["status"] == 2
    assert refused["err"].startswith("error: tiny/widget: its champion was tuned on ")
    assert refused["err"].count("\n") == 1
    assert not refused["left"]


def test_champions_are_found_for_the_category_and_never_made_of_a_benchmark(outcome: Outcome) -> None:
    from ssn.errors import SSNError
    from tuning.champions.registry import find_champion, promote

    uri = outcome.tracker.tracking_uri
    champion = find_champion(uri, "tiny", "widget")
    assert champion.config == outcome.config.resolved()
    assert champion.version == "1"
    with pytest.raises(SSNError, match=r"^tiny\.screw has no champion at sqlite:.*; run `tuning sweep` first"):
        find_champion(uri, "tiny", "screw")
    run = next(r for r in outcome.tracker.find_runs("tiny") if r.stage == "benchmark" and r.trial_state == "COMPLETE")
    with pytest.raises(SSNError, match="is a benchmark's, whose test scores are known"):
        promote(run.run_id, uri)
