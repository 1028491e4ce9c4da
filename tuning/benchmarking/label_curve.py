"""What labels are worth: test metrics against the number of labelled masks that training used, as a picture and a CSV.

One picture per category and configuration, and one of the mean over categories. Each repetition is a dot, the line is
their mean, the band one standard deviation to either side.
"""

from __future__ import annotations

import io
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssn.data.reader import CategoryInfo
from tuning.benchmarking.plan import RATIO_KEY, WEAK_KEY, Plan, Variant
from tuning.benchmarking.results import RunResult

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

CURVE_METRICS = ("pixel_ap", "image_ap")
SHARE_OF_GAIN = 0.9
"""What the sentence below a picture's heading looks for."""

_PANEL_TITLES = {"pixel_ap": "Outlining the defect (pixel AP)", "image_ap": "Finding defective parts (image AP)"}
_LINE_NAMES = {
    "drop": "training on defects with a drawn mask",
    "use": "training on all other defects too, as images known to be defective",
}
_BASELINE_NAME = "training without any defect"
_AXIS_NAMES = {"pixel_ap": "pixel AP", "image_ap": "image AP"}
_COLOURS = {"drop": "#0b5fa5", "use": "#c8541a"}
_GREY = "#666666"
MIN_SPAN = 10.0
"""Of the vertical axes, in points."""


@dataclass(frozen=True)
class Point:
    """One repetition with one number of masks."""

    masks: float
    """Used in training; a mean where the curve is one over categories."""
    labels: float
    """Defective training images used, with or without mask."""
    ratio: str
    """Supervision ratio, as it was asked for."""
    repetition: int
    values: Mapping[str, float]
    """Metric to share in [0, 1]."""


@dataclass(frozen=True)
class LabelCurve:
    """Points of one category, or of the mean over categories, with one configuration."""

    dataset: str
    category: str
    configuration: str
    points: Mapping[str, Sequence[Point]]
    """By ``train.weak_labels``."""
    available: float
    """Masks in the pool."""
    about: str
    """Test images, in words."""
    heading: str
    """Dataset, category and, if there are several, configuration."""

    @property
    def name(self) -> str:
        """For a file: what the curve is of, without a suffix."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "-", f"label_value-{self.category}-{self.configuration}").strip("-")


def make_curves(
    plan: Plan, infos: Mapping[str, CategoryInfo], results: Mapping[str, RunResult], dataset: str
) -> tuple[list[LabelCurve], list[str]]:
    """The curves that a benchmark holds, and notes on those that cannot be drawn.

    A curve needs ``train.supervision_ratio`` among the ``--over`` keys, and finished runs with at least two numbers of
    masks.
    """
    groups: dict[str, list[Variant]] = {}
    for variant in plan.variants:
        if variant.chosen(RATIO_KEY) is not None:
            groups.setdefault(_without_labels(variant), []).append(variant)
    curves, notes = [], []

    def make(category: str, configuration: str, points: dict[str, list[Point]], masks: float, about: str) -> LabelCurve:
        parts = dict.fromkeys([dataset, category, *([configuration] if len(groups) > 1 else [])])
        return LabelCurve(dataset, category, configuration, points, masks, about, ", ".join(parts))

    for configuration, variants in groups.items():
        for category in plan.categories:
            pool, counts = infos[category].counts["pool"], infos[category].counts["test"]
            points = _points(plan, results, variants, [category])
            about = f"{counts.defective} defective and {counts.normal} normal test images"
            curve = make(category, configuration, points, pool.masks, about)
            if pool.masks == 0:
                notes.append(f"no label value curve of {category}: none of its training images has a mask")
            elif not _drawable(curve):
                notes.append(f"no label value curve of {category}: fewer than two numbers of masks have finished")
            else:
                curves.append(curve)
        drawn = [curve.category for curve in curves if curve.configuration == configuration]
        if len(drawn) > 1:
            masks = statistics.fmean(infos[category].counts["pool"].masks for category in drawn)
            points = _points(plan, results, variants, drawn)
            about = f"mean over {', '.join(drawn)}"
            curve = make(f"mean of {len(drawn)} categories", configuration, points, masks, about)
            if _drawable(curve):
                curves.append(curve)
    return curves, list(dict.fromkeys(notes))


def _without_labels(variant: Variant) -> str:
    return Variant(
        variant.configuration, tuple((key, value) for key, value in variant.over if key not in (RATIO_KEY, WEAK_KEY))
    ).label


def _points(
    plan: Plan, results: Mapping[str, RunResult], variants: Sequence[Variant], categories: Sequence[str]
) -> dict[str, list[Point]]:
    """Points by weak setting; each is a mean over ``categories``, of the repetitions that are finished in all."""
    points: dict[str, list[Point]] = {}
    for variant in variants:
        for seed in plan.seeds:
            runs = [plan.run(category, variant.label, seed) for category in categories]
            found = [results[run.key] for run in runs if run.key in results]
            if len(found) < len(runs):
                continue
            values = {
                metric: statistics.fmean(result.test[metric] for result in found)
                for metric in CURVE_METRICS
                if all(metric in result.test for result in found)
            }
            weak = plan.asked[categories[0], variant.label].train.weak_labels
            points.setdefault(weak, []).append(
                Point(
                    masks=statistics.fmean(run.train_masks for run in runs),
                    labels=statistics.fmean(run.train_labels for run in runs),
                    ratio=str(variant.chosen(RATIO_KEY)),
                    repetition=seed,
                    values=values,
                )
            )
    if set(points) == {"drop", "use"} and not any(point.labels > point.masks for point in points["use"]):
        del points["use"]  # every defect has a mask that is used: the lines would be one
    return points


def _drawable(curve: LabelCurve) -> bool:
    return any(
        len({point.masks for point in points if metric in point.values}) > 1
        for points in curve.points.values()
        for metric in CURVE_METRICS
    )


def curve_rows(curves: Sequence[LabelCurve]) -> list[dict[str, Any]]:
    """The numbers behind the pictures, a line per dot; metrics are shares in [0, 1]."""
    return [
        {
            "dataset": curve.dataset,
            "category": curve.category,
            "configuration": curve.configuration,
            "weak_labels": weak,
            "supervision_ratio": point.ratio,
            "masks": point.masks,
            "labels": point.labels,
            "repetition": point.repetition,
            **{f"test_{metric}": point.values.get(metric) for metric in CURVE_METRICS},
        }
        for curve in curves
        for weak, points in curve.points.items()
        for point in points
    ]


def sum_up(points: Sequence[Point], metric: str) -> list[tuple[float, float, float, int]]:
    """Masks, mean, standard deviation (0 for one repetition) and repetitions, by increasing masks."""
    by_masks: dict[float, dict[int, float]] = {}
    for point in points:
        if metric in point.values:
            by_masks.setdefault(point.masks, {})[point.repetition] = point.values[metric]
    return [
        (
            masks,
            statistics.fmean(values.values()),
            statistics.stdev(values.values()) if len(values) > 1 else 0.0,
            len(values),
        )
        for masks, values in sorted(by_masks.items())
    ]


def read_gain(points: Sequence[Point], metric: str) -> str:
    """One sentence: the mean without defects, with the fewest masks that bring most of the gain, and with all of them.

    Or that there is no clear gain, where repetitions differ by as much. Empty where that cannot be told: without
    repetitions, or without training on no masks.
    """
    line = sum_up(points, metric)
    if len(line) < 2 or line[0][0] != 0 or min(n for *_, n in line) < 2:
        return ""
    (_, base, base_std, _), (most, full, full_std, _) = line[0], line[-1]
    start, end = f"{100 * base:.1f} without defects", f"{100 * full:.1f} with"
    if full - base <= base_std + full_std:
        return f"{start}, {end} {most:.4g} masks: no clear gain"
    wanted = base + SHARE_OF_GAIN * (full - base)
    enough, mean = next((masks, mean) for masks, mean, *_ in line if mean >= wanted)
    if enough == most:
        return f"{start}, {end} all {most:.4g} masks; fewer bring less than {100 * SHARE_OF_GAIN:.0f} % of the gain"
    return f"{start}, {100 * mean:.1f} with {enough:.4g} masks, {end} {most:.4g}"


def draw_label_curve(curve: LabelCurve, *, notes: str = "") -> bytes:
    """Draw a curve: a panel per metric, side by side.

    Args:
        curve: What to draw.
        notes: Below the picture: settings, code, hardware.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [m for m in CURVE_METRICS if any(m in p.values for points in curve.points.values() for p in points)]
    figure = Figure(figsize=(6.2 * len(metrics) + 0.6, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    handles: dict[str, Artist] = {}
    for axis, metric in zip(axes, metrics, strict=True):
        handles |= _draw_panel(axis, curve, metric)
    names = [name for name in (*_LINE_NAMES.values(), _BASELINE_NAME) if name in handles]
    figure.legend(
        [handles[name] for name in names],
        names,
        title=f"{curve.heading}: how many defects to annotate?",
        title_fontproperties={"size": 16, "weight": "bold"},
        alignment="left",
        loc="outside upper left",
        frameon=False,
        fontsize=11,
    )
    repetitions = len({point.repetition for points in curve.points.values() for point in points})
    spread = (
        f"dots: {repetitions} trainings with other seeds; line: their mean; band: ± 1 standard deviation"
        if repetitions > 1
        else "one training per point, so that chance cannot be told from gain"
    )
    lines = [line for line in (f"{curve.about}; {spread}", notes) if line]
    below = "\n".join(part for line in lines for part in textwrap.wrap(line, width=95 * len(metrics)))
    figure.supxlabel(below, fontsize=9, color=_GREY, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_panel(axis: Axes, curve: LabelCurve, metric: str) -> dict[str, Artist]:
    """Draw one metric; returns what the key explains, by name."""
    handles: dict[str, Artist] = {}
    for weak, points in curve.points.items():
        line, colour = sum_up(points, metric), _COLOURS[weak]
        masks = [m for m, *_ in line]
        low, high = ([100 * (mean + sign * std) for _, mean, std, _ in line] for sign in (-1, 1))
        axis.fill_between(masks, low, high, color=colour, alpha=0.13, linewidth=0)
        means = [100 * mean for _, mean, _, _ in line]
        handles[_LINE_NAMES[weak]] = axis.plot(masks, means, color=colour, linewidth=2.4, marker="o", markersize=5)[0]
        drawn = [p for p in points if metric in p.values]
        at, shares = [p.masks for p in drawn], [100 * p.values[metric] for p in drawn]
        axis.scatter(at, shares, s=18, color=colour, alpha=0.45, linewidth=0)
        if weak == "drop" and line and line[0][0] == 0:
            baseline = axis.axhline(means[0], color=_GREY, linewidth=1.2, linestyle=(0, (4, 4)), zorder=0)
            handles[_BASELINE_NAME] = baseline
    axis.set_title(f"{_PANEL_TITLES[metric]}\n", fontsize=12.5, loc="left")
    sentence = read_gain(curve.points.get("drop", ()), metric)
    axis.text(0.0, 1.015, sentence, transform=axis.transAxes, fontsize=10.5, color=_COLOURS["drop"], va="bottom")
    _scale_axes(axis, curve, metric)
    return handles


def _scale_axes(axis: Axes, curve: LabelCurve, metric: str) -> None:
    counts = {p.masks for points in curve.points.values() for p in points}
    most = max(counts)
    shown: list[float] = []
    for masks in [most, *sorted(counts)]:  # the largest always; of two that are close together, the smaller
        if all(abs(masks - other) >= 0.055 * most for other in shown):
            shown.append(masks)
    axis.set_xticks(shown, [f"{masks:.4g}\n{100 * masks / curve.available:.0f} %" for masks in shown])
    axis.set_xlim(-0.03 * most, 1.03 * most)
    axis.set_xlabel(f"defects with a drawn mask in training: number, and share of the {curve.available:.4g} there are")
    axis.set_ylabel(f"{_AXIS_NAMES[metric]} on the test split (%)")
    low, high = axis.get_ylim()
    room = max(MIN_SPAN - (high - low), 0.0) / 2  # a small difference is to look small
    axis.set_ylim(max(low - room, 0.0), min(high + room, 100.5))
    axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
