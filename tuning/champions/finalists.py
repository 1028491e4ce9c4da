"""Finalists: the search's best configurations, each trained with several seeds, of which the best on average wins.

A search keeps the luckiest of its trials, so that its best objective flatters. Mean and deviation over seeds say what a
configuration is worth. Everything here sees validation results alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tuning.champions.winner import TrialRecord, rank_key, select_winner
from tuning.settings import FinalistSettings

SEED_KEYS = ("train.train_seed", "train.label_seed")

RULE = (
    "highest mean validation objective over seeds; ties go to the higher mean image_ap, then to the lower mean loss, "
    "then to the shorter mean duration, then to the earlier trial; of the winner's runs the median is registered, the "
    "lower of the two middle ones where their number is even"
)


@dataclass(frozen=True)
class FinalistRun:
    """One more run of a finalist, with other seeds than the search's."""

    category: str
    identity: str
    index: int
    """Position among the category's runs of this stage."""
    config: Mapping[str, Any]
    """Flat, dotted keys."""
    trial_index: int
    """Of the search's trial that it repeats."""
    repetition: int
    """How far its seeds are from the search's; from 1."""

    @property
    def label(self) -> str:
        """What a person knows it by."""
        return f"trial {self.trial_index}, seed {self.config[SEED_KEYS[0]]}"

    def tags(self) -> dict[str, str]:
        """For the tracker."""
        return {"finalist_of": str(self.trial_index), "repetition": str(self.repetition)}


@dataclass(frozen=True)
class Finals:
    """The finalists' further runs, by category, and what became of them; empty where there were none to do."""

    planned: Mapping[str, Sequence[FinalistRun]] = field(default_factory=dict)
    records: Mapping[str, Sequence[TrialRecord]] = field(default_factory=dict)
    ended_by: str | None = None
    """The budget that kept some from their end, in one line; None: none did."""


@dataclass(frozen=True)
class Finalist:
    """One configuration and its runs, the search's own first."""

    trial: TrialRecord
    """The search's."""
    runs: tuple[TrialRecord, ...]
    """Those that were complete, by repetition."""
    failures: tuple[str, ...] = ()
    """Why the other runs were not."""

    @property
    def objectives(self) -> tuple[float, ...]:
        """By run."""
        return tuple(run.objectives[max(run.objectives)] for run in self.runs)

    @property
    def mean(self) -> float:
        """Of the objectives."""
        return statistics.fmean(self.objectives)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the objectives; None: there is but one."""
        return statistics.stdev(self.objectives) if len(self.runs) > 1 else None

    @property
    def median_run(self) -> TrialRecord:
        """The run with the median objective, the lower of the two middle ones; ties by repetition."""
        order = sorted(range(len(self.runs)), key=lambda at: (self.objectives[at], at))
        return self.runs[order[(len(order) - 1) // 2]]

    def mean_metrics(self) -> dict[str, float]:
        """Means of the metrics that all runs reported last."""
        shared = set.intersection(*(set(run.metrics) for run in self.runs))
        numbers = {name: [run.metrics[name] for run in self.runs] for name in shared}
        return {
            name: statistics.fmean(values)
            for name, values in sorted(numbers.items())
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        }

    def describe(self) -> str:
        """Such as ``trial 3: 0.912 ± 0.010 (n=3)``."""
        spread = "" if self.std is None else f" ± {self.std:.3f}"
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"trial {self.trial.index}: {self.mean:.3f}{spread} (n={len(self.runs)}{failed})"


@dataclass(frozen=True)
class Selection:
    """Which of a category's finalists won, and against which others."""

    winner: Finalist
    finalists: tuple[Finalist, ...]
    """All, the winner first, those that are out last."""
    notices: tuple[str, ...] = ()
    rule: str = RULE

    def as_dict(self) -> dict[str, Any]:
        """Plain data: every finalist with its numbers, and the rule."""
        return {
            "rule": self.rule,
            "winner_trial": self.winner.trial.index,
            "finalists": [
                {
                    "trial": finalist.trial.index,
                    "params": finalist.trial.params,
                    "objectives": list(finalist.objectives),
                    "mean": finalist.mean,
                    "std": finalist.std,
                    "n": len(finalist.runs),
                    "seeds": [run.config[SEED_KEYS[0]] for run in finalist.runs],
                    "identities": [run.trial_key for run in finalist.runs],
                    "failures": list(finalist.failures),
                }
                for finalist in self.finalists
            ],
        }


def plan_finalists(
    ranked: Sequence[TrialRecord], settings: FinalistSettings, identity: Callable[[Mapping[str, Any]], str]
) -> list[FinalistRun]:
    """The runs that one category's finalists still lack; none where the search's best is to win as it is.

    Args:
        ranked: The category's complete trials, best first.
        settings: How many finalists, and how many seeds.
        identity: Of the trial that trains with a flat configuration.
    """
    if settings.count == 1:
        return []
    planned: list[FinalistRun] = []
    # of a shared search, two of them may be one and the same run
    for trial in {trial.index: trial for trial in ranked[: settings.count]}.values():
        for repetition in range(1, settings.seeds):
            config = {**trial.config, **{key: trial.config[key] + repetition for key in SEED_KEYS}}
            planned.append(
                FinalistRun(
                    category=trial.category,
                    identity=identity(config),
                    index=len(planned),
                    config=config,
                    trial_index=trial.index,
                    repetition=repetition,
                )
            )
    return planned


def select_finalist(
    trials: Sequence[TrialRecord], planned: Sequence[FinalistRun], records: Sequence[TrialRecord]
) -> Selection:
    """Choose among one category's finalists by :data:`RULE`.

    A finalist of which a run failed is out. Where that leaves none, the search's own runs decide, as without finalists.

    Args:
        trials: Of the category's search.
        planned: From :func:`plan_finalists`.
        records: What became of them.

    Raises:
        SSNError: the search has no complete trial.
    """
    if not planned:
        finalist = Finalist(select_winner(trials), (select_winner(trials),))
        return Selection(finalist, (finalist,))
    by_index = {record.index: record for record in records}
    own = {trial.index: trial for trial in trials}
    finalists = [
        gather_finalist(own[index], [run for run in planned if run.trial_index == index], by_index)
        for index in dict.fromkeys(run.trial_index for run in planned)
    ]
    category = trials[0].category
    whole = [finalist for finalist in finalists if not finalist.failures]
    notices = [
        f"{category}: finalist trial {finalist.trial.index} is out, because {len(finalist.failures)} of its runs "
        f"failed: {finalist.failures[0]}"
        for finalist in finalists
        if finalist.failures and whole
    ]
    if not whole:
        notices.append(
            f"{category}: every finalist had a run that failed ({finalists[0].failures[0]}), so the search's own runs "
            "decide"
        )
        winner = Finalist(select_winner(trials), (select_winner(trials),))
        return Selection(winner, (winner, *finalists), tuple(notices))
    ranked = sorted(whole, key=lambda finalist: rank_key(finalist.runs, finalist.trial.index))
    out = [finalist for finalist in finalists if finalist.failures]
    return Selection(ranked[0], (*ranked, *out), tuple(notices))


def gather_finalist(trial: TrialRecord, planned: Sequence[FinalistRun], records: Mapping[int, TrialRecord]) -> Finalist:
    """A finalist from the search's run and the others."""
    runs, failures = [trial], []
    for run in planned:
        record = records.get(run.index)
        if record is not None and record.state == "complete" and record.objective is not None:
            runs.append(replace(record, params=trial.params))
        else:
            reason = (record.failure if record is not None else None) or "it did not finish"
            failures.append(f"{run.label}: {reason}")
    return Finalist(trial, tuple(runs), tuple(failures))
