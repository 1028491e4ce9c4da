"""Plans and results of benchmarks that nobody ran: numbers that tests choose, where runs would put theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssn.config import ModelConfig
from ssn.data.reader import CategoryInfo, SplitCount
from ssn.data.records import SCHEMA_VERSION
from tuning.benchmarking.plan import Plan, PlannedRun, make_plan, make_variants, read_configurations
from tuning.benchmarking.results import RunResult
from tuning.benchmarking.table import METRICS
from tuning.execution.train_worker import Placement

ONE_CORE = Placement(num_workers=0, use_gpu=False, cpus=1.0, gpus=0.0)
REPORTED: dict[str, Any] = {
    "epoch": 5,
    "train_loss": 0.4,
    "val_image_auroc": 0.7,
    "val_loss": math.nan,
    "duration_s": 8.0,
    "time_total_s": 12.0,
    "hardware": "an abacus",
    "hostname": "here",
    "feature_source": "cached",
    "test": {
        "metrics": {"image_auroc": 0.9, "image_ap": 0.8},
        "intervals_95": {"image_auroc": [0.8, 1.0]},
        "undefined": dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"), "no masks"),
        "num_images": 10,
        "num_defective": 4,
        "num_masks": 0,
    },
}
"""A run's last report, of five epochs."""
DIGESTS = {"timm": "a" * 64, "random": "b" * 64}


def make_info(
    category: str = "bolt",
    *,
    masks: int = 8,
    defective: int | None = None,
    protocol: str = "validation",
    test_fingerprint: str = "0" * 64,
    defaults: Mapping[str, object] | None = None,
) -> CategoryInfo:
    """A category whose pool has ``masks`` masks among ``defective`` images, by default as many."""
    pool = SplitCount(0, masks if defective is None else defective, masks)
    official = protocol == "official"
    return CategoryInfo(
        dataset="made_up",
        category=category,
        schema_version=SCHEMA_VERSION,
        split_seed=0,
        counts={
            "train": SplitCount(20, 0, 0),
            "pool": pool,
            "validation": SplitCount(0, 0, 0) if official else SplitCount(6, 4, 3),
            "test": SplitCount(10, 9, 9),
        },
        search_fingerprint=f"{category:f<64}",
        test_fingerprint=test_fingerprint,
        defaults=dict(defaults or {"train.epochs": 5}),
        protocol=protocol,  # type: ignore[arg-type]
    )


def plan_of(
    infos: Sequence[CategoryInfo],
    *,
    configurations: Sequence[str] = ("default",),
    overs: Sequence[str] = (),
    sets: Sequence[str] = (),
    seeds: int = 2,
) -> Plan:
    """A plan without champions."""
    return make_plan(
        {info.category: info for info in infos},
        make_variants(read_configurations(configurations), overs),
        seeds,
        sets,
        champions={},
        weights_digest=digest_of,
    )


def digest_of(model: ModelConfig) -> str:
    """A digest of weights that are not loaded."""
    return DIGESTS[model.weights]


def result_of(run: PlannedRun, test: Mapping[str, float], **changes: object) -> RunResult:
    """A run's result; a metric that ``test`` lacks is undefined for want of masks."""
    values: dict[str, object] = {
        "key": run.key,
        "identity": run.identity,
        "dataset": "made_up",
        "category": run.category,
        "seed": run.seed,
        "config": dict(run.config),
        "train_labels": run.train_labels,
        "train_masks": run.train_masks,
        "test": dict(test),
        "test_undefined": {metric: "no masks" for metric in METRICS if metric not in test},
        "test_intervals": {"image_auroc": (0.5, 0.9)},
        "test_images": 19,
        "test_defective": 9,
        "test_masks": 9,
        "validation": {"image_auroc": 0.75},
        "train_loss": 0.5,
        "duration_s": 8.0,
        "elapsed_s": 10.0,
        "cores": 2.0,
        "gpus": 0.0,
        "hardware": "an abacus, 2 cores",
        "hostname": "here",
        "feature_source": "cached",
        "code": "commit 1234567",
        "finished": "2026-01-01T00:00:00+00:00",
    }
    return RunResult(**{**values, **changes})  # type: ignore[arg-type]


def results_of(plan: Plan, test: Callable[[PlannedRun], Mapping[str, float] | None]) -> dict[str, RunResult]:
    """Results of a plan's runs; those for which ``test`` gives None are not finished."""
    found = {run.key: test(run) for run in plan.runs}
    return {run.key: result_of(run, values) for run in plan.runs if (values := found[run.key]) is not None}


class FakeTrial:
    """What the callback looks at of a Tune trial."""

    checkpoint = None
    pickled_error_file = error_file = None

    def __init__(self, suggestion: dict[str, Any], result: dict[str, Any], folder: Path) -> None:
        self.trial_id = suggestion["trial_key"]
        self.config = suggestion
        self.last_result = {**result, "checkpoint_path": str(folder)}

    def get_pickled_error(self) -> None:
        return None

    def get_error(self) -> str:
        return "Traceback\nValueError: no such sigma"
