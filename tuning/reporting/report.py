"""The leaderboard of a sweep: one row per category, as a terminal table, Markdown, and plain data for ``--json``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tuning.search.costs import is_feasible
from tuning.tracking.mlflow_tracker import absolute_uri, ui_command
from tuning.tracking.protocol import PARENT_STAGE, RunRecord

if TYPE_CHECKING:
    from rich.table import Table

ABSENT = "—"
REPORTED_PARAMS = ("synthesis.noise_sigma", "synthesis.perlin_threshold", "train.supervision_ratio")


@dataclass(frozen=True)
class LeaderboardRow:
    """What a sweep found for one category. None: undefined (no masks, one class only) or not there yet."""

    category: str
    noise_sigma: float | None = None
    perlin_threshold: float | None = None
    supervision_ratio: float | None = None
    validation_objective: float | None = None
    """The winner's; the mean over seeds where there were several."""
    validation_objective_std: float | None = None
    """Sample standard deviation over seeds; None: one seed."""
    default_objective: float | None = None
    """Trial 0's, which has the paper's settings, on the same validation split."""
    test_image_auroc: float | None = None
    """None also where the champion registered before stays: the winner is then not scored."""
    test_image_auroc_std: float | None = None
    test_pixel_ap: float | None = None
    test_pixel_ap_std: float | None = None
    seeds: int | None = None
    """Runs of the winner's settings, which differ in their seeds alone."""
    train_labels: int | None = None
    """Defective training images that the winner used."""
    train_masks: int | None = None
    """Those of them whose pixel masks it used."""
    validation_labels: int | None = None
    """Defective validation images by which it was chosen."""
    validation_masks: int | None = None
    trials_complete: int = 0
    trials_pruned: int = 0
    trials_failed: int = 0
    trials_infeasible: int = 0
    """Complete or not, they exceeded a bound such as ``objective.max_masks`` and could not win."""
    duration_s: float | None = None
    """Summed over the category's trials and finalists, however many ran at once."""
    champion: str | None = None
    """Registered model version, as ``<dataset>.<category>/<version>``."""


@dataclass(frozen=True)
class Leaderboard:
    """A sweep's result."""

    dataset: str
    sweep_id: str
    rows: Sequence[LeaderboardRow]
    tracking_uri: str | None = None
    notes: Sequence[str] = field(default_factory=tuple)
    """What a reader must know to read the numbers right, such as ``labels were free in this search``."""

    def table(self) -> Table:
        """For a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # Text, not str: a category's name may hold brackets, which rich would take for markup.
        table = Table(
            title=Text(self._title()), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=0
        )
        if self._notes():
            table.caption = Text("\n".join(self._notes()))
        for _, heading in _COLUMNS:
            table.add_column(heading, justify="left" if heading == "category" else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, _cells(row)))
        if len(self.rows) > 1:
            table.add_section()
            table.add_row(*map(Text, _mean_cells(self.rows)))
        return table

    def markdown(self) -> str:
        """For a README or a pull request."""
        lines = [f"**{self._title()}**", ""]
        lines += [_markdown_line([name for name, _ in _COLUMNS])]
        lines += [_markdown_line([":---" if name == "category" else "---:" for name, _ in _COLUMNS])]
        lines += [_markdown_line(_cells(row)) for row in self.rows]
        if len(self.rows) > 1:
            lines.append(_markdown_line(_mean_cells(self.rows)))
        for note in self._notes():
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; None where a number is undefined."""
        return {
            "dataset": self.dataset,
            "sweep_id": self.sweep_id,
            "tracking_uri": self.tracking_uri,
            "ui_command": self.ui_command(),
            "notes": self._notes(),
            "rows": [asdict(row) for row in self.rows],
        }

    def ui_command(self) -> str | None:
        """How to look at the runs: a command for a local store; None for a server, whose address suffices."""
        return None if self.tracking_uri is None else ui_command(self.tracking_uri)

    def footer(self) -> str:
        """The line below the table that says where the runs are."""
        if self.tracking_uri is None:
            return ""
        command = self.ui_command()
        return f"runs: {command}" if command else f"runs: {absolute_uri(self.tracking_uri)}"

    def _notes(self) -> list[str]:
        """What ± means where there is any, and the sweep's own notes."""
        seeds = sorted({row.seeds for row in self.rows if row.seeds is not None and row.seeds > 1})
        if not seeds:
            return list(self.notes)
        return [f"±: sample standard deviation over {' or '.join(map(str, seeds))} seeds", *self.notes]

    def _title(self) -> str:
        return f"{self.dataset}: champions of sweep {self.sweep_id}"


# Heading in Markdown, and in a terminal, where all twelve must stand side by side in 100 characters.
_COLUMNS = (
    ("category", "category"),
    ("validation", "valid-\nation"),
    ("paper defaults", "paper\ndefault"),
    ("test image_auroc", "test\nimage\nauroc"),
    ("test pixel_ap", "test\npixel\nap"),
    ("noise_sigma", "noise\nsigma"),
    ("perlin_threshold", "perlin\nthresh."),
    ("supervision_ratio", "superv.\nratio"),
    ("train labels/masks", "train\nlabels/\nmasks"),
    ("validation labels/masks", "valid.\nlabels/\nmasks"),
    ("done/pruned/failed", "done/\npruned/\nfailed"),
    ("time", "time"),
)


def _cells(row: LeaderboardRow) -> list[str]:
    return [
        row.category,
        _spread(row.validation_objective, row.validation_objective_std),
        _metric(row.default_objective),
        _spread(row.test_image_auroc, row.test_image_auroc_std),
        _spread(row.test_pixel_ap, row.test_pixel_ap_std),
        _setting(row.noise_sigma),
        _setting(row.perlin_threshold),
        _setting(row.supervision_ratio),
        _pair(row.train_labels, row.train_masks),
        _pair(row.validation_labels, row.validation_masks),
        f"{row.trials_complete}/{row.trials_pruned}/{row.trials_failed}",
        format_duration(row.duration_s),
    ]


def _mean_cells(rows: Sequence[LeaderboardRow]) -> list[str]:
    """Means of the metrics over the categories that have them, how many those are where not all do; sums of counts."""

    def mean(values: list[float | None]) -> str:
        defined = [v for v in values if v is not None]
        if not defined:
            return ABSENT
        share = "" if len(defined) == len(values) else f" (n={len(defined)})"
        return _metric(statistics.fmean(defined)) + share

    def total(values: list[int | None]) -> int | None:
        defined = [v for v in values if v is not None]
        return sum(defined) if defined else None

    durations_s = [r.duration_s for r in rows if r.duration_s is not None]
    return [
        "mean, sum",
        mean([r.validation_objective for r in rows]),
        mean([r.default_objective for r in rows]),
        mean([r.test_image_auroc for r in rows]),
        mean([r.test_pixel_ap for r in rows]),
        "",
        "",
        "",
        _pair(total([r.train_labels for r in rows]), total([r.train_masks for r in rows])),
        _pair(total([r.validation_labels for r in rows]), total([r.validation_masks for r in rows])),
        "/".join(str(sum(getattr(r, f"trials_{state}") for r in rows)) for state in ("complete", "pruned", "failed")),
        format_duration(sum(durations_s) if durations_s else None),
    ]


def _metric(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def _spread(mean: float | None, std: float | None) -> str:
    return _metric(mean) if std is None else f"{_metric(mean)} ±{std:.3f}"


def _setting(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def _pair(labels: int | None, masks: int | None) -> str:
    if labels is None and masks is None:
        return ABSENT
    return f"{ABSENT if labels is None else labels}/{ABSENT if masks is None else masks}"


def format_duration(duration_s: float | None) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if duration_s is None:
        return ABSENT
    total_s = round(duration_s)
    if total_s < 60:
        return f"{total_s} s"
    if total_s < 3600:
        return f"{total_s // 60} min {total_s % 60:02d} s"
    return f"{total_s // 3600} h {total_s % 3600 // 60:02d} min"


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def count_infeasible(rows: Sequence[LeaderboardRow]) -> list[str]:
    """A note on trials that could not win for what they cost; none where all could."""
    counted = [
        f"{row.category} {row.trials_infeasible} of {row.trials_complete + row.trials_pruned + row.trials_failed}"
        for row in rows
        if row.trials_infeasible
    ]
    return [f"trials that exceeded a bound and could not win: {', '.join(counted)}"] if counted else []


def leaderboard_from_runs(
    dataset: str,
    sweep_id: str,
    runs: Sequence[RunRecord],
    *,
    tracking_uri: str | None = None,
    notes: Sequence[str] = (),
) -> Leaderboard:
    """Read a sweep's leaderboard back from its runs, as ``tuning report`` does.

    Trials are counted from the search's runs. A category's best run is named by its parent run's tag ``best_run_id``,
    or ``champion_run_id`` where an earlier release wrote it; test metrics are the parent's ``test_*`` metrics; label
    and mask counts are the parent's tags ``train_labels``, ``train_masks``, ``validation_labels``,
    ``validation_masks``. What the parent's tags ``decision`` and ``ended_by`` say becomes notes. A category without a
    winner yet shows its counts alone.

    Args:
        dataset: Dataset's name.
        sweep_id: The sweep.
        runs: From ``Tracker.find_runs(dataset, sweep_id=sweep_id)``.
        tracking_uri: For :meth:`Leaderboard.ui_command`.
        notes: See :class:`Leaderboard`.
    """
    by_id = {run.run_id: run for run in runs}
    parents = [run for run in runs if run.stage == PARENT_STAGE]
    rows = [
        _row(parent, [r for r in runs if r.parent_run_id == parent.run_id], by_id)
        for parent in sorted(parents, key=lambda run: run.category)
    ]
    decisions = [parent.tags["decision"] for parent in parents if "decision" in parent.tags]
    ended_by = dict.fromkeys(parent.tags["ended_by"] for parent in parents if "ended_by" in parent.tags)
    found = (*notes, *ended_by, *sorted(decisions), *count_infeasible(rows))
    return Leaderboard(dataset, sweep_id, rows, tracking_uri=tracking_uri, notes=found)


def _row(parent: RunRecord, children: Sequence[RunRecord], by_id: Mapping[str, RunRecord]) -> LeaderboardRow:
    trials = [run for run in children if run.stage == "search"]
    best = by_id.get(parent.tags.get("best_run_id") or parent.tags.get("champion_run_id", ""))
    default = next((t for t in trials if t.tags["trial_index"] == "0" and t.trial_state == "COMPLETE"), None)
    states = [trial.trial_state for trial in trials]
    durations_s = [run.metrics["elapsed_s"] for run in children if "elapsed_s" in run.metrics]
    settings = {key: _float(best.params.get(key)) if best else None for key in REPORTED_PARAMS}
    counts = {
        key: int(parent.tags[key]) if key in parent.tags else None
        for key in ("train_labels", "train_masks", "validation_labels", "validation_masks", "seeds")
    }
    objective = parent.metrics.get("validation_objective")
    if objective is None and best is not None:
        objective = best.metrics.get("objective")
    return LeaderboardRow(
        category=parent.category,
        noise_sigma=settings["synthesis.noise_sigma"],
        perlin_threshold=settings["synthesis.perlin_threshold"],
        supervision_ratio=settings["train.supervision_ratio"],
        validation_objective=objective,
        default_objective=default.metrics.get("objective") if default else None,
        validation_objective_std=parent.metrics.get("validation_objective_std"),
        test_image_auroc=parent.metrics.get("test_image_auroc"),
        test_image_auroc_std=parent.metrics.get("test_image_auroc_std"),
        test_pixel_ap=parent.metrics.get("test_pixel_ap"),
        test_pixel_ap_std=parent.metrics.get("test_pixel_ap_std"),
        trials_complete=states.count("COMPLETE"),
        trials_pruned=states.count("PRUNED"),
        trials_failed=states.count("FAIL"),
        trials_infeasible=sum(not is_feasible(trial.metrics) for trial in trials),
        duration_s=sum(durations_s) if durations_s else None,
        champion=parent.tags.get("champion") or (best.tags.get("champion_version") if best else None),
        **counts,
    )


def _float(text: str | None) -> float | None:
    return None if text is None or text == "None" else float(text)
