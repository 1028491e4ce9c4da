"""What a sweep found: per category the winner, its test score and its champion, as rows, JSON and tracker entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tuning.report import Leaderboard, LeaderboardRow

if TYPE_CHECKING:
    from ssn.data.reader import SearchData
    from tuning.champions import ChampionVersion
    from tuning.winner import TrialRecord


@dataclass(frozen=True)
class ChampionScore:
    """What the test split says of a category's winner."""

    metrics: Mapping[str, float]
    undefined: Mapping[str, str]
    num_images: int
    num_defective: int
    picture: bytes
    """PNG of its best, median and worst cases."""


@dataclass(frozen=True)
class CategoryResult:
    """What a sweep found for one category."""

    category: str
    winner: TrialRecord | None
    default: TrialRecord | None
    """Trial 0, the paper's settings."""
    trials: Sequence[TrialRecord]
    score: ChampionScore | None
    champion: ChampionVersion | None
    run_id: str | None
    failure: str | None = None
    """Why there is no champion."""


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    leaderboard: Leaderboard
    categories: Sequence[CategoryResult]
    duration_s: float

    def to_dict(self) -> dict[str, Any]:
        """Per category the champion's parameters, validation and test metrics, trial counts and durations."""
        return {
            **{k: v for k, v in self.leaderboard.as_dict().items() if k != "rows"},
            "duration_s": self.duration_s,
            "categories": {result.category: _category_dict(result) for result in self.categories},
        }


def leaderboard_row(data: SearchData, result: CategoryResult) -> LeaderboardRow:
    """A category's line in the leaderboard."""
    winner, counts = result.winner, data.info.counts
    states = [t.state for t in result.trials]
    test = result.score.metrics if result.score else {}
    masks_used, weak_labels_used = (
        int(winner.metrics.get(name, 0)) if winner else 0 for name in ("masks_used", "weak_labels_used")
    )
    return LeaderboardRow(
        category=result.category,
        noise_sigma=winner.config["synthesis.noise_sigma"] if winner else None,
        perlin_threshold=winner.config["synthesis.perlin_threshold"] if winner else None,
        supervision_ratio=winner.config["train.supervision_ratio"] if winner else None,
        validation_objective=winner.objective if winner else None,
        default_objective=result.default.objective if result.default else None,
        test_image_auroc=test.get("image_auroc"),
        test_pixel_ap=test.get("pixel_ap"),
        train_labels=masks_used + weak_labels_used if winner else None,
        train_masks=masks_used if winner else None,
        validation_labels=counts["validation"].defective,
        validation_masks=counts["validation"].masks,
        trials_complete=states.count("complete"),
        trials_pruned=states.count("pruned"),
        trials_failed=states.count("failed"),
        trials_infeasible=sum(not t.feasible for t in result.trials),
        duration_s=sum(t.duration_s for t in result.trials),
        champion=f"{result.champion.name}/{result.champion.version}" if result.champion else None,
    )


def _category_dict(result: CategoryResult) -> dict[str, Any]:
    winner, states = result.winner, [t.state for t in result.trials]

    def validation(trial: TrialRecord | None) -> dict[str, Any] | None:
        if trial is None:
            return None
        metrics = {k.removeprefix("val_"): v for k, v in trial.metrics.items() if k.startswith("val_")}
        return {"objective": trial.objective, "epoch": trial.epoch, "state": trial.state, **metrics}

    return {
        "champion": None if result.champion is None else asdict(result.champion),
        "run_id": result.run_id,
        "params": None if winner is None else winner.params,
        "masks_used": None if winner is None else winner.metrics.get("masks_used"),
        "weak_labels_used": None if winner is None else winner.metrics.get("weak_labels_used"),
        "validation": validation(winner),
        "default": validation(result.default),
        "test": None if result.score is None else dict(result.score.metrics),
        "test_undefined": None if result.score is None else dict(result.score.undefined),
        "trials": {state: states.count(state) for state in ("complete", "pruned", "failed")},
        "trials_duration_s": sum(t.duration_s for t in result.trials),
        "history": [_trial_dict(trial) for trial in result.trials],
        "failure": result.failure,
    }


def _trial_dict(trial: TrialRecord) -> dict[str, Any]:
    """``elapsed_s`` is the trial's wall time as Tune saw it; what ``duration_s`` leaves of it is the platform's."""
    return {
        "index": trial.index,
        "suggested_by": trial.suggested_by,
        "state": trial.state,
        "epoch": trial.epoch,
        "objective": trial.objective,
        "masks_used": trial.metrics.get("masks_used"),
        "weak_labels_used": trial.metrics.get("weak_labels_used"),
        "latency_ms": trial.metrics.get("latency_ms"),
        "feasible": trial.feasible,
        "params": trial.params,
        "duration_s": trial.duration_s,
        "elapsed_s": trial.metrics.get("time_total_s"),
        "failure": trial.failure,
    }


def parent_summary(data: SearchData, result: CategoryResult) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags of a category's parent run, from which ``tuning report`` builds the table again."""
    if result.winner is None or result.winner.objective is None or result.score is None or result.run_id is None:
        return {}, {"failure": result.failure or ""}
    row = leaderboard_row(data, result)
    metrics = {"validation_objective": result.winner.objective}
    metrics |= {f"test_{name}": value for name, value in result.score.metrics.items()}
    tags = {
        "champion_run_id": result.run_id,
        "train_labels": str(row.train_labels),
        "train_masks": str(row.train_masks),
        "validation_labels": str(row.validation_labels),
        "validation_masks": str(row.validation_masks),
    }
    return metrics, tags
