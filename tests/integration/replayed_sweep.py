"""A sweep over three categories whose trials replay a learning curve; run by ``test_replayed_sweep.py``.

Usage: ``python replayed_sweep.py <folder> run|restore``; ``run`` interrupts itself.
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
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
)

import optuna
import ray
from ray import tune

from ssn.config import Config, flatten
from tuning.progress import ProgressCallback
from tuning.rungs import Rungs, rung_epochs
from tuning.scheduler import MultiplexScheduler
from tuning.search import CategorySearch, MultiplexSearcher, searcher_of
from tuning.space import Choice, FloatRange
from tuning.weights import weights_key

EPOCHS, GRACE, ETA, TRIALS = 9, 1, 3, 6
WEIGHTS = {weights_key(Config().model): "weights"}
CATEGORIES = ("screw", "tile", "wood")
FAILS_ONCE = ("tile", 0)
"""Category and index of the trial that raises at its third epoch in the first run, and not after a restore."""
INTERRUPTED_AT = ("wood", 0, 5)
"""Category, index and epoch whose report sends the first run a SIGINT; the first at its rungs, it gets there."""


def replay(config: dict[str, Any]) -> None:
    """Report a curve that peaks at a sigma of 0.02; resumes from its checkpoint."""
    import math

    epoch = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            epoch = json.loads(Path(folder, "state.json").read_text())["epoch"]
    settings = config["config"]
    peak = 1 - (math.log10(settings["synthesis.noise_sigma"] / 0.02)) ** 2 / 4
    marked = Path(config["folder"], f"started-{config['category']}-{config['index']}")
    with marked.open("a") as file:
        file.write(f"{epoch}\n")
    while epoch < EPOCHS:
        epoch += 1
        if (config["category"], config["index"]) == FAILS_ONCE and epoch == 3 and config["mode"] == "run":
            raise RuntimeError("replayed failure")
        if (config["category"], config["index"], epoch) == INTERRUPTED_AT:
            while not Path(config["folder"], "failed").exists():
                time.sleep(0.05)  # so that the failure comes before the interrupt
        result: dict[str, Any] = {"epoch": epoch, "category": config["category"], "duration_s": epoch / 10}
        if epoch in rung_epochs(EPOCHS, GRACE, ETA) or epoch == EPOCHS:
            result["objective"] = peak * (1 - math.exp(-epoch / 3))
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "state.json").write_text(json.dumps({"epoch": epoch}))
            tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))


class Interrupt(tune.Callback):
    """Sends this process a SIGINT, once: a restored trial may report that epoch again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_trial_error(self, *args: Any, **info: Any) -> None:
        """Let the trial that waits for this go on to its interrupt."""
        (self.folder / "failed").touch()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Look at the report."""
        here = (trial.config["category"], trial.config["index"], result["epoch"])
        if here == INTERRUPTED_AT and not (self.folder / "interrupted").exists():
            (self.folder / "interrupted").touch()
            os.kill(os.getpid(), signal.SIGINT)


def main(folder: str, mode: str) -> None:
    """Run or restore, and print what the searcher and the studies know, as one line of JSON."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=10**8,
        log_to_driver=False,
        logging_level="ERROR",
    )
    trainable = tune.with_resources(lambda config: replay(config | {"folder": folder, "mode": mode}), {"cpu": 1})
    path = str(Path(folder, "tune", "sweep"))
    if mode == "restore":
        tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, resume_errored=True)
    else:
        base = flatten(Config().resolved()) | {"train.epochs": EPOCHS}
        space = {
            "synthesis.noise_sigma": FloatRange(1e-3, 0.3, log=True),
            "train.supervision_ratio": Choice((0.0, 0.5, 1.0)),
        }
        searcher = MultiplexSearcher(
            [CategorySearch(c, base, space, f"data of {c}", WEIGHTS, 0) for c in CATEGORIES],
            sweep_id="replayed",
            trials_per_category=TRIALS,
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=MultiplexScheduler(Rungs(GRACE, ETA), history=searcher),
                num_samples=-1,
                max_concurrent_trials=2,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(Path(folder, "tune")),
                verbose=0,
                callbacks=[ProgressCallback(searcher), Interrupt(Path(folder))],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            ),
        )
    tuner.fit()
    searcher = searcher_of(tuner)
    print(
        json.dumps(
            {
                "done": searcher.done,
                "records": [vars(r) | {"objective": r.objective} for r in searcher.records()],
                "studies": {
                    c: [
                        {"state": t.state.name, "steps": sorted(t.intermediate_values), **t.user_attrs}
                        for t in searcher.study(c).trials
                    ]
                    for c in searcher.categories
                },
            },
            default=str,
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
