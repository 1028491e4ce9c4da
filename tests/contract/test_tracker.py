"""Every tracker must behave the same: a suite of tests to subclass, with one fixture per backend."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ssn.errors import SSNError
from tuning.tracking import MemoryTracker, MLflowTracker, Outbox, RunRecord, Sweep, Tracker, TrialInfo
from tuning.tracking.mlflow_tracker import default_tracking_uri, ui_command
from tuning.tracking.protocol import BENCHMARK_STAGE, PARENT_STAGE, TRIAL_MODEL_FILES

SWEEP = Sweep(
    sweep_id="s1",
    dataset="widgets",
    categories={
        "bolt": {"search_fingerprint": "f-bolt", "test_fingerprint": "t-bolt"},
        "nut": {"search_fingerprint": "f-nut", "test_fingerprint": "t-nut"},
    },
    tags={"git_commit": "0123abc", "git_dirty": "false", "version_torch": "2.15.0"},
)
CONFIG = {"synthesis.noise_sigma": 0.015, "train.epochs": 3, "model.layers": [2, 3], "train.draws_per_epoch": None}


def make_trial(index: int = 0, category: str = "bolt", stage: str = "search") -> TrialInfo:
    return TrialInfo(category=category, trial_key=f"key{index}", index=index, config=CONFIG, stage=stage)


def names(run: RunRecord, handle: str) -> bool:
    """Whether a handle is of this run."""
    return handle in (run.run_id, run.run_key)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    folder.mkdir()
    for name in (*TRIAL_MODEL_FILES, "backbone.safetensors", "optimizer.safetensors"):
        (folder / name).write_bytes(name.encode())
    return folder


class TrackerContract:
    """Subclass with a fixture ``tracker`` that gives an empty tracker, and ``restored`` if state outlives a process."""

    def restored(self, tracker: Tracker) -> Tracker:
        """The tracker of a new driver process over the same store."""
        return tracker

    def runs(self, tracker: Tracker, **where: str) -> dict[str, RunRecord]:
        records = tracker.find_runs(SWEEP.dataset, **where)
        assert len({r.run_key for r in records}) == len(records), "a run key must not occur twice"
        return {r.name: r for r in records}

    def test_keeps_the_protocol(self, tracker: Tracker) -> None:
        assert isinstance(tracker, Tracker)

    def test_benchmark_ends_with_its_one_parent(self, tracker: Tracker) -> None:
        tracker.check()
        benchmark = replace(SWEEP, sweep_id="b1", stage=BENCHMARK_STAGE)
        tracker.start_sweep(benchmark)
        tracker.start_sweep(SWEEP)
        ended = tracker.start_trial(benchmark, make_trial(stage=BENCHMARK_STAGE))
        tracker.finish_trial(ended, "PRUNED")
        tracker.start_trial(benchmark, make_trial(1, stage=BENCHMARK_STAGE))
        tracker.finish_sweep(benchmark)
        own = self.runs(tracker, sweep_id="b1").values()
        assert [run.status for run in own if run.parent_run_id is None] == ["FINISHED"]
        assert sorted(str(run.trial_state) for run in own if run.parent_run_id) == ["INTERRUPTED", "PRUNED"]
        assert {run.status for run in self.runs(tracker, sweep_id="s1").values()} == {"RUNNING"}

    def test_unknown_dataset_has_no_runs(self, tracker: Tracker) -> None:
        assert tracker.find_runs("nothing") == []

    def test_sweep_is_a_tree_of_parents_and_trials(self, tracker: Tracker, model_dir: Path) -> None:
        tracker.check()
        parents = tracker.start_sweep(SWEEP)
        for category in ("bolt", "nut"):
            for index in range(2):
                run_id = tracker.start_trial(SWEEP, make_trial(index, category))
                tracker.finish_trial(run_id, "COMPLETE", artifact_dir=model_dir)
        tracker.finish_sweep(SWEEP)

        runs = self.runs(tracker)
        assert set(runs) == {"bolt", "nut", "bolt-000", "bolt-001", "nut-000", "nut-001"}
        assert {name for name, r in runs.items() if r.parent_run_id is None} == set(parents)
        assert all(names(runs[category], parents[category]) for category in parents)
        assert runs["nut-001"].parent_run_id == runs["nut"].run_id
        assert runs["bolt"].stage == PARENT_STAGE
        assert runs["nut"].tags["search_fingerprint"] == "f-nut"
        assert {r.status for r in runs.values()} == {"FINISHED"}

    def test_trial_carries_params_metrics_tags(self, tracker: Tracker, model_dir: Path) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial(7))
        for epoch in (1, 2, 3):
            tracker.log_epoch(run_id, epoch, {"train_loss": 1 / epoch, "objective": 0.5 + epoch / 10})
        tracker.finish_trial(run_id, "COMPLETE", artifact_dir=model_dir)

        run = self.runs(tracker)["bolt-007"]
        assert names(run, run_id)
        assert run.params == {key: str(value) for key, value in CONFIG.items()}
        assert run.metrics == pytest.approx({"train_loss": 1 / 3, "objective": 0.8, "epoch": 3})
        assert tracker.metric_history(run_id, "train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
        expected = {"sweep_id": "s1", "stage": "search", "dataset": "widgets", "category": "bolt"}
        expected |= {"trial_identity": "key7", "trial_index": "7", "trial_state": "COMPLETE", "git_commit": "0123abc"}
        expected |= {"search_fingerprint": "f-bolt", "test_fingerprint": "t-bolt", "version_torch": "2.15.0"}
        assert {key: run.tags[key] for key in expected} == expected
        assert run.run_key == "s1/search/bolt/key7"

    def test_complete_trial_keeps_its_model_without_backbone(self, tracker: Tracker, model_dir: Path) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial())
        assert tracker.list_artifacts(run_id) == []
        tracker.finish_trial(run_id, "COMPLETE", artifact_dir=model_dir)
        assert tracker.list_artifacts(run_id) == sorted(f"model/{name}" for name in TRIAL_MODEL_FILES)

    def test_complete_trial_without_model_is_refused(self, tracker: Tracker) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial())
        with pytest.raises(ValueError, match="model"):
            tracker.finish_trial(run_id, "COMPLETE")

    @pytest.mark.parametrize(
        ("state", "status"), [("PRUNED", "FINISHED"), ("FAIL", "FAILED"), ("INTERRUPTED", "KILLED")]
    )
    def test_state_decides_status(self, tracker: Tracker, state: str, status: str) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial())
        tracker.finish_trial(run_id, state, error="out of memory" if state == "FAIL" else None)  # type: ignore[arg-type]
        run = self.runs(tracker)["bolt-000"]
        assert (run.status, run.trial_state) == (status, state)
        assert run.tags.get("error") == ("out of memory" if state == "FAIL" else None)

    def test_restored_sweep_continues_its_runs(self, tracker: Tracker, model_dir: Path) -> None:
        parents = tracker.start_sweep(SWEEP)
        done = tracker.start_trial(SWEEP, make_trial(0))
        tracker.finish_trial(done, "COMPLETE", artifact_dir=model_dir)
        cut_short = tracker.start_trial(SWEEP, make_trial(1))
        tracker.log_epoch(cut_short, 1, {"train_loss": 1.0})
        tracker.log_epoch(cut_short, 2, {"train_loss": 0.5})
        tracker.flush()  # and now the driver is killed: nothing is ended, nothing else is written
        before = {r.name: r.run_id for r in tracker.find_runs(SWEEP.dataset)}

        tracker = self.restored(tracker)
        assert tracker.start_sweep(SWEEP) == parents
        assert tracker.start_trial(SWEEP, make_trial(1)) == cut_short
        # Tune restores the trial from the checkpoint of epoch 1, so that epoch 2 comes again.
        tracker.log_epoch(cut_short, 2, {"train_loss": 0.5})
        tracker.log_epoch(cut_short, 3, {"train_loss": 0.25})
        tracker.finish_trial(cut_short, "COMPLETE", artifact_dir=model_dir)
        tracker.finish_sweep(SWEEP)

        runs = self.runs(tracker)
        assert {name: r.run_id for name, r in runs.items()} == before
        assert set(runs) == {"bolt", "nut", "bolt-000", "bolt-001"}
        assert {r.status for r in runs.values()} == {"FINISHED"}
        assert tracker.metric_history(cut_short, "train_loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]

    def test_no_run_is_left_running(self, tracker: Tracker) -> None:
        tracker.start_sweep(SWEEP)
        tracker.start_trial(SWEEP, make_trial(0))
        lost = self.restored(tracker)
        lost.finish_sweep(SWEEP, "KILLED")
        runs = self.runs(lost)
        assert {r.status for r in runs.values()} == {"KILLED"}
        assert runs["bolt-000"].trial_state == "INTERRUPTED"

    def test_failed_trial_tried_again_forgets_its_error(self, tracker: Tracker, model_dir: Path) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial())
        tracker.finish_trial(run_id, "FAIL", error="boom")
        tracker = self.restored(tracker)
        assert tracker.start_trial(SWEEP, make_trial()) == run_id
        run = self.runs(tracker)["bolt-000"]
        assert (run.status, run.trial_state, run.tags.get("error")) == ("RUNNING", None, None)
        tracker.finish_trial(run_id, "COMPLETE", artifact_dir=model_dir)
        assert self.runs(tracker)["bolt-000"].status == "FINISHED"

    def test_sweeps_and_stages_never_merge(self, tracker: Tracker) -> None:
        other = Sweep(sweep_id="s2", dataset=SWEEP.dataset, categories=SWEEP.categories)
        tracker.start_sweep(SWEEP)
        tracker.start_sweep(other)
        ids = [
            tracker.start_trial(SWEEP, make_trial()),
            tracker.start_trial(SWEEP, make_trial(stage="repeat")),
            tracker.start_trial(SWEEP, make_trial(category="nut")),
            tracker.start_trial(other, make_trial()),
        ]
        assert len(set(ids)) == 4
        assert {r.run_id for r in tracker.find_runs(SWEEP.dataset, sweep_id="s1")}.isdisjoint(
            r.run_id for r in tracker.find_runs(SWEEP.dataset, sweep_id="s2")
        )
        assert len(tracker.find_runs(SWEEP.dataset, sweep_id="s1", category="nut")) == 2

    def test_summary_goes_to_any_run(self, tracker: Tracker, tmp_path: Path) -> None:
        parents = tracker.start_sweep(SWEEP)
        tracker.finish_sweep(SWEEP)
        (tmp_path / "cases.png").write_bytes(b"picture")
        tracker.log_summary(
            parents["nut"],
            metrics={"test_image_auroc": 0.97},
            tags={"champion_version": "1"},
            files=[tmp_path / "cases.png"],
            artifact_path="report",
        )
        run = self.runs(tracker)["nut"]
        assert run.metrics == pytest.approx({"test_image_auroc": 0.97})
        assert (run.tags["champion_version"], run.status) == ("1", "FINISHED")
        assert tracker.list_artifacts(parents["nut"], "report") == ["report/cases.png"]

    def test_many_epochs_between_flushes(self, tracker: Tracker) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial())
        for epoch in range(1, 301):
            tracker.log_epoch(run_id, epoch, {f"m{i}": float(epoch + i) for i in range(5)}, tags={"hostname": "a"})
        tracker.finish_trial(run_id, "PRUNED")
        assert tracker.metric_history(run_id, "m4") == [(epoch, epoch + 4.0) for epoch in range(1, 301)]
        assert self.runs(tracker)["bolt-000"].tags["hostname"] == "a"

    def test_run_is_known_by_either_name(self, tracker: Tracker) -> None:
        tracker.start_sweep(SWEEP)
        tracker.start_trial(SWEEP, make_trial())
        run = self.runs(tracker)["bolt-000"]
        tracker.log_epoch(run.run_id, 1, {"train_loss": 1.0})
        tracker.finish_trial(run.run_id, "PRUNED")
        tracker.log_summary(run.run_id, tags={"note": "kept"})
        run = self.runs(tracker)["bolt-000"]
        assert (run.trial_state, run.tags["note"]) == ("PRUNED", "kept")
        assert tracker.metric_history(run.run_id, "train_loss") == [(1, 1.0)]

    def test_epoch_of_a_run_that_another_process_opened_is_not_doubled(self, tracker: Tracker) -> None:
        tracker.start_sweep(SWEEP)
        tracker.start_trial(SWEEP, make_trial())
        run_id = self.runs(tracker)["bolt-000"].run_id
        tracker.log_epoch(run_id, 1, {"train_loss": 1.0})
        tracker.flush()
        tracker = self.restored(tracker)
        tracker.log_epoch(run_id, 1, {"train_loss": 9.0})
        tracker.log_epoch(run_id, 2, {"train_loss": 0.5})
        assert tracker.metric_history(run_id, "train_loss") == [(1, 1.0), (2, 0.5)]

    def test_run_has_the_times_at_which_things_happened(self, tracker: Tracker) -> None:
        tracker.start_sweep(SWEEP, at_ms=1_000_000)
        run_id = tracker.start_trial(SWEEP, make_trial(), at_ms=2_000_000)
        left_open = tracker.start_trial(SWEEP, make_trial(1), at_ms=2_500_000)
        tracker.finish_trial(run_id, "PRUNED", at_ms=3_000_000)
        run = self.runs(tracker)["bolt-000"]
        assert (run.started_ms, run.ended_ms) == (2_000_000, 3_000_000)
        assert self.runs(tracker)["bolt-001"].ended_ms is None
        tracker.finish_sweep(SWEEP, at_ms=4_000_000)
        runs = self.runs(tracker)
        assert [(runs[n].started_ms, runs[n].ended_ms) for n in ("bolt", "bolt-001")] == [
            (1_000_000, 4_000_000),
            (2_500_000, 4_000_000),
        ]
        assert names(runs["bolt-001"], left_open)

    def test_what_was_said_is_there_after_closing(self, tracker: Tracker, model_dir: Path) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial())
        tracker.log_epoch(run_id, 1, {"train_loss": 1.0})
        assert tracker.drain(60)
        tracker.finish_trial(run_id, "COMPLETE", artifact_dir=model_dir)
        tracker.close()
        tracker = self.restored(tracker)
        run = self.runs(tracker)["bolt-000"]
        assert (run.trial_state, run.metrics["train_loss"]) == ("COMPLETE", 1.0)
        assert len(tracker.list_artifacts(run.run_id)) == len(TRIAL_MODEL_FILES)

    def test_survives_pickling(self, tracker: Tracker) -> None:
        tracker.start_sweep(SWEEP)
        copy = pickle.loads(pickle.dumps(tracker))
        assert isinstance(copy, Tracker)
        copy.start_sweep(SWEEP)
        assert set(self.runs(copy)) == {"bolt", "nut"}


class TestMemoryTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> Tracker:
        return MemoryTracker()


class OutboxContract(TrackerContract):
    """The contract of a tracker behind an outbox."""

    @pytest.fixture(autouse=True)
    def outboxes(self) -> Iterator[list[Outbox]]:
        """Those that a test used; no thread outlives it."""
        self.used: list[Outbox] = []
        yield self.used
        for outbox in self.used:
            outbox.close()
            assert not outbox.folder.exists(), "all was brought to the store"

    def behind(self, inner: Tracker, folder: Path) -> Outbox:
        self.used.append(Outbox(inner, folder))
        return self.used[-1]

    def restored(self, tracker: Tracker) -> Tracker:
        assert isinstance(tracker, Outbox)
        tracker.close()
        return self.behind(self.inner_restored(tracker.tracker), tracker.folder)

    def inner_restored(self, inner: Tracker) -> Tracker:
        return inner


class TestOutboxBeforeMemory(OutboxContract):
    @pytest.fixture
    def tracker(self, tmp_path: Path) -> Tracker:
        return self.behind(MemoryTracker(), tmp_path / "outbox")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, made once, because making them takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MLflowTracker(default_tracking_uri(folder)).check()
    return folder / "mlflow.db"


class TestMLflowTrackerSQLite(TrackerContract):
    @pytest.fixture
    def tracker(self, empty_database: Path, tmp_path: Path) -> Tracker:
        shutil.copy(empty_database, tmp_path / "mlflow.db")
        return MLflowTracker(default_tracking_uri(tmp_path))

    def restored(self, tracker: Tracker) -> Tracker:
        assert isinstance(tracker, MLflowTracker)
        return MLflowTracker(tracker.tracking_uri)

    def test_artifacts_lie_beside_the_database(self, tracker: Tracker, model_dir: Path, tmp_path: Path) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial())
        tracker.finish_trial(run_id, "COMPLETE", artifact_dir=model_dir)
        stored = tmp_path / "mlruns" / "widgets" / run_id / "artifacts" / "model" / "heads.safetensors"
        assert stored.read_bytes() == b"heads.safetensors"

    def test_pickling_writes_what_is_buffered(self, tracker: Tracker) -> None:
        tracker.start_sweep(SWEEP)
        run_id = tracker.start_trial(SWEEP, make_trial())
        tracker.log_epoch(run_id, 1, {"train_loss": 1.0})
        copy = pickle.loads(pickle.dumps(tracker))
        assert copy.metric_history(run_id, "train_loss") == [(1, 1.0)]

    def test_runs_of_others_in_the_experiment_are_left_alone(self, tracker: Tracker) -> None:
        assert isinstance(tracker, MLflowTracker)
        tracker.start_sweep(SWEEP)
        experiment = tracker.client.get_experiment_by_name(SWEEP.dataset)
        tracker.client.create_run(experiment.experiment_id, run_name="by hand")
        assert set(self.runs(tracker)) == {"bolt", "nut"}

    def test_driver_killed_before_params_were_written(self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
        assert isinstance(tracker, MLflowTracker)
        tracker.start_sweep(SWEEP)

        def die(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(tracker.client, "log_batch", die)
            with pytest.raises(KeyboardInterrupt):
                tracker.start_trial(SWEEP, make_trial())
        tracker = self.restored(tracker)
        tracker.start_trial(SWEEP, make_trial())
        assert self.runs(tracker)["bolt-000"].params["train.epochs"] == "3"

    def test_deleted_experiment_is_named(self, tracker: Tracker) -> None:
        assert isinstance(tracker, MLflowTracker)
        tracker.start_sweep(SWEEP)
        experiment = tracker.client.get_experiment_by_name(SWEEP.dataset)
        tracker.client.delete_experiment(experiment.experiment_id)
        with pytest.raises(SSNError, match="mlflow experiments restore --experiment-id"):
            self.restored(tracker).start_sweep(Sweep("s9", SWEEP.dataset, SWEEP.categories))


class TestOutboxBeforeMLflow(OutboxContract):
    @pytest.fixture
    def tracker(self, empty_database: Path, tmp_path: Path) -> Tracker:
        shutil.copy(empty_database, tmp_path / "mlflow.db")
        return self.behind(MLflowTracker(default_tracking_uri(tmp_path), persistent=False), tmp_path / "outbox")

    def inner_restored(self, inner: Tracker) -> Tracker:
        assert isinstance(inner, MLflowTracker)
        return MLflowTracker(inner.tracking_uri, persistent=False)


@pytest.fixture(scope="class")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    MLflowTracker(default_tracking_uri(folder)).check()
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "-w", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", default_tracking_uri(folder), "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_up(f"{uri}/health", server, folder / "log")
        yield uri
    finally:
        # The server's children end with it only when the whole group is asked to.
        os.killpg(server.pid, 15)
        server.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no answer from {url}: {log.read_text()}")


@pytest.mark.integration
class TestMLflowTrackerServer(TrackerContract):
    @pytest.fixture
    def tracker(self, server_uri: str) -> Tracker:
        tracker = MLflowTracker(server_uri)
        experiment = tracker.client.get_experiment_by_name(SWEEP.dataset)
        if experiment is not None:
            # A name is taken for ever on a server; the runs of the last test go, and with them its sweep.
            for run in tracker.client.search_runs([experiment.experiment_id]):
                tracker.client.delete_run(run.info.run_id)
        return tracker

    def restored(self, tracker: Tracker) -> Tracker:
        assert isinstance(tracker, MLflowTracker)
        return MLflowTracker(tracker.tracking_uri)


def test_server_that_is_down_is_named() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SSNError, match=f"MLflow at {uri} does not answer") as caught:
        MLflowTracker(uri).check()
    assert "\n" not in str(caught.value)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_database_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is a text file, not a database, and long enough to be read as one" * 50)
    with pytest.raises(SSNError, match=r"mlflow\.db cannot be written \(file is not a database\)"):
        MLflowTracker(default_tracking_uri(tmp_path)).check()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SSNError, match=r"file/sub/mlflow\.db cannot be written"):
        MLflowTracker(default_tracking_uri(tmp_path / "file" / "sub")).check()


@pytest.mark.parametrize("uri", ["ftp://somewhere/mlruns", "./mlruns"])
def test_kind_of_store_that_mlflow_lacks_is_named(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SSNError, match=r"cannot keep runs at .*sqlite:"):
        MLflowTracker(uri).check()


def test_ui_command_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        ui_command("sqlite:///mlflow.db") == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db --port 5000"
    )
    assert ui_command("http://tracking.example:5000") is None
