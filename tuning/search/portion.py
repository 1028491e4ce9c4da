"""The trials of one Tune run among those of a search.

Tune keeps every trial that it has run, some 100 kB each, and looks at all of them at every step. A search of any length
therefore is a chain of Tune runs; its searcher, scheduler and callbacks go from one to the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

TRIALS_PER_RUN = 4000
"""Trials of one Tune run. Its last ones leave workers without work, and its first ones wait for processes to start."""


class Portion(Searcher):
    """Suggests what a search has next, up to a number of trials.

    Args:
        whole: The search.
        trials: How many.
    """

    def __init__(self, whole: Searcher, trials: int = TRIALS_PER_RUN) -> None:
        super().__init__()
        self._whole = whole
        self._left = trials

    @property
    def used_up(self) -> bool:
        """Whether the search may have more, for another portion."""
        return self._left == 0

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Pass on the limit."""
        return self._whole.set_max_concurrency(max_concurrent)

    # Ray's annotation leaves out FINISHED, which is a string.
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The search's next trial; ``FINISHED`` after the last one of the portion or of the search."""
        if self.used_up:
            return str(Searcher.FINISHED)
        suggested: dict[str, Any] | str | None = self._whole.suggest(trial_id)
        if isinstance(suggested, dict):
            self._left -= 1
        return suggested

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on a report."""
        self._whole.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass on an end."""
        self._whole.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps its searcher's state; a sweep goes by its ledger."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Tune is never asked to restore a sweep."""
        raise NotImplementedError("a sweep goes on from its ledger")

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores what it was given as a run begins, and never reads it back
        return {**self.__dict__, "_whole": None}
