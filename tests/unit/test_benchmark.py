"""A whole benchmark but for its training: what is run, kept, repeated, reported; Tune is played by a loop."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import tuning.benchmarking.benchmark
import tuning.tracking
from ssn.config import Config, flatten
from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.errors import SSNError
from tests.made_up_benchmark import ONE_CORE, REPORTED, FakeTrial
from tests.raw_folders import write_mvtec
from tuning.benchmarking.benchmark import ARTIFACT_FOLDER, BenchmarkResult, benchmark
from tuning.benchmarking.results import RESULTS_FOLDER
from tuning.benchmarking.score import ScoreOnTest
from tuning.tracking import MemoryTracker
from tuning.tracking.protocol import TRIAL_MODEL_FILES

Ends = Callable[[Mapping[str, Any]], str]
"""Takes a suggestion; ``complete``, ``fail`` or ``interrupt``."""


class Played:
    """What stands in for Ray and MLflow, and what it saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracker = MemoryTracker()
        self.tracker.tracking_uri = "memory"  # type: ignore[attr-defined]
        self.ends: Ends = lambda suggestion: "complete"
        self.said = io.StringIO()
        self.trained: list[tuple[str, str, int]] = []
        for name in TRIAL_MODEL_FILES:
            (folder / name).touch()
        (folder / "error.txt").write_text("Traceback\nssn.errors.SSNError: the training loss became nan\n")

    def run_tune(
        self, searcher: Any, scheduler: Any, callbacks: Sequence[Any], contexts: Mapping[str, Any], **options: Any
    ) -> None:
        """Suggest, and end each trial at once as it is to end."""
        assert isinstance(options["finish"], ScoreOnTest)
        assert all(context.objective is None for context in contexts.values())
        for callback in callbacks:
            callback.setup()
        while (suggestion := searcher.suggest(str(len(searcher.records())))) != "FINISHED":
            trial: Any = FakeTrial(suggestion, {**REPORTED, "epoch": suggestion["config"]["train.epochs"]}, self.folder)
            name, trial.trial_id = trial.trial_id, str(len(searcher.records()) - 1)
            trial.error_file, trial.path = str(self.folder / "error.txt"), str(self.folder)
            self.trained.append((suggestion["category"], name, suggestion["config"]["train.train_seed"]))
            end = self.ends(suggestion)
            for callback in callbacks:
                callback.on_trial_start(0, [], trial)
            if end == "interrupt":
                for callback in callbacks:
                    callback.on_experiment_end([])
                return
            searcher.on_trial_complete(trial.trial_id, None if end == "fail" else trial.last_result, end == "fail")
            for callback in callbacks:
                (callback.on_trial_error if end == "fail" else callback.on_trial_complete)(0, [], trial)

    def lines(self) -> list[str]:
        """What was said on standard error since the last call."""
        text = self.said.getvalue().splitlines()
        self.said.seek(0)
        self.said.truncate()
        return text


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    stage = Played(tmp_path)
    monkeypatch.setattr(tuning.benchmarking.benchmark, "run_tune", stage.run_tune)
    monkeypatch.setattr(tuning.benchmarking.benchmark, "connect_ray", lambda: None)
    monkeypatch.setattr(tuning.benchmarking.benchmark, "place", lambda settings: ONE_CORE)
    monkeypatch.setattr(tuning.benchmarking.benchmark, "load_weights_digest", lambda model: "d" * 64)
    monkeypatch.setattr(tuning.tracking, "MLflowTracker", lambda uri, **options: stage.tracker)
    return stage


@pytest.fixture
def run(played: Played, tiny_data: Path, tiny_config: Config) -> Callable[..., BenchmarkResult]:
    file = played.folder / "own.yaml"
    file.write_text(yaml.safe_dump({"small": flatten(tiny_config)}))

    def call(**options: Any) -> BenchmarkResult:
        arguments: dict[str, Any] = {
            "dataset": "tiny",
            "data_uri": str(tiny_data),
            "categories": None,
            "configurations": [str(file)],
            "seeds": 2,
            "tracking_uri": "memory",
            "out": str(played.folder / "out"),
            "console": Console(file=played.said, width=500),
        }
        return benchmark(**(arguments | options))

    return call


def test_benchmark_runs_every_cell_once(played: Played, run: Callable[..., BenchmarkResult]) -> None:
    result = run()
    assert [(category, seed) for category, _, seed in played.trained] == [
        (c, s) for c in ("gadget", "widget") for s in (0, 1)
    ]
    assert (result.num_runs, result.num_already) == (4, 0)
    assert played.lines()[0] == "4 runs fill 4 cells; 0 of them are there already"
    rows = {(row.category, row.configuration): row for row in result.table.rows}
    assert set(rows) == {("gadget", "small"), ("widget", "small"), ("mean", "small")}
    assert rows["widget", "small"].cells["image_auroc"].mean == 0.9
    notes = "\n".join(result.table.notes)
    assert "protocol validation" in notes
    assert "cost: 48 core-seconds in 4 runs" in notes
    assert "each test split has been scored 2 times in all, sweeps included" in notes
    assert "small: resnet18 (icpr, weights random), 2 epochs, 32 x 48 pixels" in notes


def test_tables_are_kept_twice(played: Played, run: Callable[..., BenchmarkResult]) -> None:
    result = run()
    names = {"table.md", "table.csv", "table.tex", "runs.csv"}
    assert {Path(file).name for file in result.files} == names
    assert all(Path(file).is_file() for file in result.files)
    (parent,) = [r for r in played.tracker.find_runs("tiny") if r.parent_run_id is None]
    assert {n.rpartition("/")[2] for n in played.tracker.list_artifacts(parent.run_id, ARTIFACT_FOLDER)} == names
    assert (parent.status, parent.name) == ("FINISHED", f"benchmark {result.benchmark_id}")


def test_same_command_again_repeats_nothing(played: Played, run: Callable[..., BenchmarkResult]) -> None:
    first = run()
    played.trained.clear()
    again = run()
    assert played.trained == []
    assert again.num_already == 4
    assert (again.benchmark_id, again.runs) == (first.benchmark_id, first.runs)
    more = run(seeds=3)
    assert [seed for _, _, seed in played.trained] == [2, 2]
    assert more.num_already == 4
    parents = [r for r in played.tracker.find_runs("tiny") if r.parent_run_id is None]
    assert len(parents) == 1
    assert len(played.tracker.find_runs("tiny")) == 1 + 6


def test_lost_and_damaged_results_are_made_again(played: Played, run: Callable[..., BenchmarkResult]) -> None:
    run()
    lost, damaged, *_ = sorted((played.folder / "out/tiny" / RESULTS_FOLDER).glob("*/*.json"))
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:50])
    played.trained.clear()
    played.lines()
    assert run().num_already == 2
    assert len(played.trained) == 2
    assert f"note: {damaged} is damaged or of another version; its run is done again" in played.lines()
    assert len(played.tracker.find_runs("tiny")) == 1 + 4


def test_interrupt_keeps_what_is_finished(played: Played, run: Callable[..., BenchmarkResult]) -> None:
    played.ends = lambda suggestion: "complete" if suggestion["index"] == 0 else "interrupt"
    with pytest.raises(KeyboardInterrupt):
        run()
    assert played.lines()[-1] == "interrupted; 1 of 4 runs are finished, the same command does the rest"
    states = {(r.status, r.trial_state) for r in played.tracker.find_runs("tiny")}
    assert states == {("KILLED", None), ("FINISHED", "COMPLETE"), ("KILLED", "INTERRUPTED")}
    played.ends = lambda suggestion: "complete"
    assert run().num_already == 1
    assert {r.status for r in played.tracker.find_runs("tiny")} == {"FINISHED"}


def fail_second(suggestion: Mapping[str, Any]) -> str:
    widget = suggestion["category"] == "widget"
    return "fail" if widget and suggestion["config"]["train.train_seed"] == 1 else "complete"


def test_failed_run_is_reported_and_tried_again(
    played: Played, run: Callable[..., BenchmarkResult], capsys: pytest.CaptureFixture[str]
) -> None:
    played.ends = fail_second
    result = run()
    line = "widget: small, repetition 1 failed: ssn.errors.SSNError: the training loss became nan"
    assert result.failures == [line]
    assert line in result.table.notes
    assert f"{line}; see {played.folder}/error.txt" in capsys.readouterr().err.splitlines()
    assert "warning: 1 of 4 runs failed; the same command tries them again" in played.lines()
    rows = {(row.category, row.configuration): row for row in result.table.rows}
    assert (rows["widget", "small"].n, rows["gadget", "small"].n, rows["mean", "small"].n) == (1, 2, 1)
    played.ends = lambda suggestion: "complete"
    played.trained.clear()
    again = run()
    assert len(played.trained) == 1
    assert (again.failures, again.num_already) == ([], 3)


def test_nothing_finished_is_an_error(played: Played, run: Callable[..., BenchmarkResult]) -> None:
    played.ends = lambda suggestion: "fail"
    with pytest.raises(SSNError) as error:
        run(categories=["widget"])
    assert str(error.value).startswith("no run has finished; the first failure: widget: small, repetition 0 failed: ")
    assert "\n" not in str(error.value)
    (parent,) = [r for r in played.tracker.find_runs("tiny") if r.parent_run_id is None]
    assert parent.status == "FAILED"


def test_labels_have_a_picture_and_share_runs(played: Played, run: Callable[..., BenchmarkResult]) -> None:
    overs = ["train.supervision_ratio=0,0.5,1", "train.weak_labels=drop,use"]
    result = run(categories=["widget"], overs=overs)
    assert played.lines()[0] == "10 runs fill 12 cells; 0 of them are there already"
    assert {Path(file).name for file in result.files} >= {"label_value.csv", "label_value-widget-small.png"}
    assert [curve.available for curve in result.curves] == [6]
    assert len(result.to_dict()["label_value"]) == 12


def test_label_that_a_category_lacks_is_said(
    played: Played, run: Callable[..., BenchmarkResult], tmp_path: Path
) -> None:
    write_mvtec(tmp_path / "raw", "bare", masks=False)
    ingest(Manifest(name="tiny", layout="mvtec"), tmp_path / "raw", str(tmp_path / "shards"))
    result = run(data_uri=str(tmp_path / "shards"), overs=["train.supervision_ratio=0,1"])
    lines = played.lines()
    assert "note: bare: the pool has no masks, so train.supervision_ratio is taken as 0" in lines
    assert "2 runs fill 4 cells; 0 of them are there already" in lines
    assert "note: no label value curve of bare: none of its training images has a mask" in lines
    assert not [file for file in result.files if "label_value" in file]


def test_paper_is_shown_for_the_published_split_alone(played: Played, run: Callable[..., BenchmarkResult]) -> None:
    result = run(paper={("widget", "aupro"): (90.0, 0.1)})
    assert not any(row.published for row in result.table.rows)
    assert any(note.startswith("the paper's figures are left out") for note in result.table.notes)
    assert any(line.startswith("note: the paper's figures are left out") for line in played.lines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": ["gadgets"]}, "did you mean 'gadget'?"),
        ({"configurations": ["nothing.yaml"]}, "cannot read the configuration file nothing.yaml"),
        ({"sets": ["train.epoch=1"]}, "unknown config key train.epoch (--set train.epoch=1)"),
        ({"overs": ["train.epoch=1,2"]}, "unknown config key train.epoch (--over train.epoch=1)"),
        ({"seeds": 0}, "--seeds is 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    played: Played, run: Callable[..., BenchmarkResult], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SSNError) as error:
        run(**options)
    assert message in str(error.value)
    assert not (played.folder / "out").exists()
    assert played.tracker.find_runs("tiny") == []
