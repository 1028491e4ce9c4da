"""One configuration for all categories: a single search, whose objective is the mean over the categories.

A suggestion of the study is trained on one category after the other, in a fixed order, each time as an ordinary trial
that runs to its end. The mean so far is the study's intermediate value at step "categories done": so configurations are
compared over the same categories, and successive halving drops those that are behind before they cost all of them.

The supervision ratio is a float here, as the categories' pools differ: each category takes its nearest attainable one.
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ray.tune.search import Searcher

from ssn.config import digest, flatten, unflatten
from ssn.data.reader import SplitCount
from ssn.errors import SSNError
from tuning.benchmarking.plan import canonical
from tuning.champions.finalists import RULE, Finalist, FinalistRun, Selection, gather_finalist, plan_finalists
from tuning.champions.winner import TrialRecord, rank_key
from tuning.persistence.ledger import CONFIGURATION_STAGE
from tuning.search.fixed_runs import UnprunedSearcher
from tuning.search.rungs import rung_epochs
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.settings import FinalistSettings

if TYPE_CHECKING:
    from tuning.persistence.study_database import StudyDatabase

ALL = "all categories"
"""What the study has for a category; its trials are configurations and its epochs categories."""

SHARED_RULE = f"of one configuration for all categories, the mean over them: {RULE}"

State = Literal["running", "complete", "pruned", "failed", "stopped"]


def goes_on(mean: float, others: Sequence[float], eta: int) -> bool:
    """Whether a configuration is among the best ``1 / eta`` of those that have reached a rung (ASHA's rule).

    Args:
        mean: Its mean objective over the categories so far.
        others: Those of the configurations that were there before, over the same categories.
        eta: Reduction factor.
    """
    return len(others) == 0 or mean >= float(np.percentile(others, 100 * (1 - 1 / eta)))


@dataclass
class Configuration:
    """One suggestion of the study, on its way through the categories."""

    id: str
    """Its trial in the study."""
    index: int
    config: Mapping[str, Any]
    """Flat, as suggested."""
    params: Mapping[str, Any]
    """The searched part of it."""
    records: dict[str, TrialRecord] = field(default_factory=dict)
    """By category, as they are started. One with the same settings for a category shares the earlier one's record."""
    num_told: int = 0
    """Categories, from the first, whose mean the study knows."""
    state: State = "running"

    def mean(self) -> float:
        """Over the categories that the study knows of."""
        done = list(self.records.values())[: self.num_told]
        return statistics.fmean(_objective(record) for record in done)


class SharedSearcher(UnprunedSearcher):
    """Has one study's suggestions trained on every category.

    As many configurations are under way as there are places; one that may go on comes before a new one. Those that have
    the same settings on a category, because their supervision ratios select the same masks there, share its run.

    Args:
        study: Of :data:`ALL`, whose trials are configurations.
        categories: In the order they are tried.
        pools: Counts of each category's labelled pool.
        eta: Reduction factor of the rungs over categories: 1, eta, eta^2, ...
        max_trials: Budget of runs, over all categories together; None: none.
        earlier: Trials of the same sweep, from its ledger. The study suggests its earlier configurations again, and
            those trials of theirs that have ended are not run again.
    """

    def __init__(
        self,
        study: MultiplexSearcher,
        categories: Sequence[CategorySearch],
        *,
        pools: Mapping[str, SplitCount],
        eta: int,
        max_trials: int | None = None,
        earlier: Sequence[TrialRecord] = (),
    ) -> None:
        super().__init__()
        self._study = study
        self._max_trials = max_trials
        self._searches = {search.category: search for search in categories}
        self._pools = dict(pools)
        self._eta = eta
        self._rungs = rung_epochs(len(categories), 1, eta)
        self._reached: dict[int, list[float]] = {rung: [] for rung in self._rungs}
        self._by_identity: dict[tuple[str, str], TrialRecord] = {}
        self._origins: dict[str, Configuration] = {}  # of the trial that was started for it, by Tune's id
        self.configurations: list[Configuration] = []
        """In the order they were suggested."""
        self._cut_short: dict[tuple[str, str], TrialRecord] = {}
        for record in earlier:
            if record.stage != "search":
                continue
            if record.state == "running":
                self._cut_short[record.category, record.trial_key] = record
            else:
                self._by_identity[record.category, record.trial_key] = record
                self._enter_earlier(record)

    @property
    def categories(self) -> tuple[str, ...]:
        """In the order they are tried."""
        return tuple(self._searches)

    @property
    def notices(self) -> list[str]:
        """Lines for the user."""
        return self._study.notices

    @property
    def done(self) -> bool:
        """Whether every configuration has ended; false after an interrupt."""
        return self._study.done and not any(c.state == "running" for c in self.configurations)

    def expected_trials(self, category: str) -> int:
        """How many trials the category will have had at the end, if no further configuration is dropped."""
        step = self.categories.index(category)
        never = sum(c.state in ("pruned", "failed") and len(c.records) <= step for c in self.configurations)
        shared = sum(category in c.records for c in self.configurations) - len(self.records(category))
        return self._study.expected_trials(ALL) - never - shared

    def identity(self, category: str, config: Mapping[str, Any]) -> str:
        """Identity of the trial that trains with a flat configuration on a category."""
        return self._searches[category].identity(config)

    def ranked(self) -> list[Configuration]:
        """The configurations that were trained on every category, best mean first; ties as between trials."""
        complete = [c for c in self.configurations if c.state == "complete"]
        return sorted(complete, key=lambda c: rank_key(list(c.records.values()), c.index))

    # Ray's annotation leaves out FINISHED, which is a string.
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial; None while places are taken or what follows depends on running trials."""
        if self.full:
            return None
        if self._max_trials is not None and len(self._records) >= self._max_trials and not self.done:
            if any(record.state == "running" for record in self._records.values()):
                return None
            self.end(f"search.max_trials={self._max_trials}")
        if self.ended_by is not None:
            return str(Searcher.FINISHED)
        while True:
            chosen = next((c for c in self.configurations if self._may_start(c)), None) or self._ask()
            if chosen is None:
                waiting = any(c.state == "running" for c in self.configurations)
                return None if waiting else str(Searcher.FINISHED)
            category = self.categories[len(chosen.records)]
            config = flatten(canonical(unflatten(chosen.config), self._pools[category]).resolved())
            key = self.identity(category, config)
            known = self._by_identity.get((category, key))
            if known is not None:
                chosen.records[category] = known
                self._advance(chosen)
                continue
            record = self._cut_short.get((category, key)) or TrialRecord(
                trial_id=trial_id,
                trial_key=key,
                category=category,
                index=chosen.index,
                number=chosen.index,
                max_epochs=int(config["train.epochs"]),
                config=config,
                params={name: config[name] for name in chosen.params},
                tags={"configuration": str(chosen.index), **self._searches[category].tags(config)},
            )
            record.trial_id = trial_id
            self._origins[trial_id] = chosen
            self._records[trial_id] = chosen.records[category] = self._by_identity[category, key] = record
            goes_on = {} if record.checkpoint is None else {"resume_from": record.checkpoint}
            return goes_on | {
                "trial_key": key,
                "category": category,
                "index": record.index,
                "config": dict(config),
                "tags": dict(record.tags),
            }

    def origin(self, trial_id: str) -> TrialRecord:
        """The configuration that a trial belongs to, as it was suggested: its trials know what they made of it."""
        return replace(self._study.record(self._origins[trial_id].id), stage=CONFIGURATION_STAGE, state="running")

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note how a trial ended, and take every configuration that waited for it a step further."""
        super().on_trial_complete(trial_id, result, error)
        for configuration in self.configurations:
            self._advance(configuration)

    def rename(self, trial_id: str, new_id: str) -> None:
        """A trial that has not begun comes under another of Tune's ids."""
        super().rename(trial_id, new_id)
        self._origins[new_id] = self._origins.pop(trial_id)

    def end(self, reason: str) -> None:
        """Take note that a budget ended the search: configurations that were under way are out.

        Args:
            reason: What ended it, such as ``search.time_budget=2h``.
        """
        self._study.end(reason)
        super().end(self._study.ended_by or reason)
        for configuration in self.configurations:
            if configuration.state == "running":
                configuration.state = "stopped"

    def _may_start(self, configuration: Configuration) -> bool:
        """Whether a configuration's next category can be started without knowing how the running ones end."""
        if configuration.state != "running":
            return False
        until = min(r for r in (*self._rungs, len(self.categories)) if r > configuration.num_told)
        return len(configuration.records) < until

    def _ask(self) -> Configuration | None:
        """A new configuration from the study; None once its budget is used."""
        name = f"configuration-{len(self.configurations)}"
        suggested = self._study.suggest(name)
        if not isinstance(suggested, dict):
            return None
        asked = self._study.record(name)
        asked.max_epochs = len(self.categories)  # its steps are categories
        configuration = Configuration(name, asked.index, asked.config, asked.params)
        self.configurations.append(configuration)
        return configuration

    def _advance(self, configuration: Configuration) -> None:
        """Tell the study what is known of a configuration's mean, category by category, and drop it if it is behind."""
        while configuration.state == "running" and configuration.num_told < len(configuration.records):
            record = list(configuration.records.values())[configuration.num_told]
            if record.state == "running":
                return
            if record.state == "failed":
                configuration.state = "failed"
                self._study.note_failure(
                    configuration.id, f"{record.category}: {record.failure or 'it raised an error'}"
                )
                self._study.on_trial_complete(configuration.id, None, error=True)
                return
            configuration.num_told += 1
            step, mean = configuration.num_told, configuration.mean()
            told = {"epoch": step, "objective": mean}
            if step == len(self.categories):
                configuration.state = "complete"
                self._study.on_trial_complete(configuration.id, told)
                return
            self._study.on_trial_result(configuration.id, told)
            if step in self._reached:
                stays = goes_on(mean, self._reached[step], self._eta)
                self._reached[step].append(mean)
                if not stays:
                    configuration.state = "pruned"
                    self._study.on_trial_complete(configuration.id)


def make_shared_searcher(
    categories: Sequence[CategorySearch],
    *,
    pools: Mapping[str, SplitCount],
    sweep_id: str,
    num_configurations: int,
    search_seed: int,
    eta: int,
    max_trials: int | None = None,
    earlier: Sequence[TrialRecord] = (),
    database: StudyDatabase | None = None,
) -> SharedSearcher:
    """The searcher of a shared search.

    Args:
        categories: All with the base configuration and the space of :func:`tuning.search.feature_groups.shared_space`.
        pools: Counts of each category's labelled pool.
        sweep_id: Names the study.
        num_configurations: Budget, the base configuration included.
        search_seed: Of the sampler.
        eta: See :class:`SharedSearcher`.
        max_trials: See :class:`SharedSearcher`.
        earlier: See :class:`SharedSearcher`.
        database: See :class:`tuning.search.searcher.MultiplexSearcher`.
    """
    fingerprints = digest([search.search_fingerprint for search in categories])
    study = MultiplexSearcher(
        [replace(categories[0], category=ALL, search_fingerprint=fingerprints)],
        sweep_id=sweep_id,
        trials_per_category=num_configurations,
        search_seed=search_seed,
        earlier=[
            replace(record, stage="search", epoch=0, objectives={}, metrics={}, checkpoint=None, failure=None)
            for record in earlier
            if record.stage == CONFIGURATION_STAGE
        ],
        database=database,
    )
    return SharedSearcher(study, categories, pools=pools, eta=eta, max_trials=max_trials, earlier=earlier)


def plan_shared_finalists(searcher: SharedSearcher, settings: FinalistSettings) -> dict[str, list[FinalistRun]]:
    """By category, the runs that the best configurations lack; none where the search's best is to win as it is."""
    ranked = searcher.ranked()
    return {
        name: plan_finalists([c.records[name] for c in ranked], settings, functools.partial(searcher.identity, name))
        for name in searcher.categories
    }


def select_shared(
    searcher: SharedSearcher,
    settings: FinalistSettings,
    planned: Mapping[str, Sequence[FinalistRun]],
    records: Mapping[str, Sequence[TrialRecord]],
) -> dict[str, Selection]:
    """Choose one configuration for all categories, by :data:`SHARED_RULE`; each category's selection names it.

    A configuration of which a run failed on any category is out. Where that leaves none, the search's own runs decide.

    Args:
        searcher: At its end.
        settings: How many finalists there were.
        planned: From :func:`plan_shared_finalists`.
        records: What became of them, by category.

    Raises:
        SSNError: no configuration was trained on every category.
    """
    ranked = searcher.ranked()
    if not ranked:
        states = Counter(c.state for c in searcher.configurations)
        counted = ", ".join(f"{number} {state}" for state, number in states.items())
        failures = [r.failure for c in searcher.configurations for r in c.records.values() if r.state == "failed"]
        way_out = f"mend what failed ({(failures or ['nothing was started'])[0]}) and sweep again"
        if not failures and states["stopped"]:
            way_out = "raise the budget that ended the search"
        raise SSNError(f"no winner, because no configuration was trained on all categories ({counted}); {way_out}")
    notices: list[str] = []

    def gather(configuration: Configuration) -> dict[str, Finalist]:
        found = {}
        for name, own in configuration.records.items():
            runs = [run for run in planned[name] if run.trial_index == own.index]
            found[name] = gather_finalist(own, runs, {record.index: record for record in records.get(name, ())})
        return found

    finalists = [gather(c) for c in ranked[: settings.count]] if any(planned.values()) else []
    whole = [f for f in finalists if not any(each.failures for each in f.values())]
    if finalists and not whole:
        notices.append("every finalist had a run that failed on some category, so the search's own runs decide")
    if not whole:
        whole = [{name: Finalist(record, (record,)) for name, record in ranked[0].records.items()}]
    out = [f for f in finalists if f not in whole]

    def rank(finalist: Mapping[str, Finalist]) -> tuple[float, ...]:
        runs = [run for each in finalist.values() for run in each.runs]
        return rank_key(runs, next(iter(finalist.values())).trial.index)

    ordered = sorted(whole, key=rank)
    return {
        name: Selection(
            winner=ordered[0][name],
            finalists=tuple(f[name] for f in (*ordered, *out)),
            notices=tuple(notices) if name == searcher.categories[0] else (),
            rule=SHARED_RULE,
        )
        for name in searcher.categories
    }


def _objective(record: TrialRecord) -> float:
    return record.objectives[max(record.objectives)]
