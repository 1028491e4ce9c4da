"""The whole platform without the training: what thousands of trials cost in search, pruning, tracking and a resume.

Every trial replays a learning curve that follows from its settings, its category and a seed; searcher, scheduler, Tune,
ledger, studies, outbox and an MLflow database are those of a sweep, and afterwards a second driver's work is done: it
reads the ledger, makes studies and rungs again, and compares all runs. Prints a line per tenth of the sweep, then a
table: is a trial at the end as cheap as one at the beginning, and where does its time go?

    python -m tests.benchmarks.replay_scale --categories 20 --trials 8
    python -m tests.benchmarks.replay_scale --categories 100 --trials 64 --json scale-100x64.json
    python -m tests.benchmarks.replay_scale --categories 1000 --trials 16 --json scale-1000x16.json
    python -m tests.benchmarks.replay_scale --categories 20 --trials 8 --profile profile.out   # see python -m pstats
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import gc
import json
import math
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from ssn.config import Config, digest, flatten
from tests.benchmarks.measure import describe_machine
from tuning.champions.winner import TrialRecord
from tuning.execution.weights import weights_key
from tuning.search.portion import Portion
from tuning.search.rungs import Rungs
from tuning.search.scheduler import MultiplexScheduler
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import Choice, FloatRange
from tuning.sweep import connect_ray
from tuning.tracking.protocol import TRIAL_MODEL_FILES

EPOCHS = 9
RUNGS = Rungs(grace_epochs=1, eta=3)
METRICS = ("train_loss", "val_loss", "val_image_auroc", "val_image_ap", "val_pixel_auroc", "val_pixel_ap", "val_aupro")
MODEL_BYTES = 2000
"""Of each file of a replayed model: the files are counted here, not their bytes."""
DATASET = "replayed"


def replay(trial: dict[str, Any]) -> None:
    """Tune trainable that reports a recorded curve as fast as Tune takes it."""
    from ray import tune

    for epoch, result in enumerate(curve(trial), start=1):
        compared = epoch == EPOCHS or epoch in RUNGS.epochs(EPOCHS)
        if not compared:
            tune.report(result)
            continue
        with tempfile.TemporaryDirectory() as folder:
            for name in TRIAL_MODEL_FILES:
                Path(folder, name).write_bytes(bytes(MODEL_BYTES))
            tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))


def curve(trial: dict[str, Any]) -> list[dict[str, Any]]:
    """A trial's reports: they rise towards a height that the settings decide, around an optimum of each category."""
    settings, category = trial["config"], trial["category"]
    optimum = np.random.default_rng(int(digest(category)[:8], 16)).uniform([-2.5, 0.1], [-1.0, 0.6])
    rng = np.random.default_rng(int(digest([category, trial["trial_key"]])[:8], 16))
    distance = (
        np.array([math.log10(settings["synthesis.noise_sigma"]), settings["synthesis.perlin_threshold"]]) - optimum
    )
    height = 0.95 * math.exp(-float(distance @ (distance * [0.3, 2.0])))
    results = []
    for epoch in range(1, EPOCHS + 1):
        value = height * (1 - math.exp(-epoch / 3)) + rng.normal(0, 0.01)
        result = {"epoch": epoch, "category": category, "hostname": "node", "feature_source": "cached"}
        result |= {name: value + i / 100 for i, name in enumerate(METRICS)} | {"masks_used": 3, "duration_s": 0.1}
        if epoch == EPOCHS or epoch in RUNGS.epochs(EPOCHS):
            result["objective"] = value
        results.append(result)
    return results


class Split:
    """Seconds of the driver's thread by part, each without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner: list[float] = []
        self._thread = threading.current_thread()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count what a method takes."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not self._thread:
                return method(*arguments, **options)
            start = perf_counter()
            self._inner.append(0.0)
            try:
                return method(*arguments, **options)
            finally:
                taken = perf_counter() - start
                self.seconds[part] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        setattr(owner, name, timed)


def watch_parts() -> Split:
    """Of what the platform's own classes, and Tune's snapshots, do in the driver."""
    from ray.tune.execution import experiment_state, tune_controller

    from tuning.persistence.ledger import SweepLedger
    from tuning.reporting.progress import ProgressCallback
    from tuning.tracking.callback import TrackerCallback

    split = Split()
    split.watch(SweepLedger, "write_trial", "ledger")
    split.watch(MultiplexSearcher, "suggest", "search: suggest")
    for name in ("on_trial_result", "on_trial_complete"):
        split.watch(MultiplexSearcher, name, "search: learn")
    for name in ("on_trial_add", "on_trial_result"):
        split.watch(MultiplexScheduler, name, "scheduler")
    for name in ("on_step_begin", "on_trial_start", "on_trial_result", "on_checkpoint", "on_step_end"):
        split.watch(TrackerCallback, name, "tracking: while trials run")
    split.watch(TrackerCallback, "on_trial_complete", "tracking: as trials end")
    for name in ("on_step_end", "on_trial_complete"):
        split.watch(ProgressCallback, name, "progress")
    split.watch(experiment_state._ExperimentCheckpointManager, "sync_up_experiment_state", "Tune's snapshots")
    split.watch(tune_controller.TuneController, "step", "Tune, and waiting for trials")
    return split


class Growth:
    """What there is after each tenth of the trials."""

    def __init__(self, total: int, database: Path, outbox: Any, split: Split) -> None:
        self.total = total
        self.database = database
        self.outbox = outbox
        self.split = split
        self.rows: list[dict[str, float]] = []
        self._start_s: float | None = None
        self._ended = 0
        self._before: Counter[str] = Counter()

    def started(self) -> None:
        """The first trial begins; start-up is not a trial's cost."""
        if self._start_s is None:
            self._start_s = perf_counter()

    def ended(self) -> None:
        """A trial ended."""
        self._ended += 1
        if self._ended % max(1, self.total // 10) == 0:
            self.note()

    def note(self) -> None:
        """Add a row, and print it."""
        assert self._start_s is not None
        before = self.rows[-1] if self.rows else {"trials": 0, "elapsed_s": 0.0}
        elapsed_s, trials = perf_counter() - self._start_s, self._ended
        count = max(1, trials - before["trials"])
        seconds = self.split.seconds.copy()
        row = {
            "trials": trials,
            "elapsed_s": elapsed_s,
            "s_per_trial": (elapsed_s - before["elapsed_s"]) / count,
            "driver_mb": psutil.Process().memory_info().rss / 1e6,
            "all_mb": all_memory_mb(),
            "database_mb": self.database.stat().st_size / 1e6,
            "behind": self.outbox.num_left,
            **{f"ms {part}": 1e3 * (seconds[part] - self._before[part]) / count for part in seconds},
        }
        self._before = seconds
        self.rows.append(row)
        say(
            f"{trials}/{self.total} trials, {elapsed_s:.0f} s, {row['s_per_trial']:.3f} s a trial, driver "
            f"{row['driver_mb']:.0f} MB, all {row['all_mb']:.0f} MB, database {row['database_mb']:.1f} MB, tracking "
            f"{row['behind']:.0f} operations behind"
        )


def all_memory_mb() -> float:
    """Of this process and all it started, shared pages counted once (PSS)."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it ended meanwhile
    return total / 1e6


def run(categories: int, trials: int, folder: Path, concurrency: int) -> dict[str, Any]:
    """Replay a sweep; what it took."""
    import optuna
    from ray import tune

    from tuning.execution.interrupt import StopFlag
    from tuning.persistence.ledger import STUDIES_FILE, SweepLedger
    from tuning.persistence.ledger_callback import LedgerCallback
    from tuning.persistence.resume import close_runs, read_earlier
    from tuning.persistence.study_database import StudyDatabase
    from tuning.reporting.progress import ProgressCallback
    from tuning.tracking import MLflowTracker, Outbox, Sweep, environment_tags
    from tuning.tracking.mlflow_tracker import default_tracking_uri

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    names = [f"category-{i:05d}" for i in range(categories)]
    base = flatten(Config().resolved()) | {"train.epochs": EPOCHS}
    digests = {weights_key(Config().model): "weights"}
    space = {
        "synthesis.noise_sigma": FloatRange(1e-3, 0.3, log=True),
        "synthesis.perlin_threshold": FloatRange(0.0, 0.7),
        "train.supervision_ratio": Choice((0.0, 0.25, 0.5, 1.0)),
    }
    with clock("start Ray"):
        connect_ray()
    ledger = SweepLedger.open(folder, "replayed")

    def make_searcher(earlier: Sequence[TrialRecord] = (), database: StudyDatabase | None = None) -> MultiplexSearcher:
        return MultiplexSearcher(
            [CategorySearch(name, base, space, f"data of {name}", digests, 0) for name in names],
            sweep_id="replayed",
            trials_per_category=trials,
            earlier=earlier,
            database=database,
        )

    with clock("make studies"):
        ledger.create({})
        database = StudyDatabase(f"sqlite:///{ledger.files.path(STUDIES_FILE)}", notify=say)
        searcher = make_searcher(database=database)
    store = MLflowTracker(default_tracking_uri(folder), persistent=False)
    with clock("make the database"):
        store.check()
    tracker = Outbox(store, folder / "outbox", patience_s=600)
    sweep = Sweep("replayed", DATASET, {name: {"search_fingerprint": name} for name in names}, environment_tags())
    tracker.start_sweep(sweep)
    split = watch_parts()
    growth = Growth(categories * trials, folder / "mlflow.db", tracker, split)

    class Count(tune.Callback):
        """Tells the growth; first in line, so that what it does is nobody else's time."""

        def on_trial_start(self, *arguments: Any, **info: Any) -> None:
            growth.started()

        def on_trial_complete(self, *arguments: Any, **info: Any) -> None:
            growth.ended()

        def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
            return tune.Callback, ()

    scheduler = MultiplexScheduler(RUNGS, history=searcher)
    in_ledger = LedgerCallback(tracker, sweep, ledger=ledger, keeper=searcher, stop=StopFlag())
    callbacks = [Count(), ProgressCallback(searcher, interval_s=60), in_ledger]
    portion = Portion(searcher, in_ledger.has_begun)
    runs_of_tune = 0
    with clock("run the trials"):
        while not searcher.done:
            portion.refill()
            tune.Tuner(
                tune.with_resources(replay, {"cpu": 1}),
                tune_config=tune.TuneConfig(
                    search_alg=portion,
                    scheduler=scheduler,
                    num_samples=-1,
                    max_concurrent_trials=concurrency,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=f"replayed-{runs_of_tune}",
                    storage_path=str(folder / "ray"),
                    verbose=0,
                    callbacks=list(callbacks),  # Tune adds its own, which know all of its trials
                    failure_config=tune.FailureConfig(max_failures=1),
                ),
            ).fit()
            gc.collect()
            runs_of_tune += 1
    say(f"tracking is {tracker.num_left} operations behind")
    with clock("let tracking catch up"):
        assert tracker.drain(600)
    thread = next(t for t in threading.enumerate() if t.name == "tracking")
    assert thread.ident is not None
    tracking_cpu_s = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    with clock("let the studies' database catch up"):
        database.close(600)
    with clock("resume: read the ledger"):
        earlier = read_earlier(ledger, retry_failed=False)
    with clock("resume: make studies and rungs again"):
        again = make_searcher(earlier)
        MultiplexScheduler(RUNGS, history=again).enter_earlier(again.records())
    assert again.done
    with clock("resume: compare with the tracker"):
        assert close_runs(tracker, sweep, ledger, earlier, None) == []
    with clock("read all runs"):
        runs = tracker.find_runs(DATASET, sweep_id="replayed")
    with clock("end the sweep"):
        tracker.finish_sweep(sweep)
        tracker.close(600)
    with clock("look for open runs"):
        still_open = [r for r in store.find_runs(DATASET) if r.status == "RUNNING"]
    states = Counter(r.trial_state for r in runs if r.parent_run_id)
    snapshot = sorted((folder / "ray").rglob("*"))
    return {
        "machine": describe_machine(1),
        "categories": categories,
        "trials_per_category": trials,
        "runs_of_tune": runs_of_tune,
        "states": {str(state): count for state, count in states.items()},
        "runs_doubled": len(runs) - len({r.run_key for r in runs}),
        "runs_missing": categories * (trials + 1) - len(runs),
        "runs_open": len(still_open),
        "seconds": seconds,
        "tracking_thread_cpu_s": tracking_cpu_s,
        "peak_driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "database_mb": growth.database.stat().st_size / 1e6,
        "studies_mb": Path(ledger.files.path(STUDIES_FILE)).stat().st_size / 1e6,
        "ledger_mb": sum(p.stat().st_size for p in Path(ledger.files.path("trials")).rglob("*.json")) / 1e6,
        "ray_folder_mb": sum(p.stat().st_size for p in snapshot if p.is_file()) / 1e6,
        "ray_folder_files": sum(p.is_file() for p in snapshot),
        "rows": growth.rows,
    }


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def __call__(self, name: str) -> _Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._name] = perf_counter() - self._start
        say(f"{self._name}: {self._seconds[self._name]:.1f} s")


def to_markdown(result: dict[str, Any]) -> str:
    """The result for a person."""
    rows: Sequence[dict[str, float]] = result["rows"]
    total = result["categories"] * result["trials_per_category"]
    lines = [
        f"{result['categories']} categories x {result['trials_per_category']} trials; {result['states']}; doubled "
        f"{result['runs_doubled']}, missing {result['runs_missing']}, open {result['runs_open']}; "
        f"{result['runs_of_tune']} Tune runs",
        f"peak memory of the driver {result['peak_driver_mb']:.0f} MB, database {result['database_mb']:.1f} MB "
        f"({1e3 * result['database_mb'] / total:.1f} kB a trial), studies {result['studies_mb']:.1f} MB, ledger "
        f"{result['ledger_mb']:.1f} MB, Ray's folder {result['ray_folder_mb']:.1f} MB in {result['ray_folder_files']} "
        "files",
        f"CPU of the tracking thread: {1e3 * result['tracking_thread_cpu_s'] / total:.1f} ms a trial",
        *(f"{name}: {seconds:.1f} s" for name, seconds in result["seconds"].items()),
        "",
        "| trials | s a trial | driver MB | all MB | database kB a trial | behind |",
        "|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {r['trials']:.0f} | {r['s_per_trial']:.3f} | {r['driver_mb']:.0f} | {r['all_mb']:.0f} | "
            f"{1e3 * r['database_mb'] / r['trials']:.1f} | {r['behind']:.0f} |"
            for r in rows
        ),
        "",
        "| part of the driver | ms a trial, first tenth | last tenth |",
        "|:---|---:|---:|",
        *(
            f"| {name[3:]} | {rows[0].get(name, 0):.2f} | {rows[-1][name]:.2f} |"
            for name in sorted((n for n in rows[-1] if n.startswith("ms ")), key=lambda n: -rows[-1][n])
        ),
    ]
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Replay and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--categories", type=int, required=True)
    parser.add_argument("--trials", type=int, required=True, help="per category")
    parser.add_argument("--concurrency", type=int, default=2, help="trials at once")
    parser.add_argument("--folder", type=Path, help="for database and state; by default one that is deleted")
    parser.add_argument("--json", type=Path, help="everything that was measured")
    parser.add_argument("--profile", type=Path, help="of the driver's thread, by cProfile, which slows it down")
    arguments = parser.parse_args(argv)
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory(prefix="replay-scale-") as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.profile is not None:
            profile.enable()
        result = run(arguments.categories, arguments.trials, folder, arguments.concurrency)
        profile.disable()
    if arguments.profile is not None:
        profile.dump_stats(arguments.profile)
    print(to_markdown(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
