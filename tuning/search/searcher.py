"""One searcher for every category of a sweep: an Optuna study each, served round-robin to a single Ray Tune run.

Unlike Ray's own ``OptunaSearch``, a trial that the scheduler stops is told as PRUNED with its intermediate values keyed
by ``epoch``, and only a trial that used its whole budget is told as COMPLETE, so that the sampler never takes an early
objective for a final one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from ray.tune.search import Searcher

from ssn.config import digest, flatten, trial_identity, unflatten
from ssn.errors import SSNError
from tuning.champions.winner import RecordState, TrialRecord, conclude
from tuning.execution.weights import weights_key
from tuning.search.costs import excesses, shape_key, trial_cost
from tuning.search.sampler import make_sampler
from tuning.search.space import Axis, Choice, FloatRange, Follows, IntRange, applies, as_plain, as_value, validate_space
from tuning.search.warm_start import Start, Transfers, transfer_is_due

if TYPE_CHECKING:
    from tuning.persistence.study_database import StudyDatabase
    from tuning.settings import Against

MAX_DUPLICATES = 50
"""Suggestions in a row that repeat earlier trials before a category's space counts as exhausted."""


@dataclass(frozen=True)
class CategorySearch:
    """What the search needs to know of one category; nothing of its test split."""

    category: str
    base: Mapping[str, Any]
    """Flat configuration; trial 0 is this, and later trials replace the searched keys."""
    space: Mapping[str, Axis]
    """As :func:`tuning.search.space.resolve_space` returns it."""
    search_fingerprint: str
    weights_digests: Mapping[str, str]
    """Of every backbone that a trial may load, by :func:`tuning.execution.weights.weights_key`."""
    split_seed: int
    starts: tuple[Start, ...] = ()
    """Tried in this order after the base configuration, before the sampler is asked."""

    def identity(self, config: Mapping[str, Any]) -> str:
        """Identity of the trial that trains with ``config`` on this category."""
        built = unflatten(config)
        return trial_identity(
            built,
            search_fingerprint=self.search_fingerprint,
            weights_digest=self.weights_digests[weights_key(built.model)],
            split_seed=self.split_seed,
        )

    def config(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's configuration; what the base leaves to the variant is filled in."""
        return flatten(unflatten({**self.base, **params}).resolved())

    def tags(self, config: Mapping[str, Any]) -> dict[str, str]:
        """What a trial's run says of its backbone where the search tries several."""
        if len(self.weights_digests) == 1:
            return {}
        model = unflatten(config).model
        return {"backbone": model.backbone, "backbone_digest": self.weights_digests[weights_key(model)]}


class MultiplexSearcher(Searcher):
    """Suggests trials of all categories; every suggestion goes to the category with the fewest started.

    A suggestion is ``{"trial_key", "category", "index", "config", "tags"}``, all plain, and ``latency_ms`` where that
    of its network is known. The first of every category is its base configuration, then come its starts; the tag
    ``suggested_by`` says where a configuration came from. A suggestion that repeats an earlier trial of its category is
    answered from that trial's result and asked anew, without a run and without counting against the budget.

    A sweep goes on from the records of what was there before (``earlier``): those that ended are told to the studies;
    those that were cut short are suggested first, under the same key and index, with ``resume_from``, the path of their
    last checkpoint, if they have one. Nothing else is taken over, and Tune never restores this searcher.

    Concurrency is limited here, by ``max_concurrent_trials`` of ``TuneConfig`` through :meth:`set_max_concurrency`:
    Tune's own limiter forgets a trial that failed and then swallows its result.

    Args:
        categories: Served in this order among equals.
        sweep_id: Names the studies ``<sweep_id>.<category>``.
        trials_per_category: Budget, the base configuration included.
        search_seed: With the category, it seeds the sampler.
        transfer: Have categories try, now and then, what has done best in others.
        against: What the objective is weighed against; unless ``none``, studies have two directions.
        sampler: Makes a category's sampler from the search seed, the category and its budget.
        max_trials: Budget of all categories together; None: none.
        reuse_features: Serve the category that was served last first among equals, so that its features are still
            there. For searches whose features do not fit into memory at once: in the same order every time, none ever
            would be.
        earlier: Trials of the same sweep, from its ledger.
        database: Where the studies are shown to others; the search itself works in memory.

    Raises:
        SSNError: a space or base configuration is invalid.
    """

    def __init__(
        self,
        categories: Sequence[CategorySearch],
        *,
        sweep_id: str,
        trials_per_category: int,
        search_seed: int = 0,
        transfer: bool = False,
        against: Against = "none",
        sampler: Callable[[int, str, int], BaseSampler] = make_sampler,
        max_trials: int | None = None,
        reuse_features: bool = False,
        earlier: Sequence[TrialRecord] = (),
        database: StudyDatabase | None = None,
    ) -> None:
        # Metric and mode stay unset: Tune would otherwise insist on the objective in every single report.
        super().__init__()
        if trials_per_category < 1:
            raise SSNError(f"trials per category is {trials_per_category}, but must be at least 1")
        if not categories:
            raise SSNError("no category to search; name at least one")
        self._sweep_id = sweep_id
        self._budget = trials_per_category
        self._max_trials = max_trials
        self._reuse_features = reuse_features
        self.ended_by: str | None = None
        """The budget that ended the search before all trials were started or done, in one line; None: none did."""
        self._database = database
        self._against = against
        self._max_concurrent: int | None = None
        self._categories = {c.category: c for c in categories}
        if len(self._categories) < len(categories):
            raise SSNError("a category is named twice; name each once")
        for each in categories:
            if each.space:
                validate_space(each.space)
        self._records: dict[str, TrialRecord] = {}
        self._by_category: dict[str, list[TrialRecord]] = {c.category: [] for c in categories}
        self._latencies_ms: dict[str, float] = {}
        self._transfers = Transfers() if transfer else None
        self._served: dict[str, int] = {}  # when each category was served last, in trials
        self._running = 0
        self._cut_short: deque[TrialRecord] = deque()
        self._exhausted: set[str] = set()
        self.notices: list[str] = []
        """Lines for the user about categories that ended early."""
        known = [record for record in earlier if record.stage == "search"]
        num_known = Counter(record.category for record in known)
        self._samplers = {
            c.category: sampler(_attempt_seed(search_seed, num_known[c.category]), c.category, trials_per_category)
            for c in categories
        }
        self._storage = InMemoryStorage()
        self._studies = {c.category: self._create_study(c) for c in categories}
        for record in known:
            self._take_over(record)

    # What others read.

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories in the order they were given."""
        return tuple(self._categories)

    @property
    def trials_per_category(self) -> int:
        """Budget of each category."""
        return self._budget

    @property
    def max_concurrent(self) -> int | None:
        """How many trials may run at once; None: no limit."""
        return self._max_concurrent

    def records(self, category: str | None = None) -> list[TrialRecord]:
        """Trials in the order they were started; those of one category, or all."""
        return list(self._records.values() if category is None else self._by_category[category])

    def record(self, trial_id: str) -> TrialRecord:
        """One trial, by Tune's id."""
        return self._records[trial_id]

    def origin(self, trial_id: str) -> None:
        """A trial's own record is all it takes to suggest it again."""

    def expected_trials(self, category: str) -> int:
        """How many trials the category will have had at the end."""
        ended = self.ended_by is not None or category in self._exhausted
        return len(self._by_category[category]) if ended else self._budget

    @property
    def done(self) -> bool:
        """Whether every category has ended; false after a run that was interrupted."""
        return all(
            sum(r.state != "running" for r in self._by_category[c]) >= self.expected_trials(c) for c in self._categories
        )

    def identity(self, category: str, config: Mapping[str, Any]) -> str:
        """Identity of the trial that trains with a flat configuration on a category."""
        return self._categories[category].identity(config)

    def study(self, category: str) -> optuna.Study:
        """The category's Optuna study."""
        return self._studies[category]

    def recorded_objectives(self, trial_id: str) -> dict[int, float]:
        """Objective by epoch of one trial; empty if the trial is unknown."""
        record = self._records.get(trial_id)
        return dict(record.objectives) if record else {}

    def recorded_metrics(self, trial_id: str) -> Mapping[str, Any]:
        """The last report of one trial; empty if the trial is unknown."""
        record = self._records.get(trial_id)
        return record.metrics if record else {}

    # What Tune calls.

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Take over the limit that ``TuneConfig.max_concurrent_trials`` states."""
        self._max_concurrent = max_concurrent
        return True

    # Ray's annotation leaves out FINISHED, which is a string.
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial; None while the concurrency limit is reached; ``FINISHED`` once all budgets are used."""
        if self._max_concurrent is not None and self._running >= self._max_concurrent:
            return None
        if self._cut_short and self.ended_by is None:
            return self._start(self._again(self._cut_short.popleft(), trial_id))
        while True:
            open_ = [c for c in self._categories if c not in self._exhausted and self._left(c) > 0]
            if not open_ or self.ended_by is not None:
                return str(Searcher.FINISHED)
            if self._max_trials is not None and len(self._records) >= self._max_trials:
                self._close(f"search.max_trials={self._max_trials}")
                return str(Searcher.FINISHED)
            category = min(open_, key=self._turn)
            record = self._ask(category, trial_id)
            if record is not None:
                self._by_category[category].append(record)
                return self._start(record)
            self._exhausted.add(category)
            self.notices.append(
                f"{category}: ended after {len(self._by_category[category])} of {self._budget} trials, because "
                f"{MAX_DUPLICATES} suggestions in a row repeated earlier ones; widen the search space for more"
            )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record a report; the study learns of objectives as intermediate values keyed by epoch."""
        record = self._records[trial_id]
        if record.state != "running":
            self._reopen(record)
        self._take(record, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how a trial ended: FAIL, PRUNED, or, at full budget only, COMPLETE."""
        record = self._records[trial_id]
        if record.state != "running":
            if error:
                return
            self._reopen(record)
        if result is not None:
            self._take(record, result)
        if error:
            self._finish(record, "failed", record.failure or "it raised an error")
        else:
            self._finish(record, *conclude(record))

    def rename(self, trial_id: str, new_id: str) -> None:
        """A trial that has not begun comes under another of Tune's ids."""
        record = self._records.pop(trial_id)
        record.trial_id, self._records[new_id] = new_id, record

    def end(self, reason: str) -> None:
        """Take note that the search was ended, and every trial that still ran with it; what was left is not started.

        Args:
            reason: What ended it, such as ``search.time_budget=2h``.
        """
        running = [record for record in self._records.values() if record.state == "running"]
        for record in running:
            self._finish(record, "stopped")
        while self._cut_short:  # of an earlier driver, and not begun again
            self._cut_short.popleft().state = "stopped"
        self._close(reason, f" and stopped {len(running)} that still ran" if running else "")

    def note_failure(self, trial_id: str, reason: str) -> None:
        """Keep why a trial failed, in one line; Tune tells a searcher only that it did."""
        self._records[trial_id].failure = reason

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps its searcher's state; a sweep goes by its ledger."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Tune is never asked to restore a sweep."""
        raise NotImplementedError("a sweep goes on from its ledger")

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores what it was given as a run begins, and never reads it back
        return {**self.__dict__, "_database": None}

    # How it is done.

    def _study_name(self, category: str) -> str:
        return f"{self._sweep_id}.{category}"

    def _create_study(self, category: CategorySearch) -> optuna.Study:
        study = optuna.create_study(
            study_name=self._study_name(category.category),
            storage=self._storage,
            directions=["maximize"] if self._against == "none" else ["maximize", "minimize"],
            sampler=self._samplers[category.category],
            pruner=optuna.pruners.NopPruner(),
        )
        if self._database is not None:
            self._database.start(study.study_name, study.directions)
        return study

    def _take_over(self, record: TrialRecord) -> None:
        """Enter a trial of an earlier driver: as it ended, or to be suggested again."""
        record = dataclasses.replace(record, trial_id="-".join(map(str, record.name)))
        self._by_category[record.category].append(record)
        if record.state == "running":
            self._cut_short.append(record)
            return
        self._records[record.trial_id] = record
        record.number = self._ask_again(record)
        self._note_latency(record)
        self._enter(record)

    def _start(self, record: TrialRecord) -> dict[str, Any]:
        """Enter a trial that is about to run; returns its suggestion."""
        record.tags = {**self._categories[record.category].tags(record.config), "suggested_by": record.suggested_by}
        self._records[record.trial_id] = record
        self._served[record.category] = len(self._records)
        self._running += 1
        self._show(record)
        return {
            "trial_key": record.trial_key,
            "category": record.category,
            "index": record.index,
            "config": dict(record.config),
            "tags": dict(record.tags),
            **self._known_latency(record),
            **({} if record.checkpoint is None else {"resume_from": record.checkpoint}),
        }

    def _again(self, record: TrialRecord, trial_id: str) -> TrialRecord:
        record.trial_id, record.number = trial_id, self._ask_again(record)
        record.state, record.failure = "running", None
        return record

    def _ask_again(self, record: TrialRecord) -> int:
        """The number of a new trial in the study, with the settings of one that there was."""
        study = self._studies[record.category]
        study.enqueue_trial(
            _encode(self._categories[record.category].space, record.config),
            user_attrs={
                "trial_key": record.trial_key,
                "params": record.params,
                "index": record.index,
                "suggested_by": record.suggested_by,
            },
        )
        return self._draw(record.category)[0].number

    def _show(self, record: TrialRecord) -> None:
        """Bring a trial, as its study has it now, into the database."""
        if self._database is not None:
            self._database.write(self._study_name(record.category), self._storage.get_trial(self._id_of(record)))

    def _id_of(self, record: TrialRecord) -> int:
        study_id = self._storage.get_study_id_from_name(self._study_name(record.category))
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, record.number)

    def _close(self, reason: str, more: str = "") -> None:
        """Start no further trial, and say so."""
        total = self._budget * len(self._categories)
        self.ended_by = f"{reason} ended the search after {len(self._records)} of {total} trials{more}"
        self.notices.append(self.ended_by)

    def _turn(self, category: str) -> tuple[int, int]:
        """The category with the least is next."""
        started = self._by_category[category]
        return len(started), -self._served.get(category, 0) if self._reuse_features else 0

    def _left(self, category: str) -> int:
        return self._budget - len(self._by_category[category])

    def _ask(self, category: str, trial_id: str) -> TrialRecord | None:
        """A trial that is not a repetition, or None after too many that are."""
        search, study = self._categories[category], self._studies[category]
        earlier = {r.trial_key: r for r in self._by_category[category]}
        used = {r.index for r in earlier.values()}
        index = next(i for i in itertools.count() if i not in used)
        start = self._planned(category, index)
        if start is not None:
            settings = _encode(search.space, {**search.base, **start.params})
            study.enqueue_trial(settings, user_attrs={"suggested_by": start.suggested_by})
        for _ in range(MAX_DUPLICATES):
            asked, params = self._draw(category)
            config = search.config(params)
            key = search.identity(config)
            asked.set_user_attr("trial_key", key)
            asked.set_user_attr("params", params)
            if key not in earlier:
                asked.set_user_attr("index", index)
                return TrialRecord(
                    trial_id=trial_id,
                    trial_key=key,
                    category=category,
                    index=index,
                    number=asked.number,
                    max_epochs=int(config["train.epochs"]),
                    config=config,
                    params=params,
                    suggested_by=asked.user_attrs.get("suggested_by", "sampler"),
                )
            asked.set_user_attr("duplicate_of", earlier[key].number)
            self._tell(dataclasses.replace(earlier[key], number=asked.number))
        return None

    def _planned(self, category: str, index: int) -> Start | None:
        """What the category's trial ``index`` is without asking the sampler."""
        search, records = self._categories[category], self._by_category[category]
        planned = (Start({}, "default"), *search.starts)
        if index < len(planned):
            return planned[index]
        transferred = sum(r.suggested_by == "transfer" for r in records)
        if self._transfers is None or not transfer_is_due(self._budget, started=len(records), transferred=transferred):
            return None
        tried = {r.trial_key for r in records}
        for params in self._transfers.ranked(search.space, search.base, besides=category):
            if search.identity(search.config(params)) not in tried:
                return Start(params, "transfer")
        return None

    def _draw(self, category: str) -> tuple[optuna.Trial, dict[str, Any]]:
        """Ask the study for a trial and a value on every axis that it has, those on which others depend first."""
        search = self._categories[category]
        asked = self._studies[category].ask()
        params: dict[str, Any] = {}
        for key, axis in search.space.items():
            if applies(axis, {**search.base, **params}):
                if isinstance(axis, Follows):
                    params[key] = as_plain(axis.value_for({**search.base, **params}))
                else:
                    params[key] = _suggest(asked, key, axis)
        return asked, params

    def _known_latency(self, record: TrialRecord) -> dict[str, float]:
        """What another trial has measured of a network of the same shape."""
        key = shape_key(record.config)
        return {"latency_ms": self._latencies_ms[key]} if key in self._latencies_ms else {}

    def _take(self, record: TrialRecord, result: Mapping[str, Any]) -> None:
        """Note a report; Tune delivers the last one twice, and a resumed trial may repeat an epoch."""
        record.failure = result.get("failure", record.failure)
        epoch = result.get("epoch")
        if epoch is None:
            return
        record.epoch = int(epoch)
        record.metrics = dict(result)
        self._note_latency(record)
        if result.get("objective") is not None:
            record.objectives[record.epoch] = float(result["objective"])

    def _finish(self, record: TrialRecord, state: RecordState, failure: str | None = None) -> None:
        record.state, record.failure = state, failure
        self._running -= 1
        self._enter(record)

    def _enter(self, record: TrialRecord) -> None:
        """Have everybody learn of a trial that has ended."""
        self._tell(record)
        self._show(record)
        if record.state == "complete" and record.feasible and self._transfers is not None:
            assert record.objective is not None
            self._transfers.note(record.category, record.config, record.objective, is_default=record.index == 0)

    def _note_latency(self, record: TrialRecord) -> None:
        if "latency_ms" in record.metrics:
            known = self._latencies_ms.setdefault(shape_key(record.config), float(record.metrics["latency_ms"]))
            record.metrics["latency_ms"] = known  # trials that measured one shape at the same time

    def _tell(self, record: TrialRecord) -> None:
        """Bring a finished record, its intermediate values included, into its study.

        A trial whose objective stopped being a number is told as PRUNED: Optuna ranks a NaN behind everything of its
        epoch, so the sampler learns to keep away, whereas it ignores what is told as FAIL.
        """
        study, trial_id = self._studies[record.category], self._id_of(record)
        for bound, excess in excesses(record.metrics).items():
            # what Trial.set_constraint does; making a Trial of a number would draw from the sampler
            self._storage.set_trial_system_attr(trial_id, f"constraints:{bound}", excess)
        for epoch, objective in sorted(record.objectives.items()):
            value = objective if math.isfinite(objective) else math.nan
            if self._against == "none":
                self._storage.set_trial_intermediate_value(trial_id, epoch, value)
            else:  # TPE ranks pruned trials that have intermediate values by a study's one direction, or fails
                self._storage.set_trial_user_attr(trial_id, f"objective at epoch {epoch}", value)
        if record.state == "complete":
            assert record.objective is not None
            cost = [] if self._against == "none" else [trial_cost(record.metrics, self._against)]
            study.tell(record.number, [record.objective, *cost])
        elif record.state == "pruned" or any(not math.isfinite(o) for o in record.objectives.values()):
            study.tell(record.number, state=TrialState.PRUNED)
        else:
            study.tell(record.number, state=TrialState.FAIL)

    def _reopen(self, record: TrialRecord) -> None:
        """Let a trial that had ended run again; a study reopens none, so the attempt gets a new number."""
        self._again(record, record.trial_id)
        self._running += 1
        self._show(record)


def _attempt_seed(search_seed: int, num_known: int) -> int:
    """Of a sampler that begins with so many trials there: a stream of its own, lest it repeats what was tried."""
    return search_seed if num_known == 0 else int(digest([search_seed, num_known])[:8], 16)


def _index_name(key: str) -> str:
    return f"{key}[index]"


def _suggest(asked: optuna.Trial, key: str, axis: FloatRange | IntRange | Choice) -> Any:
    """One value; ordered choices are drawn as positions, so that the sampler knows which values are neighbours."""
    if isinstance(axis, FloatRange):
        return asked.suggest_float(key, axis.low, axis.high, log=axis.log)
    if isinstance(axis, IntRange):
        return asked.suggest_int(key, axis.low, axis.high, step=axis.step, log=axis.log)
    if axis.ordered:
        position = asked.suggest_int(_index_name(key), 0, len(axis.values) - 1)
    else:
        position = asked.suggest_categorical(_index_name(key), range(len(axis.values)))
    return as_plain(axis.values[position])


def _encode(space: Mapping[str, Axis], config: Mapping[str, Any]) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    for key, axis in space.items():
        if isinstance(axis, Follows) or not applies(axis, config):
            continue
        if isinstance(axis, FloatRange):
            encoded[key] = float(config[key])
        elif isinstance(axis, IntRange):
            encoded[key] = int(config[key])
        else:
            encoded[_index_name(key)] = axis.values.index(as_value(config[key]))
    return encoded
