"""A category's Pareto front as a picture and as a table."""

from __future__ import annotations

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning.champions.winner import TrialRecord
from tuning.search.costs import COST_NAMES, trial_cost
from tuning.search.pareto import Point, make_points, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tuning.settings import ObjectiveSettings

_TITLES = {"labels": "What do labels buy?", "latency": "What does speed cost?"}
_COST_AXES = {
    "labels": "labelled defective images used in training",
    "latency": "latency of one image, in ms, on the trial's device (median of repeated runs)",
}
_PICKS = {"best": "the highest objective on the front", "knee": "the front's knee"}
_FRONT, _GREY, _BOUND = "#0b5fa5", "#9a9a9a", "#c8541a"
_WIDTH = 108
"""Characters of a line below the picture."""


def write_front(
    folder: Path,
    trials: Sequence[TrialRecord],
    champion: int | None,
    objective: ObjectiveSettings,
    *,
    heading: str,
    about: str,
) -> list[Path]:
    """Write ``pareto.png`` and ``pareto.csv``; nothing where no trial used its whole budget.

    Args:
        folder: Where.
        trials: Of the category.
        champion: Index of the trial that won; None: none did.
        objective: What was weighed against what.
        heading: What the front is of.
        about: By which images trials were judged.
    """
    if not make_points(trials, objective.against):
        return []
    picture, table = folder / "pareto.png", folder / "pareto.csv"
    picture.write_bytes(draw_front(trials, champion, objective, heading=heading, about=about))
    table.write_text(front_csv(trials, champion, objective), encoding="utf-8")
    return [picture, table]


def front_csv(trials: Sequence[TrialRecord], champion: int | None, objective: ObjectiveSettings) -> str:
    """A line per trial; ``objective`` is empty where the budget was not used up, ``cost`` where none was reported."""
    front = {p.index for p in pareto_front(make_points(trials, objective.against))}
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    text = io.StringIO()
    cost_name = COST_NAMES[objective.against]
    columns = ["index", "suggested_by", "state", "objective", cost_name, "on_front", "feasible", "champion", *keys]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        writer.writerow(
            {
                "index": trial.index,
                "suggested_by": trial.suggested_by,
                "state": trial.state,
                "objective": trial.objective if trial.state == "complete" else "",
                cost_name: trial_cost(trial.metrics, objective.against) if trial.epoch else "",
                "on_front": trial.index in front,
                "feasible": trial.feasible,
                "champion": trial.index == champion,
                **trial.params,
            }
        )
    return text.getvalue()


def draw_front(
    trials: Sequence[TrialRecord], champion: int | None, objective: ObjectiveSettings, *, heading: str, about: str
) -> bytes:
    """Draw a category's front; see :func:`write_front`.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = make_points(trials, objective.against)
    figure = Figure(figsize=(8.4, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    _draw_points(axis, points, champion)
    _draw_bound(axis, objective)
    _scale(axis, points, objective)
    handles, names = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        title=f"{heading}: {_TITLES[objective.against]}",
        title_fontproperties={"size": 16, "weight": "bold"},
        alignment="left",
        loc="outside upper left",
        frameon=False,
        fontsize=11,
        ncols=2,
        markerscale=0.75,
        labelspacing=0.7,
    )
    lines = (_count(trials), f"Champion: {_PICKS[objective.pick]} (objective.pick={objective.pick}). {about}")
    below = "\n".join(part for line in lines for part in textwrap.wrap(line, width=_WIDTH))
    figure.supxlabel(below, fontsize=9.5, color="#555555", x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_points(axis: Axes, points: Sequence[Point], champion: int | None) -> None:
    front = pareto_front(points)
    others = [p for p in points if p.feasible and p not in front]
    infeasible = [p for p in points if not p.feasible]

    def scatter(shown: Sequence[Point], label: str, **style: Any) -> None:
        if shown:
            axis.scatter([p.cost for p in shown], [p.objective for p in shown], label=label, **style)

    if front:
        right = max(p.cost for p in points if p.feasible)
        costs, objectives = [p.cost for p in front], [p.objective for p in front]
        if right > costs[-1]:
            costs, objectives = [*costs, right], [*objectives, objectives[-1]]
        axis.plot(costs, objectives, color=_FRONT, linewidth=2, alpha=0.5, drawstyle="steps-post", zorder=2)
    scatter(front, "on the front: none is better at its cost or below", s=70, color=_FRONT, zorder=4)
    scatter(others, "beaten by one of the front", s=45, color=_GREY, zorder=3)
    scatter(infeasible, "exceeds a bound, cannot win", s=45, facecolor="none", edgecolor=_GREY, zorder=3)
    default = [p for p in points if p.index == 0]
    style = {"facecolor": "none", "linewidth": 2, "zorder": 5}
    scatter(default, "paper's default", s=230, marker="s", edgecolor="#333333", **style)
    scatter([p for p in points if p.index == champion], "champion", s=330, edgecolor=_BOUND, **style)


def _draw_bound(axis: Axes, objective: ObjectiveSettings) -> None:
    """A latency bound is a line in the picture; one on masks is not, where weak labels count as labels too."""
    if objective.against == "latency" and objective.max_latency_ms is not None:
        label = f"objective.max_latency_ms={objective.max_latency_ms:g}"
        axis.axvline(objective.max_latency_ms, color=_BOUND, linestyle=(0, (4, 4)), linewidth=1.4, label=label)


def _scale(axis: Axes, points: Sequence[Point], objective: ObjectiveSettings) -> None:
    from matplotlib.ticker import MaxNLocator

    costs = [p.cost for p in points]
    span = max(costs) - min(costs) or max(max(costs), 1.0)
    axis.set_xlim(min(costs) - 0.06 * span, max(costs) + 0.06 * span)
    if objective.against == "labels":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axis.get_ylim()
    room = max(0.05 - (high - low), 0.1 * (high - low)) / 2  # a small difference is to look small
    axis.set_ylim(low - room, high + room)
    axis.set_xlabel(_COST_AXES[objective.against], fontsize=11.5)
    axis.set_ylabel(f"validation {objective.metric}", fontsize=11.5)
    axis.tick_params(labelsize=11)
    axis.grid(color="#e3e3e3", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _count(trials: Sequence[TrialRecord]) -> str:
    states: Counter[str] = Counter(trial.state for trial in trials)
    parts = [f"{states['complete']} of {len(trials)} trials used their whole budget and are shown"]
    parts += [
        f"{states[state]} {said}"
        for state, said in (("pruned", "stopped early"), ("failed", "failed"))
        if states[state]
    ]
    return "; ".join(parts) + "."
