"""A plan of a sweep for people: a table of the categories, and what is the same for all in lines below it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ssn.streaming import format_bytes
from tuning.execution.feature_sizes import FeatureGroup
from tuning.planning.plan import Hours, SweepPlan
from tuning.reporting.report import ABSENT, format_duration
from tuning.search.space import show

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = (
    "category",
    "trials,\nfinalists",
    "epochs,\nexpected",
    "epochs,\nat worst",
    "feature\ngroups",
    "features",
    "trial hours,\nexpected",
    "trial hours,\nat worst",
)


def plan_table(plan: SweepPlan) -> Table:
    """One row per category, and the sums."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"{plan.dataset}: plan of a sweep on {plan.cluster}"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "category" else "right", overflow="fold")
    for each in plan.categories:
        table.add_row(
            Text(each.category),
            f"{each.trials}, {each.finalist_runs}",
            f"{each.epochs_expected:.0f}",
            str(each.epochs_worst),
            str(len(each.groups)),
            format_bytes(each.feature_bytes),
            *_hours(each.hours),
        )
    if len(plan.categories) > 1:
        table.add_section()
        table.add_row(
            "all",
            f"{plan.trials}, {sum(c.finalist_runs for c in plan.categories)}",
            f"{sum(c.epochs_expected for c in plan.categories):.0f}",
            str(sum(c.epochs_worst for c in plan.categories)),
            str(sum(len(c.groups) for c in plan.categories)),
            format_bytes(sum(c.feature_bytes for c in plan.categories)),
            *_hours(plan.trial_hours),
        )
    return table


def plan_lines(plan: SweepPlan) -> list[str]:
    """Everything that is not in the table, notices last."""
    return [
        *_space_lines(plan),
        *_group_lines(plan),
        *_resource_lines(plan),
        *_time_lines(plan),
        *(f"note: {notice}" for notice in plan.notices),
    ]


def _space_lines(plan: SweepPlan) -> Iterator[str]:
    alike: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for each in plan.categories:
        alike[tuple(each.space.items())].append(each.category)
    for space, categories in alike.items():
        yield f"searched in {_name(categories)}:" + ("" if space else " nothing, the first trial is the only one")
        yield from (f"  {key}: {axis}" for key, axis in space)


def _group_lines(plan: SweepPlan) -> Iterator[str]:
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for each in plan.categories:
        if len(each.groups) > 1 or each.groups[0].source == "streamed":
            alike[tuple(map(_describe_group, each.groups))].append(each.category)
    for groups, categories in alike.items():
        yield f"features of {_name(categories)}{', each' if len(categories) > 1 else ''}:"
        yield from (f"  {group}" for group in groups)
    total = format_bytes(sum(c.feature_bytes for c in plan.categories))
    yield f"features: {total}, and there is memory for {format_bytes(plan.feature_budget_bytes)}"


def _describe_group(group: FeatureGroup) -> str:
    settings = ", ".join(f"{key}={show(value)}" for key, value in group.settings.items()) or "all trials"
    streamed = (
        "" if group.source == "cached" else " of images, as the features do not fit: the backbone runs every batch"
    )
    return f"{settings}: {format_bytes(group.num_bytes)}{streamed}"


def _resource_lines(plan: SweepPlan) -> Iterator[str]:
    gpus = f" and {plan.gpus_per_trial:g} GPU" if plan.gpus_per_trial else ""
    each = f"{plan.cpus_per_trial:g} CPU{gpus}"
    yield f"at once: {_count(plan.concurrency, 'trial')} of {each} each, on {_count(plan.num_nodes, 'node')}"
    limits = {
        "max_trials": plan.budget.max_trials,
        "time_budget": plan.budget.time_budget,
        "max_gpu_hours": plan.budget.max_gpu_hours,
    }
    given = ", ".join(f"search.{name}={value}" for name, value in limits.items() if value is not None)
    yield f"budget: {given or 'none'}"
    measured = plan.calibration
    if measured is None:
        yield "memory of a trial: unknown; --calibrate measures it"
        return
    yield f"memory of a trial: {format_bytes(measured.peak_memory_bytes)} at its peak, measured"
    if plan.packing is not None:
        memory = format_bytes(round(plan.packing.node_memory_bytes))
        yield f"  a node's {memory} hold {_count(plan.packing.per_node, 'trial')} beside the features"
        if plan.packing.per_gpu is not None:
            peak, whole = format_bytes(measured.peak_gpu_bytes), format_bytes(measured.gpu_memory_bytes)
            yield f"  {peak} of its GPU, whose {whole} hold {_count(plan.packing.per_gpu, 'trial')}"


def _time_lines(plan: SweepPlan) -> Iterator[str]:
    measured = plan.calibration
    if measured is None or plan.wall_hours is None:
        cost = "" if plan.price_per_hour is None else " and cost"
        yield f"durations{cost}: unknown; --calibrate measures them on one category"
        return
    took = format_duration(measured.duration_s)
    yield f"measured on {measured.category} in {took}, on {measured.hardware}:"
    for (backbone, layers, (height, width)), timing in measured.timings.items():
        yield (
            f"  {backbone}, layers {list(layers)}, {height} x {width}, per image: features {_ms(timing.feature_s)}, "
            f"training {_ms(timing.draw_s)}, validation {_ms(timing.validate_s)} and with pixel metrics "
            f"{_ms(timing.validate_s + timing.pixel_s)}"
        )
    wall = plan.wall_hours
    yield (
        f"search: {format_duration(3600 * wall.expected)} expected, {format_duration(3600 * wall.worst)} at worst, "
        "besides starting processes and scoring champions"
    )
    kind, per_trial = ("GPU", plan.gpus_per_trial) if plan.gpus_per_trial else ("core", plan.cpus_per_trial)
    held = plan.held_hours(per_trial)
    assert held is not None
    yield f"{kind}-hours: {_hour(held.expected)} expected, {_hour(held.worst)} at worst"
    if plan.cost is not None:
        yield (
            f"cost: {plan.cost.expected:.2f} expected, {plan.cost.worst:.2f} at worst, at {plan.price_per_hour:g} "
            f"an hour for each of {_count(plan.num_nodes, 'node')}"
        )


def _hours(hours: Hours | None) -> tuple[str, str]:
    return (ABSENT, ABSENT) if hours is None else (_hour(hours.expected), _hour(hours.worst))


def _hour(hours: float) -> str:
    return f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _name(categories: list[str]) -> str:
    return (
        ", ".join(categories) if len(categories) <= 5 else f"{', '.join(categories[:4])} and {len(categories) - 4} more"
    )
