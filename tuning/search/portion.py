"""A search as a chain of Tune runs.

Tune keeps every trial that it has run, some 100 kB each, and looks at all of them at every step. A search of any length
therefore is a chain of Tune runs; its searcher, scheduler and callbacks go from one to the next.

What Tune gives up before it has begun is begun again. A process that has ended one trial waits for the next; if it dies
meanwhile, Tune counts that as two failures of the next trial, of which the second is final.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

if TYPE_CHECKING:
    from tuning.search.fixed_runs import UnprunedSearcher
    from tuning.search.searcher import MultiplexSearcher

TRIALS_PER_RUN = 4000
"""Trials of one Tune run. Its last ones leave workers without work, and its first ones wait for processes to start."""
MAX_RETURNS = 2
"""How often a trial that had not begun is begun again."""


class Portion(Searcher):
    """Suggests what a search has next, up to a number of trials for every Tune run.

    Args:
        whole: The search.
        begun: Whether a trial, by Tune's id, has begun.
        trials: How many.
    """

    def __init__(
        self, whole: MultiplexSearcher | UnprunedSearcher, begun: Callable[[str], bool], trials: int = TRIALS_PER_RUN
    ) -> None:
        super().__init__()
        self._whole = whole
        self._begun = begun
        self._trials = self._left = trials
        self._suggested: dict[str, dict[str, Any]] = {}  # of trials that have not ended
        self._returned: deque[str] = deque()
        self._returns: Counter[tuple[str, str]] = Counter()

    @property
    def has_more(self) -> bool:
        """Whether the search may have more, for another Tune run."""
        return self._left == 0 or bool(self._returned)

    def refill(self) -> None:
        """A new Tune run begins."""
        self._left = self._trials

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Pass on the limit."""
        return self._whole.set_max_concurrency(max_concurrent)

    # Ray's annotation leaves out FINISHED, which is a string.
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The search's next trial; ``FINISHED`` after the last one of the portion or of the search."""
        if self._left == 0:
            return str(Searcher.FINISHED)
        suggested: dict[str, Any] | str | None
        if self._returned:
            given_up = self._returned.popleft()
            self._whole.rename(given_up, trial_id)
            suggested = self._suggested.pop(given_up)
        else:
            suggested = self._whole.suggest(trial_id)
        if isinstance(suggested, dict):
            self._left -= 1
            self._suggested[trial_id] = suggested
        return suggested

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on a report."""
        self._whole.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass on an end, but for that of a trial that has not begun: it will be suggested again, under another id."""
        suggested = self._suggested.get(trial_id)
        if error and suggested is not None and not self._begun(trial_id):
            name = suggested["category"], suggested["trial_key"]
            self._returns[name] += 1
            if self._returns[name] <= MAX_RETURNS:
                self._returned.append(trial_id)
                return
        self._suggested.pop(trial_id, None)
        self._whole.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps its searcher's state; a sweep goes by its ledger."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Tune is never asked to restore a sweep."""
        raise NotImplementedError("a sweep goes on from its ledger")

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores what it was given as a run begins, and never reads it back
        return {**self.__dict__, "_whole": None, "_begun": None}
