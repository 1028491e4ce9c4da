"""What a trial's model costs beside its training, labels and latency, and the bounds that a user may set on them.

A trial reports its costs with every epoch, from the first on. For each bound it reports by what share it exceeds it, as
``excess_<bound>``; a trial with a positive excess is *infeasible*: it is stopped early, is not a rival to others, and
never wins.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ssn.config import digest
from ssn.errors import SSNError
from tuning.search.space import RATIO_KEY, CategorySpace, Choice

if TYPE_CHECKING:
    from tuning.settings import Against, ObjectiveSettings

EXCESS = "excess_"
"""Prefix of the metrics that say by what share of a bound it is exceeded; 0 and less: it is kept."""

COST_NAMES = {"labels": "labels_used", "latency": "latency_ms"}
"""What a Pareto front's cost is called, by ``objective.against``."""


def trial_cost(metrics: Mapping[str, Any], against: Against) -> float:
    """The second thing that a search minimises, from what a trial reported; 0 where there is none.

    ``labels``: defective images trained on, with or without their masks. ``latency``: milliseconds per image.
    """
    if against == "labels":
        return float(metrics["masks_used"] + metrics["weak_labels_used"])
    return float(metrics["latency_ms"]) if against == "latency" else 0.0


def shape_key(config: Mapping[str, Any]) -> str:
    """Equal for flat configurations whose networks do the same arithmetic on an image."""
    return digest({key: value for key, value in config.items() if _changes_shape(key)})


def _changes_shape(key: str) -> bool:
    return (key.startswith("model.") and key != "model.weights") or key == "data.image_size"


def needs_latency(objective: ObjectiveSettings) -> bool:
    """Whether trials have to measure their network."""
    return objective.against == "latency" or objective.max_latency_ms is not None


def check_against(objective: ObjectiveSettings, searched: Collection[str]) -> None:
    """Refuse to weigh the objective against a latency that is the same for all trials.

    Args:
        objective: What is weighed against what.
        searched: Config keys that trials differ in.

    Raises:
        SSNError: none of them changes the network's shape.
    """
    if objective.against == "latency" and not any(_changes_shape(key) for key in searched):
        raise SSNError(
            "objective.against is latency, but no searched setting changes the network's; search one of model.* or "
            "data.image_size, or leave it out"
        )


def describe_pick(objective: ObjectiveSettings) -> list[str]:
    """A line for the leaderboard that says which trial of a front became champion; none where there is no front."""
    if objective.against == "none":
        return []
    which = "the knee" if objective.pick == "knee" else "the highest objective"
    return [
        f"champions are {which} of each category's front of objective against {COST_NAMES[objective.against]} "
        f"(objective.pick={objective.pick}); see pareto.png in its run"
    ]


def measure_excess(objective: ObjectiveSettings, costs: Mapping[str, Any]) -> dict[str, float]:
    """``excess_<bound>`` of every bound that is set.

    Args:
        objective: Its bounds.
        costs: ``masks_used`` and, where latency is bounded, ``latency_ms``.
    """
    found = {}
    if objective.max_masks is not None:
        found[f"{EXCESS}max_masks"] = (costs["masks_used"] - objective.max_masks) / max(objective.max_masks, 1)
    if objective.max_latency_ms is not None:
        found[f"{EXCESS}max_latency_ms"] = costs["latency_ms"] / objective.max_latency_ms - 1
    return found


def excesses(metrics: Mapping[str, Any]) -> dict[str, float]:
    """By bound, the share by which what a trial reported exceeds it."""
    return {key.removeprefix(EXCESS): float(value) for key, value in metrics.items() if key.startswith(EXCESS)}


def is_feasible(metrics: Mapping[str, Any]) -> bool:
    """Whether what a trial reported keeps all bounds."""
    return all(excess <= 0 for excess in excesses(metrics).values())


def limit_masks(space: CategorySpace, category: str, num_masks: int, max_masks: int | None) -> CategorySpace:
    """Leave out supervision ratios that are known to use more masks than allowed, so that no trial is spent on them.

    The base's ratio stays: it is the first trial, whether it can win or not.

    Args:
        space: Of the category.
        category: Named in the notice.
        num_masks: In the category's pool.
        max_masks: ``objective.max_masks``.
    """
    if max_masks is None:
        return space
    notices, axes, base = list(space.notices), dict(space.axes), space.base[RATIO_KEY]
    if _masks(base, num_masks) > max_masks:
        notices.append(
            f"{category}: the default uses {_masks(base, num_masks)} masks, more than "
            f"objective.max_masks={max_masks}, and so cannot win"
        )
    axis = axes.get(RATIO_KEY)
    if isinstance(axis, Choice):
        kept = tuple(v for v in axis.values if _masks(v, num_masks) <= max_masks or v == base)
        axes[RATIO_KEY] = replace(axis, values=kept)
    return CategorySpace(space.base, axes, tuple(notices))


def _masks(ratio: float, num_masks: int) -> int:
    return math.floor(ratio * num_masks + 0.5)  # as ssn.data.sampling.supervised_subset rounds
