"""A sweep over three categories whose trials replay a learning curve; run by ``test_replayed_sweep.py``.

Usage: ``python replayed_sweep.py <folder> run|resume``; ``run`` kills itself, without a chance to say anything.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_AIR_NEW_OUTPUT="0",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_PRINT_ALL_TRIAL_ERRORS="0",
    TUNE_GLOBAL_CHECKPOINT_S="1e9",
)

import optuna
import ray
from ray import tune

from ssn.config import Config, flatten
from tuning.execution.weights import weights_key
from tuning.persistence.ledger import STUDIES_FILE, SweepLedger
from tuning.persistence.ledger_callback import LedgerCallback
from tuning.persistence.resume import close_runs, read_earlier
from tuning.persistence.study_database import StudyDatabase
from tuning.reporting.progress import ProgressCallback
from tuning.search.rungs import Rungs, rung_epochs
from tuning.search.scheduler import MultiplexScheduler
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import Choice, FloatRange
from tuning.tracking import MLflowTracker, Sweep
from tuning.tracking.mlflow_tracker import default_tracking_uri
from tuning.tracking.protocol import TRIAL_MODEL_FILES

EPOCHS, GRACE, ETA, TRIALS = 9, 1, 3, 6
WEIGHTS = {weights_key(Config().model): "weights"}
CATEGORIES = ("screw", "tile", "wood")
FAILS_ONCE = ("tile", 0)
"""Category and index of the trial that raises at its third epoch in the first run, and not after a resume."""
KILLED_AT = ("wood", 0, 5)
"""Category, index and epoch whose report kills the first run; the first at its rungs, it gets there."""


def replay(config: dict[str, Any]) -> None:
    """Report a curve that peaks at a sigma of 0.02; goes on from a checkpoint, of Tune's or of an earlier driver."""
    import math

    epoch = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is None and "resume_from" in config:
        checkpoint = tune.Checkpoint(config["resume_from"])
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            epoch = json.loads(Path(folder, "meta.json").read_text())["epoch"]
    settings = config["config"]
    peak = 1 - (math.log10(settings["synthesis.noise_sigma"] / 0.02)) ** 2 / 4
    marked = Path(config["folder"], f"started-{config['category']}-{config['index']}")
    with marked.open("a") as file:
        file.write(f"{epoch}\n")
    while epoch < EPOCHS:
        epoch += 1
        if (config["category"], config["index"]) == FAILS_ONCE and epoch == 3 and config["mode"] == "run":
            raise RuntimeError("replayed failure")
        if (config["category"], config["index"], epoch) == KILLED_AT:
            while not Path(config["folder"], "failed").exists():
                time.sleep(0.05)  # so that the failure comes first
        result: dict[str, Any] = {"epoch": epoch, "category": config["category"], "duration_s": epoch / 10}
        if epoch in rung_epochs(EPOCHS, GRACE, ETA) or epoch == EPOCHS:
            result["objective"] = peak * (1 - math.exp(-epoch / 3))
        with tempfile.TemporaryDirectory() as folder:
            for name in TRIAL_MODEL_FILES:
                Path(folder, name).write_text(json.dumps({"epoch": epoch}))
            tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))


class Kill(tune.Callback):
    """Kills this process, once: a resumed trial may report that epoch again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_trial_error(self, *args: Any, **info: Any) -> None:
        """Let the trial that waits for this go on to its end."""
        (self.folder / "failed").touch()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Look at the report."""
        here = (trial.config["category"], trial.config["index"], result["epoch"])
        if here == KILLED_AT and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, mode: str) -> None:
    """Run or resume, and print what the searcher and the studies know, as one line of JSON."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=10**8,
        log_to_driver=False,
        logging_level="ERROR",
    )
    ledger = SweepLedger.open(folder, "replayed")
    tracker = MLflowTracker(default_tracking_uri(Path(folder)))
    tracker.check()
    described = Sweep("replayed", "parts", {name: {} for name in CATEGORIES})
    tracker.start_sweep(described)
    earlier = read_earlier(ledger, retry_failed=True)
    lines = close_runs(tracker, described, ledger, earlier, None)
    database = StudyDatabase(f"sqlite:///{ledger.files.path(STUDIES_FILE)}")
    base = flatten(Config().resolved()) | {"train.epochs": EPOCHS}
    space = {
        "synthesis.noise_sigma": FloatRange(1e-3, 0.3, log=True),
        "train.supervision_ratio": Choice((0.0, 0.5, 1.0)),
    }
    searcher = MultiplexSearcher(
        [CategorySearch(c, base, space, f"data of {c}", WEIGHTS, 0) for c in CATEGORIES],
        sweep_id="replayed",
        trials_per_category=TRIALS,
        earlier=earlier,
        database=database,
    )
    scheduler = MultiplexScheduler(Rungs(GRACE, ETA), history=searcher)
    scheduler.enter_earlier(searcher.records())
    tune.Tuner(
        tune.with_resources(lambda config: replay(config | {"folder": folder, "mode": mode}), {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=searcher, scheduler=scheduler, num_samples=-1, max_concurrent_trials=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=mode,
            storage_path=str(Path(folder, "tune")),
            verbose=0,
            callbacks=[
                ProgressCallback(searcher),
                LedgerCallback(tracker, described, ledger=ledger, keeper=searcher),
                Kill(Path(folder)),
            ],
        ),
    ).fit()
    database.close()
    tracker.finish_sweep(described)
    print(
        json.dumps(
            {
                "done": searcher.done,
                "lines": lines,
                "records": [vars(r) | {"objective": r.objective} for r in searcher.records()],
            },
            default=str,
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
