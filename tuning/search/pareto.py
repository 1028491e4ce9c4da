"""The front of a category's trials in objective against cost: the trials that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuning.champions.winner import TrialRecord
from tuning.search.costs import trial_cost

if TYPE_CHECKING:
    from tuning.settings import Against, ObjectiveSettings


@dataclass(frozen=True)
class Point:
    """A trial that used its whole budget."""

    objective: float
    """On validation; higher is better."""
    cost: float
    """Lower is better."""
    index: int
    """Of the trial in its category; 0 is the default."""
    feasible: bool = True
    """Whether it keeps all bounds; if not, it is on no front."""


def make_points(trials: Sequence[TrialRecord], against: Against) -> list[Point]:
    """The points of a category's complete trials, in the trials' order."""
    return [
        Point(t.objective, trial_cost(t.metrics, against), t.index, t.feasible)
        for t in trials
        if t.state == "complete" and t.objective is not None
    ]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Feasible points that no feasible point dominates, by rising cost, and so by rising objective.

    A point dominates another if it is no worse in either and better in one; of equal points, all are on the front.
    """
    front: list[Point] = []
    for point in sorted((p for p in points if p.feasible), key=lambda p: (p.cost, -p.objective, p.index)):
        if not front or point.objective > front[-1].objective or _equal(point, front[-1]):
            front.append(point)
    return front


def _equal(a: Point, b: Point) -> bool:
    return (a.objective, a.cost) == (b.objective, b.cost)


def knee(front: Sequence[Point]) -> Point:
    """The point of a front beyond which more cost buys least.

    Objective and cost are scaled to the front's ends; the knee lies farthest above the line between them. A front
    without such a bulge, of one or two points or below its line, has none; its point of highest objective stands in.

    Args:
        front: As :func:`pareto_front` returns it; not empty.
    """
    first, last = front[0], front[-1]
    if last.cost == first.cost:
        return last

    def bulge(point: Point) -> float:
        gained = (point.objective - first.objective) / (last.objective - first.objective)
        return gained - (point.cost - first.cost) / (last.cost - first.cost)

    found = max(front, key=bulge)  # of equals the first, which is the cheapest
    return found if bulge(found) > 0 else last


def hypervolume(points: Sequence[Point], *, worst_objective: float, worst_cost: float) -> float:
    """The area that a front dominates, down to a reference point; larger is better.

    Args:
        points: Any; what is not on their front or beyond the reference adds nothing.
        worst_objective: Of the reference.
        worst_cost: Of the reference.
    """
    area, reached = 0.0, worst_objective
    for point in pareto_front(points):
        if point.cost < worst_cost and point.objective > reached:
            area += (point.objective - reached) * (worst_cost - point.cost)
            reached = point.objective
    return area


def contenders(trials: Sequence[TrialRecord], objective: ObjectiveSettings) -> Sequence[TrialRecord]:
    """The trials of a category among which its champion is chosen, by objective, as without a front.

    Where the objective is weighed against a cost, those on the front, or, for ``objective.pick=knee``, at its knee; so
    the cheapest wins of those with the highest objective.

    Args:
        trials: Of the category.
        objective: What is weighed against what, and how a front's champion is picked.

    Returns:
        All trials where no front is asked for, or where there is none, so that it can be said why there is no champion.
    """
    if objective.against == "none":
        return trials
    front = pareto_front(make_points(trials, objective.against))
    if objective.pick == "knee" and front:
        chosen = knee(front)
        front = [p for p in front if _equal(p, chosen)]
    indices = {p.index for p in front}
    return [t for t in trials if t.index in indices] or trials
