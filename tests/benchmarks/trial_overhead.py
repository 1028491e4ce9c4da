"""Where a trial's time goes besides training: trivial trials in Tune's own process and in a Ray Train worker group.

    python -m tests.benchmarks.trial_overhead --trials 4 --out trial_overhead.md

Trials run one at a time, of one epoch on a dozen tiny images. The first of each kind pays for what later ones share:
the trial's process, which Tune keeps, and the features. Starting Ray is not part of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ssn.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from tests.benchmarks.measure import Neighbours, describe_machine
from tests.trials_on_ray import Watched, run_trials
from tuning.execution.train_worker import Placement

STAGES = ("process", "imports", "features", "training", "report and checkpoint", "end")
MEANING = {
    "process": "placement and start of the process that trains; none where it is kept",
    "imports": "its imports and, in a group, the process group, until the trial's settings are unpickled there",
    "features": "features from the store, network",
    "training": "one epoch and its validation",
    "report and checkpoint": "until Tune's driver has the result",
    "end": "until Tune says that the trial is complete",
}


class Stamp:
    """Reports when the training process was made, when it had unpickled the trial, and when it had trained."""

    def __init__(self) -> None:
        self.unpickled_s = 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.unpickled_s = time.time()

    def __call__(self, trial: Mapping[str, Any], model: Path, device: str) -> dict[str, Any]:
        """What the trial's last result is to hold besides; see ``tuning.execution.train_worker.Finish``."""
        return {
            "process_s": psutil.Process().create_time(),
            "unpickled_s": self.unpickled_s,
            "trained_s": time.time(),
        }


def split(trial: Watched) -> dict[str, float]:
    """Seconds of each stage of a finished trial."""
    result = next(r for r in trial.results if "trained_s" in r)
    at = [
        trial.started_s,
        max(trial.started_s, result["process_s"]),
        result["unpickled_s"],
        result["trained_s"] - result["duration_s"],
        result["trained_s"],
        result["received_s"],
        trial.ended_s,
    ]
    return {stage: after - before for stage, before, after in zip(STAGES, at, at[1:], strict=False)}


def tabulate(splits: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """A Markdown table: a column for the first trial of each kind and one for the median of the others."""
    columns = [
        (f"{kind}, {which}", part)
        for kind, trials in splits.items()
        for which, part in (("first", trials[:1]), (f"median of {len(trials) - 1}", trials[1:]))
    ]
    lines = [f"| stage, seconds | {' | '.join(name for name, _ in columns)} |", f"|:---|{'---:|' * len(columns)}"]
    for stage in STAGES:
        cells = [f"{statistics.median(each[stage] for each in part):.2f}" for _, part in columns]
        lines.append(f"| {stage}: {MEANING[stage]} | {' | '.join(cells)} |")
    whole = [f"{statistics.median(sum(each.values()) for each in part):.2f}" for _, part in columns]
    beside = [f"{statistics.median(sum(each.values()) - each['training'] for each in part):.2f}" for _, part in columns]
    return [*lines, f"| whole trial | {' | '.join(whole)} |", f"| without training | {' | '.join(beside)} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4, help="trials of each kind, at least 2")
    parser.add_argument("--num-workers", default="0,1", help="kinds: 0 trains in the trial's process, n in n workers")
    parser.add_argument("--out", type=Path, help="Markdown file; standard output has it too")
    arguments = parser.parse_args()
    import ray

    from ssn.data.ingest import ingest
    from ssn.data.manifest import Manifest
    from tests.raw_folders import write_mvtec

    config = Config(
        model=ModelConfig(backbone="resnet18", weights="random", layers=(1, 2), seg_channels=16, cls_channels=4),
        data=DataConfig(image_size=(32, 48)),
        train=TrainConfig(epochs=1, batch_size=8, supervision_ratio=1.0),
        eval=EvalConfig(size=(24, 32), batch_size=4),
    )
    kinds = [int(kind) for kind in arguments.num_workers.split(",")]
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    splits: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="trial-overhead-") as scratch:
        folder = Path(scratch)
        write_mvtec(folder / "raw", "widget")
        ingest(Manifest(name="tiny", layout="mvtec"), folder / "raw", str(folder / "shards"))
        cpus = max(2, os.cpu_count() or 2, max(kinds) + 1)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        neighbours, load = Neighbours(), os.getloadavg()
        for kind in kinds:
            trials = run_trials(
                [replace(config, train=replace(config.train, train_seed=seed)) for seed in range(arguments.trials)],
                data_uri=str(folder / "shards"),
                dataset="tiny",
                category="widget",
                placement=Placement(num_workers=kind, use_gpu=False, cpus=1.0, gpus=0.0),
                out=folder / "runs",
                name=f"workers{kind}",
                finish=Stamp(),
            )
            name = "in the trial" if kind == 0 else f"group of {kind}"
            splits[name] = [split(trial) for trial in trials]
        busy = neighbours.busy_cores()
        ray.shutdown()
    stamp = describe_machine(1)
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    text = "\n".join(
        [
            f"{stamp['cpu']}, {stamp['cores']} cores, {stamp['memory_gb']} GB, Python {stamp['python']}, ray "
            f"{ray.__version__}, {versions}, commit {stamp['commit']}; load average {load[0]:.1f} before and "
            f"{os.getloadavg()[0]:.1f} after, {busy} cores busy with other processes, Ray's own among them.",
            "",
            *tabulate(splits),
            "",
        ]
    )
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
