"""What a sweep found for one category: its winner, what the test split says of it, and its champion."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuning.champions.finalists import Selection
    from tuning.champions.incumbent import Verdict
    from tuning.champions.registry import ChampionVersion
    from tuning.champions.winner import TrialRecord
    from tuning.settings import SweepSettings

SHARED = "one configuration for all categories"
"""What a shared search's runs and champions say they were searched as."""


def describe_search(settings: SweepSettings) -> str:
    """Whether each category was searched by itself, as a tag."""
    return SHARED if settings.search.shared else "each category by itself"


@dataclass(frozen=True)
class ChampionScore:
    """What the test split says of one run of a category's winner."""

    metrics: Mapping[str, float]
    undefined: Mapping[str, str]
    num_images: int
    num_defective: int
    picture: bytes | None
    """PNG of its best, median and worst cases; None: not drawn."""


@dataclass(frozen=True)
class CategoryResult:
    """What a sweep found for one category."""

    category: str
    trials: Sequence[TrialRecord]
    """Of the search."""
    finalists: Sequence[TrialRecord] = ()
    """The finalists' runs besides those of the search."""
    selection: Selection | None = None
    verdict: Verdict | None = None
    scores: Sequence[ChampionScore] = ()
    """On test, of the winner's runs; none where the registered champion stays."""
    champion: ChampionVersion | None = None
    """What the alias points to at the end."""
    run_id: str | None = None
    """Of the winner's median run, which is registered if anything is."""
    failure: str | None = None
    """Why there is no champion."""

    @property
    def default(self) -> TrialRecord | None:
        """Trial 0, the paper's settings."""
        return next((trial for trial in self.trials if trial.index == 0), None)

    @property
    def winner(self) -> TrialRecord | None:
        """The winner's median run."""
        return None if self.selection is None else self.selection.winner.median_run

    @property
    def score(self) -> ChampionScore | None:
        """Of the winner's median run."""
        if self.selection is None or not self.scores:
            return None
        winner = self.selection.winner
        return self.scores[winner.runs.index(winner.median_run)]

    def notices(self) -> list[str]:
        """What the user must know of how the champion was chosen."""
        chosen = [] if self.selection is None else self.selection.notices
        return [*chosen, *([self.verdict.reason] if self.verdict is not None and self.verdict.reason else [])]


def mean_scores(scores: Sequence[ChampionScore]) -> dict[str, tuple[float, float | None]]:
    """Mean and sample standard deviation over runs, of the metrics that all have; None: of one run."""
    if not scores:
        return {}
    shared = [name for name in scores[0].metrics if all(name in score.metrics for score in scores)]
    values = {name: [score.metrics[name] for score in scores] for name in shared}
    return {n: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else None) for n, v in values.items()}
