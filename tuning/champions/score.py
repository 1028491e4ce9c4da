"""Scoring a winner on the test split. Without Ray's libraries, which a new process would take seconds to import."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ssn.bundle import find_backbone
from ssn.evaluation import evaluate_samples
from ssn.predictor import Predictor
from ssn.visualize import case_figure
from tuning.champions.category_result import ChampionScore
from tuning.execution.objective import use_threads

if TYPE_CHECKING:
    from ssn.checkpoint import Checkpoint
    from ssn.data.reader import TestData


def score_champion(model: Checkpoint, test: TestData, device: str, cpus: float, *, draw: bool) -> ChampionScore:
    """Score a winner on the test split; runs where a trial would.

    Args:
        model: What its run has kept.
        test: The test split.
        device: Where to score.
        cpus: Of this process.
        draw: Whether to draw its best, median and worst cases.
    """
    use_threads(cpus)
    predictor = Predictor.from_checkpoint(model, find_backbone(model), device=device)
    evaluation = evaluate_samples(predictor, test.stream(), keep_images=draw)
    picture = None
    if draw:
        with tempfile.TemporaryDirectory(prefix="cases-") as scratch:
            path = Path(scratch, "cases.png")
            case_figure(evaluation.cases(), path, title=f"{test.info.dataset}: {test.info.category}, test split")
            picture = path.read_bytes()
    return ChampionScore(
        metrics=evaluation.metrics.values,
        undefined=evaluation.metrics.undefined,
        num_images=len(evaluation.ids),
        num_defective=int(evaluation.labels.sum()),
        picture=picture,
    )
