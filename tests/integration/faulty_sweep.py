"""``python -m tests.integration.faulty_sweep FAULTS sweep ...``: a sweep some of whose trials go wrong.

``FAULTS`` is JSON, ``{"<category>/<index>": "nan" | "memory" | "killed" | "killed when done"}``, of trials of the
search; the rest is for ``python -m tuning``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import tuning.execution.tune_run
from tuning.execution import train_worker
from tuning.execution.train_worker import WorkerSetup
from tuning.persistence.ledger_callback import LedgerCallback

MEMORY_BYTES = 100 * 2**20
"""What a trial may take beyond what it has when its fault begins; it then asks for four times as much."""


def train_faultily(trial: dict[str, Any], setup: WorkerSetup, faults: dict[str, str]) -> None:
    """Train as ever, but for the trials that ``faults`` names."""
    fault = faults.get(f"{trial['category']}/{trial['index']}") if "stage" not in trial else None
    run_trial = train_worker.run_trial
    if fault == "nan":
        trial = {**trial, "config": {**trial["config"], "train.lr_heads": 1e30}}
    elif fault in ("memory", "killed"):

        def run_out(*arguments: Any, report: Any, **named: Any) -> None:
            def report_and_run_out(result: dict[str, Any], save: Any) -> None:
                report(result, save)
                if result["epoch"] >= 3:
                    run_out_of_memory(killed=fault == "killed")

            run_trial(*arguments, report=report_and_run_out, **named)

        train_worker.run_trial = run_out
    try:
        train_worker.train_in_trial(trial, setup)
    finally:
        train_worker.run_trial = run_trial


def kill_when_done(faults: dict[str, str]) -> None:
    """Have the driver kill the process of a trial that has ended, before it gets another."""
    complete = LedgerCallback.on_trial_complete

    def complete_and_kill(self: LedgerCallback, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        complete(self, iteration, trials, trial, **info)
        name = f"{trial.config['category']}/{trial.config['index']}"
        if "stage" not in trial.config and faults.get(name) == "killed when done":
            os.kill(trial.last_result["pid"], signal.SIGKILL)

    LedgerCallback.on_trial_complete = complete_and_kill  # type: ignore[method-assign]


def run_out_of_memory(*, killed: bool) -> None:
    """As where a container has a limit: the kernel kills the process; or as where a user has: it is given no more."""
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, most))
    bytearray(4 * MEMORY_BYTES)


def main() -> None:
    """Replace the trainable, and hand over to the command line."""
    faults = json.loads(sys.argv.pop(1))

    def train(trial: dict[str, Any], setup: WorkerSetup) -> None:
        train_faultily(trial, setup, faults)

    tuning.execution.tune_run.train_in_trial = train
    kill_when_done(faults)
    from tuning.cli import main as run

    run()


if __name__ == "__main__":
    main()
