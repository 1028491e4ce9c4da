"""Searches without Ray: a space with a conditional axis, and trials that are played as Tune would run them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from ssn.config import Config, flatten
from tuning.champions.winner import TrialRecord
from tuning.execution.weights import weights_key
from tuning.persistence.study_database import StudyDatabase
from tuning.search.rungs import rung_epochs
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import Axis, Choice, Condition, FloatRange

EPOCHS, GRACE, ETA = 9, 1, 3
WEIGHTS = {weights_key(Config().model): "weights"}
SIGMA, RATIO, WEAK = "synthesis.noise_sigma", "train.supervision_ratio", "train.weak_labels"
SPACE: dict[str, Axis] = {
    SIGMA: FloatRange(1e-3, 0.3, log=True),
    RATIO: Choice((0.0, 0.5, 1.0)),
    WEAK: Choice(("drop", "use"), when=(Condition(RATIO, "<", (0.75,)),)),
}


def make_search(
    names: str, trials: int, earlier: Sequence[TrialRecord] = (), database: StudyDatabase | None = None
) -> MultiplexSearcher:
    """One search over categories of one letter each."""
    base = flatten(Config().resolved()) | {"train.epochs": EPOCHS}
    return MultiplexSearcher(
        [CategorySearch(name, base, SPACE, f"data of {name}", WEIGHTS, 0) for name in names],
        sweep_id="sweep",
        trials_per_category=trials,
        earlier=copy.deepcopy(list(earlier)),
        database=database,
    )


def quality(config: dict[str, Any]) -> float:
    """What a trial comes to: best at a sigma of 0.02 and with all masks."""
    return math.exp(-abs(math.log(config[SIGMA] / 0.02))) + config[RATIO] / 10


def play(search: MultiplexSearcher, stop: int) -> list[dict[str, Any]]:
    """Run trials until ``stop`` have ended, one after the other; the poor ones are stopped at their second rung."""
    played = []
    while sum(r.state != "running" for r in search.records()) < stop:
        trial_id = f"t{len(search.records())}-{len(played)}"
        suggestion = search.suggest(trial_id)
        if not isinstance(suggestion, dict):
            break
        played.append(suggestion)
        value = quality(suggestion["config"])
        done = search.record(trial_id).checkpoint_epoch
        for epoch in rung_epochs(EPOCHS, GRACE, ETA):
            if epoch > done:
                report(search, trial_id, epoch, value)
        if value < 0.3:
            search.on_trial_complete(trial_id, {"epoch": 3, "objective": value * 0.75})
        else:
            search.on_trial_complete(trial_id, {"epoch": EPOCHS, "objective": value, "duration_s": 1.0})
    return played


def report(search: MultiplexSearcher, trial_id: str, epoch: int, value: float) -> None:
    """A trial's report at a rung, with a checkpoint."""
    search.on_trial_result(trial_id, {"epoch": epoch, "objective": value * epoch / (epoch + 1)})
    record = search.record(trial_id)
    record.checkpoint, record.checkpoint_epoch = f"/checkpoints/{trial_id}-{epoch}", epoch


def cut_short(search: MultiplexSearcher, trial_id: str) -> list[TrialRecord]:
    """Start another trial, take it past its first rung, and leave; what a ledger has then."""
    suggestion = search.suggest(trial_id)
    if isinstance(suggestion, dict):
        report(search, trial_id, 1, quality(suggestion["config"]))
    return copy.deepcopy(search.records())
