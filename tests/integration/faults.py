"""Faults, each put to a real sweep on a real Ray cluster, and what each costs: nothing lost, nothing doubled.

``python -m tests.integration.faults`` prints the table; names of faults choose some, ``--list`` shows them. A fault is
a function that starts a sweep, does its worst, and returns the seconds until the sweep was under way again; what that
cost is then counted in the ledger, the tracker and the studies. ``tests/integration/test_faults.py`` wants it zero.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna

from tests.raw_folders import write_mvtec
from tests.servers import ray_head
from tuning.champions.winner import TrialRecord
from tuning.persistence.ledger import STUDIES_FILE, SweepLedger
from tuning.persistence.sweep_lock import LOCK_FILE
from tuning.tracking import MLflowTracker

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900.0
POLL_S = 0.2
LOCKED_S = 20.0
EPOCHS, TRIALS = 27, 3
SETTINGS = (
    *("model.backbone=resnet18", "model.weights=random", "model.layers=[1,2]"),
    *("model.seg_channels=16", "model.cls_channels=4", "data.image_size=[32,48]", f"train.epochs={EPOCHS}"),
    *("train.batch_size=8", "eval.size=[24,32]", "eval.batch_size=4", "search.grace_epochs=3"),
)


@dataclass(frozen=True)
class Cost:
    """What a fault cost."""

    lost: int
    """Trials that had ended and are not as they were, or are missing from the budget, or failed without need."""
    doubled: int
    """Trials, runs, epochs, registered versions or scorings of a test split that are there twice."""
    stale: int
    """Runs, trials of studies and locks that say they run and do not."""
    recover_s: float
    """From the fault, or from the command that goes on after it, until a trial had more behind it than before."""


@dataclass
class Bench:
    """A folder of shards, a Ray cluster, and one sweep at a time."""

    folder: Path
    shards: Path
    address: str
    head_pid: int
    budget: int = 0
    """Trials that the sweep is to have."""
    may_fail: int = 0
    """Trials that the fault is to cost."""
    log: str = ""
    """What the sweep's commands have said."""
    ended_before: dict[Any, TrialRecord] = field(default_factory=dict)
    """Trials that had ended when the fault came."""

    @property
    def env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        return kept | {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    @property
    def out(self) -> Path:
        return self.folder / "runs"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def start(self, *options: str, categories: Sequence[str] = ("widget",), faults: str | None = None) -> Driver:
        """Begin a sweep."""
        self.budget = TRIALS * len(categories)
        module = ("tuning",) if faults is None else ("tests.integration.faulty_sweep", faults)
        words = ["sweep", "tiny", "--data", str(self.shards), "--trials", str(TRIALS), "--no-use-gpu"]
        words += [word for name in categories for word in ("--category", name)]
        words += [word for setting in SETTINGS for word in ("--set", setting)]
        return self.command(*module, *words, *options)

    def resume(self, *options: str) -> Driver:
        """Go on with the sweep, by its id and place alone."""
        return self.command("tuning", "sweep", "--resume", self.sweep_id, *options)

    def command(self, *words: str) -> Driver:
        """``python -m`` with where this sweep and its runs are."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        command = [sys.executable, "-m", *words, "--out", str(self.out), "--tracking-uri", self.tracking_uri]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=output, stderr=subprocess.STDOUT)
        return Driver(process, log)

    @property
    def sweep_id(self) -> str:
        (folder,) = self.out.iterdir()
        return folder.name

    @property
    def ledger(self) -> SweepLedger:
        return SweepLedger.open(self.out, self.sweep_id)

    def trials(self) -> list[TrialRecord]:
        """What the ledger has by now."""
        return self.ledger.read_trials() if self.out.exists() and any(self.out.iterdir()) else []

    def wait(self, driver: Driver, until: Callable[[list[TrialRecord]], bool]) -> list[TrialRecord]:
        """Until the ledger is as wanted, while the driver runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            trials = self.trials()
            if until(trials):
                return trials
            assert driver.process.poll() is None, driver.log.read_text()
            assert time.monotonic() < deadline, driver.log.read_text()
            time.sleep(POLL_S)

    def wait_for_progress(self, driver: Driver, of: list[TrialRecord], *, every: bool = False) -> float:
        """Seconds until one of the trials that ran, or every one, has more behind it than it had, or has ended."""
        started_s = time.monotonic()
        before = {r.name: r.checkpoint_epoch for r in of if r.state == "running"}
        enough = all if every else any
        self.wait(
            driver,
            lambda trials: enough(
                r.state != "running" or r.checkpoint_epoch > before[r.name] for r in trials if r.name in before
            ),
        )
        return time.monotonic() - started_s

    def under_way(self, driver: Driver) -> list[TrialRecord]:
        """Wait for a moment at which a trial has ended and another has a checkpoint; this is when faults come."""
        trials = self.wait(
            driver,
            lambda trials: (
                any(r.state in ("complete", "pruned") for r in trials)
                and any(r.state == "running" and 0 < r.checkpoint_epoch < EPOCHS for r in trials)
            ),
        )
        self.ended_before = {r.name: r for r in trials if r.state != "running"}
        return trials

    def finish(self, driver: Driver, returns: int = 0) -> str:
        """Wait for a command's end; what it said."""
        assert driver.process.wait(TIMEOUT_S) == returns, driver.log.read_text()
        return driver.log.read_text()

    def processes(self, title: str) -> list[int]:
        """Processes of this cluster whose title begins so."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and read(folder / "cmdline").startswith(title):
                pid = int(folder.name)
                while pid > 1 and pid != self.head_pid:
                    pid = int((read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or [0, 0])[1])
                if pid == self.head_pid:
                    found.append(int(folder.name))
        return found

    def cost(self, recover_s: float) -> Cost:
        """Count, once all is over."""
        trials = self.trials()
        now = {r.name: r for r in trials if r.state != "running"}
        changed = sum(now.get(name) != record for name, record in self.ended_before.items())
        failed = sum(r.state == "failed" for r in now.values())
        lost = changed + (self.budget - len(now)) + max(0, failed - self.may_fail)
        tracker = MLflowTracker(self.tracking_uri)
        runs = tracker.find_runs("tiny", sweep_id=self.sweep_id)
        trial_runs = [r for r in runs if r.parent_run_id is not None]
        keys = Counter(r.run_key for r in runs) + Counter(f"{r.category} {r.trial_key}" for r in trials)
        doubled = sum(count - 1 for count in keys.values()) + abs(len(trial_runs) - len(trials))
        for run in trial_runs:
            epochs = [step for step, _ in tracker.metric_history(run.run_id, "train_loss")]
            doubled += len(epochs) - len(set(epochs))
            lost += len(set(range(1, max(epochs, default=0) + 1)) - set(epochs))
        doubled += self.registered_again()
        stale = sum(r.status == "RUNNING" for r in runs) + (self.out / self.sweep_id / LOCK_FILE).exists()
        url = f"sqlite:///{self.out}/{self.sweep_id}/{STUDIES_FILE}"
        for study in optuna.get_all_study_names(url):
            told = optuna.load_study(study_name=study, storage=url).trials
            stale += sum(not t.state.is_finished() for t in told)
            ended = Counter(t.user_attrs["trial_key"] for t in told if t.state.name in ("COMPLETE", "PRUNED"))
            doubled += sum(count - 1 for count in ended.values())
            lost += len({r.trial_key for r in now.values() if r.state != "failed" and study.endswith(f".{r.category}")}
                        - set(ended))  # fmt: skip
        return Cost(lost, doubled, int(stale), recover_s)

    def registered_again(self) -> int:
        """Versions of each category's champion beyond the first."""
        from tuning.tracking.mlflow_tracker import open_client

        versions = Counter(v.name for v in open_client(self.tracking_uri).search_model_versions())
        return sum(count - 1 for count in versions.values())


@dataclass(frozen=True)
class Driver:
    """A command that runs, and what it says."""

    process: subprocess.Popen[bytes]
    log: Path


def read(path: Path) -> str:
    """A file of ``/proc``; empty once its process has gone."""
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def one_of(pids: list[int]) -> int:
    """The one process that there is to be."""
    assert pids, "no such process"
    return pids[0]


# The faults.


def trial_process(bench: Bench) -> float:
    """SIGKILL of a trial's process, mid-epoch."""
    driver = bench.start("--num-workers", "0", "--set", "search.max_concurrent=1")
    trials = bench.under_way(driver)
    os.kill(one_of(bench.processes("ray::ImplicitFunc")), signal.SIGKILL)
    recover_s = bench.wait_for_progress(driver, trials)
    bench.finish(driver)
    return recover_s


def training_worker(bench: Bench) -> float:
    """SIGKILL of a Ray Train worker, mid-epoch."""
    driver = bench.start("--num-workers", "1", "--set", "search.max_concurrent=1")
    trials = bench.under_way(driver)
    os.kill(one_of(bench.processes("ray::RayTrainWorker")), signal.SIGKILL)
    recover_s = bench.wait_for_progress(driver, trials)
    bench.finish(driver)
    return recover_s


def worker_group_driver(bench: Bench) -> float:
    """SIGKILL of the process that waits for a worker group."""
    driver = bench.start("--num-workers", "1", "--set", "search.max_concurrent=1")
    trials = bench.under_way(driver)
    os.kill(one_of(bench.processes("ray::ImplicitFunc")), signal.SIGKILL)
    recover_s = bench.wait_for_progress(driver, trials)
    bench.finish(driver)
    return recover_s


def node(bench: Bench) -> float:
    """SIGKILL of every process of a node on which a trial trains."""
    words = ["-m", "ray.scripts.scripts", "start", f"--address={bench.address}", "--num-cpus=1", "--block"]
    with (bench.folder / "node.txt").open("wb") as log:
        second = subprocess.Popen(
            [sys.executable, *words, "--disable-usage-stats"],
            env=bench.env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        driver = bench.start("--num-workers", "0", categories=("gadget", "widget"))
        there = replace(bench, head_pid=second.pid)
        bench.under_way(driver)
        deadline = time.monotonic() + TIMEOUT_S
        while not there.processes("ray::ImplicitFunc"):
            assert time.monotonic() < deadline
            time.sleep(POLL_S)
        bench.ended_before = {r.name: r for r in bench.trials() if r.state != "running"}
    finally:
        os.killpg(second.pid, signal.SIGKILL)
        second.wait()
    trials = bench.trials()
    recover_s = bench.wait_for_progress(driver, trials, every=True)  # which of them ran there, nobody here knows
    bench.finish(driver)
    return recover_s


def idle_process(bench: Bench) -> float:
    """SIGKILL of a trial's process after the trial, before it takes the next one."""
    faults = '{"widget/0": "killed when done"}'
    driver = bench.start("--num-workers", "0", "--set", "search.max_concurrent=1", faults=faults)
    trials = bench.wait(driver, lambda trials: any(r.state != "running" for r in trials))
    started_s = time.monotonic()
    bench.ended_before = {r.name: r for r in trials if r.state != "running"}
    bench.wait(driver, lambda trials: any(r.index == 1 and r.checkpoint_epoch > 0 for r in trials))
    recover_s = time.monotonic() - started_s
    bench.finish(driver)
    return recover_s


def feature_store(bench: Bench) -> float:
    """SIGKILL of the process that holds all features."""
    driver = bench.start("--num-workers", "0", "--set", "search.max_concurrent=1", categories=("gadget", "widget"))
    trials = bench.under_way(driver)
    os.kill(one_of(bench.processes("ray::FeatureStore")), signal.SIGKILL)
    before = {r.name for r in trials}
    started_s = time.monotonic()
    bench.wait(driver, lambda trials: any(r.name not in before and r.checkpoint_epoch > 0 for r in trials))
    recover_s = time.monotonic() - started_s
    bench.finish(driver)
    return recover_s


def driver_killed(bench: Bench) -> float:
    """SIGKILL of the driver mid-sweep; then ``--resume``."""
    driver = bench.start("--num-workers", "0", categories=("gadget", "widget"))
    trials = bench.under_way(driver)
    driver.process.kill()
    bench.finish(driver, -signal.SIGKILL)
    again = bench.resume()
    recover_s = bench.wait_for_progress(again, trials)
    bench.finish(again)
    return recover_s


def driver_killed_worker_group(bench: Bench) -> float:
    """Likewise, with worker groups."""
    driver = bench.start("--num-workers", "1", "--set", "search.max_concurrent=1")
    trials = bench.under_way(driver)
    driver.process.kill()
    bench.finish(driver, -signal.SIGKILL)
    again = bench.resume()
    recover_s = bench.wait_for_progress(again, trials)
    bench.finish(again)
    return recover_s


def driver_killed_at_champions(bench: Bench) -> float:
    """SIGKILL of the driver between two champions; then ``--resume``."""
    driver = bench.start("--num-workers", "0", categories=("gadget", "widget"))
    deadline = time.monotonic() + TIMEOUT_S
    while not list(bench.folder.glob("runs/*/champions/*.json")):
        assert driver.process.poll() is None, driver.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.process.kill()
    bench.finish(driver, -signal.SIGKILL)
    bench.ended_before = {r.name: r for r in bench.trials()}
    scored = {path: path.stat().st_mtime for path in bench.folder.glob("runs/*/scores/gadget/*.json")}
    started_s = time.monotonic()
    said = bench.finish(bench.resume())
    recover_s = time.monotonic() - started_s
    assert "scoring and registering the champion of gadget" not in said
    assert len(list(bench.folder.glob("runs/*/champions/*.json"))) == 2
    assert scored, "the first category's test split had been scored"
    return recover_s


def interrupt(bench: Bench, number: signal.Signals) -> float:
    """A signal to the driver; then the very command that it prints."""
    driver = bench.start("--num-workers", "0", categories=("gadget", "widget"))
    trials = bench.under_way(driver)
    driver.process.send_signal(number)
    said = bench.finish(driver, 130)
    command = re.search(r"to go on: python (-m tuning sweep --resume .*)", said)
    assert command is not None, said
    bench.ended_before = {r.name: r for r in bench.trials() if r.state != "running"}
    trials = bench.trials()
    with (bench.folder / "again.log").open("wb") as log:
        again = subprocess.Popen(
            [sys.executable, *shlex.split(command[1])], cwd=ROOT, env=bench.env, stdout=log, stderr=subprocess.STDOUT
        )
    follower = Driver(again, bench.folder / "again.log")
    recover_s = bench.wait_for_progress(follower, trials)
    bench.finish(follower)
    return recover_s


def sigint(bench: Bench) -> float:
    """Ctrl-C; then the command that was printed."""
    return interrupt(bench, signal.SIGINT)


def sigterm(bench: Bench) -> float:
    """SIGTERM; then the command that was printed."""
    return interrupt(bench, signal.SIGTERM)


def database_locked(bench: Bench) -> float:
    """The studies' SQLite file locked for 20 s."""
    driver = bench.start("--num-workers", "0", categories=("gadget", "widget"))
    trials = bench.under_way(driver)
    locked = sqlite3.connect(bench.out / bench.sweep_id / STUDIES_FILE, isolation_level=None, timeout=60)
    locked.execute("BEGIN EXCLUSIVE")
    locked_s = time.monotonic()
    recover_s = bench.wait_for_progress(driver, trials)
    time.sleep(max(0.0, LOCKED_S - (time.monotonic() - locked_s)))
    locked.rollback()
    locked.close()
    bench.finish(driver)
    return recover_s


def nan_loss(bench: Bench) -> float:
    """A loss that is not a number, in one trial."""
    bench.may_fail = 1
    driver = bench.start("--num-workers", "0", categories=("gadget", "widget"), faults='{"widget/1": "nan"}')
    return _one_fails(bench, driver, ("widget", 1), "the training loss became nan in epoch 1")


def out_of_memory(bench: Bench) -> float:
    """A trial that is refused more memory, at every attempt."""
    bench.may_fail = 1
    driver = bench.start("--num-workers", "0", categories=("gadget", "widget"), faults='{"widget/1": "memory"}')
    return _one_fails(bench, driver, ("widget", 1), "MemoryError")


def killed_for_memory(bench: Bench) -> float:
    """A trial that the kernel kills for its memory, at every attempt."""
    bench.may_fail = 1
    driver = bench.start("--num-workers", "0", categories=("gadget", "widget"), faults='{"widget/1": "killed"}')
    return _one_fails(bench, driver, ("widget", 1), "its process died")


def _one_fails(bench: Bench, driver: Driver, place: tuple[str, int], reason: str) -> float:
    trials = bench.wait(driver, lambda trials: any((r.category, r.index) == place for r in trials))
    started_s = time.monotonic()
    bench.wait(driver, lambda trials: any((r.category, r.index) == place and r.state == "failed" for r in trials))
    recover_s = time.monotonic() - started_s
    said = bench.finish(driver)
    (line,) = [line for line in said.splitlines() if line.startswith(f"{place[0]}: trial {place[1]} failed: ")]
    assert reason in line, line
    (failed,) = [r for r in bench.trials() if r.state == "failed"]
    assert failed.failure is not None
    assert reason in failed.failure, failed.failure
    assert "\n" not in failed.failure
    bench.ended_before = {r.name: r for r in trials if r.state != "running"}
    return recover_s


def started_twice(bench: Bench) -> float:
    """The same sweep resumed by two commands at once, and by a third while it runs."""
    driver = bench.start("--num-workers", "0", categories=("gadget", "widget"))
    trials = bench.under_way(driver)
    driver.process.kill()
    bench.finish(driver, -signal.SIGKILL)
    both = [bench.resume(), bench.resume()]
    deadline = time.monotonic() + TIMEOUT_S
    while all(d.process.poll() is None for d in both):
        assert time.monotonic() < deadline
        time.sleep(POLL_S)
    refused, accepted = sorted(both, key=lambda d: d.process.poll() is None)
    recover_s = bench.wait_for_progress(accepted, trials)
    for each in (refused, bench.resume()):
        said = bench.finish(each, 2).strip()
        assert re.fullmatch(rf"error: sweep {bench.sweep_id} is being run by process \d+ on .*; let it end", said), said
    bench.finish(accepted)
    return recover_s


def corrupt_row_group(bench: Bench) -> float:
    """A damaged shard of one category; then the shard is mended, and ``--resume --retry-failed``."""
    shards = bench.folder / "shards"
    shutil.copytree(bench.shards, shards)
    bench.shards = shards
    (shard,) = (shards / "tiny" / "widget").glob("train-*.parquet")
    whole = shard.read_bytes()
    shard.write_bytes(damage_pages(whole))
    said = bench.finish(bench.start("--num-workers", "0", categories=("gadget", "widget")))
    failures = [line for line in said.splitlines() if line.startswith("widget: trial ")]
    assert len(failures) == TRIALS, said
    assert all(str(shard.name) in line for line in failures), failures
    trials = bench.trials()
    assert [r.state for r in trials if r.category == "gadget"].count("failed") == 0
    bench.ended_before = {r.name: r for r in trials if r.category == "gadget"}
    shard.write_bytes(whole)
    again = bench.resume("--retry-failed")
    started_s = time.monotonic()
    bench.wait(again, lambda trials: any(r.category == "widget" and r.state != "failed" for r in trials))
    recover_s = time.monotonic() - started_s
    bench.finish(again)
    return recover_s


def damage_pages(data: bytes) -> bytes:
    """A Parquet file whose first column chunk is not what was written."""
    damaged = bytearray(data)
    for position in range(200, 260):
        damaged[position] ^= 0xFF
    return bytes(damaged)


FAULTS: tuple[Callable[[Bench], float], ...] = (
    training_worker,
    trial_process,
    worker_group_driver,
    idle_process,
    feature_store,
    node,
    driver_killed,
    driver_killed_worker_group,
    driver_killed_at_champions,
    sigint,
    sigterm,
    started_twice,
    database_locked,
    nan_loss,
    out_of_memory,
    killed_for_memory,
    corrupt_row_group,
)


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, int, Path]]:
    """Address and head process of a Ray cluster of one CPU, and shards of two categories."""
    from ssn.data.ingest import ingest
    from ssn.data.manifest import Manifest

    write_mvtec(folder / "raw", "widget")
    write_mvtec(folder / "raw", "gadget", first_seed=1000)
    ingest(Manifest(name="tiny", layout="mvtec"), folder / "raw", str(folder / "shards"))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    env |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ("--num-cpus=2", "--include-dashboard=false", "--object-store-memory=200000000")
    with ray_head(folder / "head.txt", env, *options) as address:
        yield address, head_pid(address), folder / "shards"


def head_pid(address: str) -> int:
    """Of the process that started a cluster's head, found by the port that it was told."""
    port = address.rpartition(":")[2]
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            words = read(folder / "cmdline")
            if "ray.scripts.scripts start --head" in words and f"--port={port} " in words:
                return int(folder.name)
    raise AssertionError(f"no head at {address}")


def inflict(fault: Callable[[Bench], float], folder: Path, where: tuple[str, int, Path]) -> Cost:
    """Put one fault to a sweep in a folder of its own."""
    address, pid, shards = where
    folder.mkdir()
    bench = Bench(folder=folder, shards=shards, address=address, head_pid=pid)
    return bench.cost(fault(bench))


def main(arguments: Sequence[str] | None = None) -> None:
    """Inflict and print."""
    by_name = {fault.__name__.replace("_", "-"): fault for fault in FAULTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FAULT", help="by default all")
    parser.add_argument("--list", action="store_true", help="name the faults")
    given = parser.parse_args(arguments)
    if given.list:
        for name, fault in by_name.items():
            print(f"{name}: {fault.__doc__}")
        return
    unknown = [name for name in given.names if name not in by_name]
    if unknown:
        parser.error(f"unknown fault {unknown[0]}; there are {', '.join(by_name)}")
    print("| fault | lost | doubled | stale | time to recover, s |\n|:---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, cluster(Path(folder)) as where:
        for name in given.names or by_name:
            cost = inflict(by_name[name], Path(folder, name), where)
            title = str(by_name[name].__doc__).splitlines()[0].rstrip(".")
            print(f"| {title} | {cost.lost} | {cost.doubled} | {cost.stale} | {cost.recover_s:.0f} |", flush=True)


if __name__ == "__main__":
    main()
