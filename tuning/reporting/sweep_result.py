"""What a sweep found: per category the winner, its test score and its champion, as rows, JSON and tracker entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tuning.champions.category_result import CategoryResult, mean_scores
from tuning.reporting.report import Leaderboard, LeaderboardRow

if TYPE_CHECKING:
    from ssn.data.reader import SearchData
    from tuning.champions.winner import TrialRecord
    from tuning.reporting.shared_report import SharedComparison
    from tuning.settings import SweepSettings


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    leaderboard: Leaderboard
    categories: Sequence[CategoryResult]
    duration_s: float
    comparison: SharedComparison | None = None
    """Of a shared search with what tuning by category found."""

    def to_dict(self) -> dict[str, Any]:
        """Per category the champion's parameters, validation and test metrics, trial counts and durations."""
        return {
            **{k: v for k, v in self.leaderboard.as_dict().items() if k != "rows"},
            "duration_s": self.duration_s,
            **({} if self.comparison is None else {"comparison": self.comparison.as_dict()}),
            "categories": {result.category: _category_dict(result) for result in self.categories},
        }


def leaderboard_row(data: SearchData, result: CategoryResult) -> LeaderboardRow:
    """A category's line in the leaderboard."""
    winner, counts = result.winner, data.info.counts
    chosen = result.selection.winner if result.selection else None
    states = [t.state for t in result.trials]
    test = mean_scores(result.scores)
    image_auroc, image_auroc_std = test.get("image_auroc", (None, None))
    pixel_ap, pixel_ap_std = test.get("pixel_ap", (None, None))
    masks_used, weak_labels_used = (
        int(winner.metrics.get(name, 0)) if winner else 0 for name in ("masks_used", "weak_labels_used")
    )
    return LeaderboardRow(
        category=result.category,
        noise_sigma=winner.config["synthesis.noise_sigma"] if winner else None,
        perlin_threshold=winner.config["synthesis.perlin_threshold"] if winner else None,
        supervision_ratio=winner.config["train.supervision_ratio"] if winner else None,
        validation_objective=chosen.mean if chosen else None,
        validation_objective_std=chosen.std if chosen else None,
        default_objective=result.default.objective if result.default else None,
        test_image_auroc=image_auroc,
        test_image_auroc_std=image_auroc_std,
        test_pixel_ap=pixel_ap,
        test_pixel_ap_std=pixel_ap_std,
        seeds=len(chosen.runs) if chosen else None,
        train_labels=masks_used + weak_labels_used if winner else None,
        train_masks=masks_used if winner else None,
        validation_labels=counts["validation"].defective,
        validation_masks=counts["validation"].masks,
        trials_complete=states.count("complete"),
        trials_pruned=states.count("pruned"),
        trials_failed=states.count("failed"),
        trials_infeasible=sum(not t.feasible for t in result.trials),
        duration_s=sum(t.duration_s for t in (*result.trials, *result.finalists)),
        champion=f"{result.champion.name}/{result.champion.version}" if result.champion else None,
    )


def describe_decision(result: CategoryResult, settings: SweepSettings) -> dict[str, Any]:
    """How a category's champion was chosen, with all numbers; plain data."""
    return {
        "category": result.category,
        "objective": {"metric": settings.objective.metric, "cost_per_mask": settings.objective.cost_per_mask},
        "selection": None if result.selection is None else result.selection.as_dict(),
        "registered_champion": None if result.verdict is None else result.verdict.as_dict(),
        "champion": None if result.champion is None else asdict(result.champion),
        "test": {name: {"mean": mean, "std": std} for name, (mean, std) in mean_scores(result.scores).items()},
        "failure": result.failure,
    }


def _category_dict(result: CategoryResult) -> dict[str, Any]:
    winner, states = result.winner, [t.state for t in result.trials]
    chosen = result.selection.winner if result.selection else None
    test = mean_scores(result.scores)

    def validation(of: Mapping[str, Any]) -> dict[str, Any]:
        return {k.removeprefix("val_"): v for k, v in of.items() if k.startswith("val_")}

    def of_trial(trial: TrialRecord | None) -> dict[str, Any] | None:
        if trial is None:
            return None
        return {
            "objective": trial.objective,
            "epoch": trial.epoch,
            "state": trial.state,
            **validation(trial.metrics),
        }

    return {
        "champion": None if result.champion is None else asdict(result.champion),
        "run_id": result.run_id,
        "params": None if winner is None else winner.params,
        "masks_used": None if winner is None else winner.metrics.get("masks_used"),
        "weak_labels_used": None if winner is None else winner.metrics.get("weak_labels_used"),
        "seeds": None if chosen is None else len(chosen.runs),
        "validation": None
        if chosen is None
        else {"objective": chosen.mean, "objective_std": chosen.std, **validation(chosen.mean_metrics())},
        "default": of_trial(result.default),
        "finalists": None if result.selection is None else result.selection.as_dict()["finalists"],
        "registered_champion": None if result.verdict is None else result.verdict.as_dict(),
        "test": {name: mean for name, (mean, _) in test.items()} if test else None,
        "test_std": {name: std for name, (_, std) in test.items()} if test else None,
        "test_undefined": None if result.score is None else dict(result.score.undefined),
        "trials": {state: states.count(state) for state in ("complete", "pruned", "failed")},
        "trials_duration_s": sum(t.duration_s for t in (*result.trials, *result.finalists)),
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
    if result.selection is None or result.champion is None or result.run_id is None:
        return {}, {"failure": result.failure or ""}
    row, winner = leaderboard_row(data, result), result.selection.winner
    metrics = {"validation_objective": winner.mean}
    spreads = {"validation_objective": winner.std}
    for name, (mean, std) in mean_scores(result.scores).items():
        metrics[f"test_{name}"], spreads[f"test_{name}"] = mean, std
    metrics |= {f"{name}_std": std for name, std in spreads.items() if std is not None}
    tags = {
        "best_run_id": result.run_id,
        "champion_run_id": result.champion.run_id,
        "champion": f"{result.champion.name}/{result.champion.version}",
        "seeds": str(len(winner.runs)),
        "train_labels": str(row.train_labels),
        "train_masks": str(row.train_masks),
        "validation_labels": str(row.validation_labels),
        "validation_masks": str(row.validation_masks),
    }
    if result.notices():
        tags["decision"] = "; ".join(result.notices())
    return metrics, tags
