"""Scoring a finished network on the test split, by the process that trained it, on its device.

In a module of its own because workers import it; they need nothing of how a benchmark is planned and kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssn.data.reader import TestData


@dataclass(frozen=True)
class ScoreOnTest:
    """Scores finished networks; what :class:`tuning.execution.train_worker.WorkerSetup` calls ``finish``."""

    tests: Mapping[str, TestData]
    """By category."""

    def __call__(self, trial: Mapping[str, Any], model_dir: Path, device: str) -> dict[str, Any]:
        """``test``, as :meth:`ssn.evaluation.Evaluation.to_dict` has it, and ``hardware``."""
        from ssn.bundle import find_backbone
        from ssn.checkpoint import load_checkpoint
        from ssn.evaluation import evaluate_samples
        from ssn.predictor import Predictor
        from tuning.tracking.environment import hardware_tags

        model = load_checkpoint(model_dir)
        predictor = Predictor.from_checkpoint(model, find_backbone(model), device=device)
        evaluation = evaluate_samples(predictor, self.tests[trial["category"]].stream())
        return {"test": evaluation.to_dict(), "hardware": describe_hardware(hardware_tags(), device)}


def describe_hardware(tags: Mapping[str, str], device: str) -> str:
    """What a run was computed on, such as ``AMD EPYC 9R14, 2 cores``.

    Args:
        tags: From :func:`tuning.tracking.environment.hardware_tags`.
        device: Where the network was trained.
    """
    if device.startswith("cuda"):
        return tags["hardware_gpus"]
    return f"{tags['hardware_cpu']}, {tags['hardware_cores']} cores"
