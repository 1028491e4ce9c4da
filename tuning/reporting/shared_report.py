"""What tuning by category buys: a shared configuration's models beside those that were tuned for their category."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tuning.champions.category_result import SHARED, CategoryResult
from tuning.reporting.report import ABSENT
from tuning.tracking.protocol import PARENT_STAGE, RunRecord

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("category", "shared", "tuned", "difference", "tuned model")


@dataclass(frozen=True)
class SharedRow:
    """One category; objectives on the same validation images, None where there is nothing."""

    category: str
    shared: float | None
    tuned: float | None = None
    source: str | None = None
    """The registered champion, or the sweep, that has ``tuned``."""

    @property
    def difference(self) -> float | None:
        """What tuning for the category alone adds."""
        return None if self.shared is None or self.tuned is None else self.tuned - self.shared


@dataclass(frozen=True)
class SharedComparison:
    """All categories of a shared search."""

    dataset: str
    rows: Sequence[SharedRow]

    def means(self) -> SharedRow | None:
        """Over the categories that have both; None: none has."""
        both = [(row.shared, row.tuned) for row in self.rows if row.shared is not None and row.tuned is not None]
        if not both:
            return None
        shared, tuned = (statistics.fmean(values) for values in zip(*both, strict=True))
        share = "" if len(both) == len(self.rows) else f" (n={len(both)})"
        return SharedRow(f"mean{share}", shared, tuned)

    def table(self) -> Table:
        """For a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self._title()), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for name in _COLUMNS:
            table.add_column(name, justify="right" if name in _COLUMNS[1:4] else "left", overflow="fold")
        for row in self._lines():
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """For the parent runs."""
        rule = ["---:" if name in _COLUMNS[1:4] else ":---" for name in _COLUMNS]
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
            for cells in (list(_COLUMNS), rule, *self._lines())
        ]
        return "\n".join([f"**{self._title()}**", "", *lines, ""])

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        means = self.means()
        return {
            "rows": [{**asdict(row), "difference": row.difference} for row in self.rows],
            "mean_difference": None if means is None else means.difference,
        }

    def _title(self) -> str:
        return f"{self.dataset}: what tuning by category adds to one configuration for all, on validation"

    def _lines(self) -> list[list[str]]:
        means = self.means()
        return [_cells(row) for row in (*self.rows, *([means] if means is not None else []))]


def _cells(row: SharedRow) -> list[str]:
    difference = ABSENT if row.difference is None else f"{row.difference:+.3f}"
    numbers = [ABSENT if value is None else f"{value:.3f}" for value in (row.shared, row.tuned)]
    return [row.category, *numbers, difference, row.source or ABSENT]


def compare_with_tuned(
    results: Sequence[CategoryResult],
    runs: Sequence[RunRecord],
    *,
    dataset: str,
    fingerprints: Mapping[str, str],
    judged_by: Mapping[str, str],
) -> SharedComparison:
    """Set a shared search's results beside the champions that were tuned by category.

    A registered champion counts as it was compared with the shared model: by what was recorded, or both scored again.
    Where there is none, or it comes from a shared search too, the best earlier sweep of the same data does, if it was
    judged alike.

    Args:
        results: Of the shared search.
        runs: Of the dataset.
        dataset: Its name.
        fingerprints: Present ``search_fingerprint`` by category.
        judged_by: From :func:`tuning.champions.incumbent.yardstick`.
    """
    return SharedComparison(dataset, [_compare(r, runs, fingerprints[r.category], judged_by) for r in results])


def _compare(
    result: CategoryResult, runs: Sequence[RunRecord], fingerprint: str, judged_by: Mapping[str, str]
) -> SharedRow:
    verdict, selection = result.verdict, result.selection
    shared = None if selection is None else selection.winner.mean
    if (
        verdict is not None
        and verdict.incumbent is not None
        and verdict.incumbent_objective is not None
        and verdict.incumbent.tags.get("searched") != SHARED
    ):
        return SharedRow(
            result.category, verdict.candidate_objective, verdict.incumbent_objective, verdict.incumbent.title
        )
    earlier = [
        run
        for run in runs
        if run.stage == PARENT_STAGE
        and run.category == result.category
        and run.tags.get("search_fingerprint") == fingerprint
        and run.tags.get("searched") not in (None, SHARED)
        and all(run.tags.get(key) == value for key, value in judged_by.items())
        and "validation_objective" in run.metrics
    ]
    if not earlier:
        return SharedRow(result.category, shared)
    best = max(earlier, key=lambda run: run.metrics["validation_objective"])
    return SharedRow(result.category, shared, best.metrics["validation_objective"], f"sweep {best.tags['sweep_id']}")
