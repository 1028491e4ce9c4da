"""What a person sees of a running sweep: one live table over all categories, or plain lines without a terminal."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Callback
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tuning.champions.winner import TrialRecord, rank_trials
from tuning.tracking.callback import reported_failure, trial_error

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from tuning.search.fixed_runs import FixedRuns
    from tuning.search.searcher import MultiplexSearcher
    from tuning.search.shared import SharedSearcher

_LIVE_PERIOD_S = 0.5
# Rows of the screen that the table's frame, header, summary and the prompt take.
_FRAME_ROWS = 8


@dataclass(frozen=True)
class CategoryProgress:
    """Where one category of a sweep or of a benchmark stands."""

    category: str
    expected: int
    """Trials the category will have had at the end."""
    running: int
    complete: int
    pruned: int
    failed: int
    best: TrialRecord | None
    """The winner so far; None until a trial used its full budget, and where nothing is ranked."""

    @property
    def ended(self) -> int:
        """Trials that run no more, whatever became of them."""
        return self.complete + self.pruned + self.failed

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.ended >= self.expected


def summarise(category: str, expected: int, records: Sequence[TrialRecord]) -> CategoryProgress:
    """Count the trials of one category."""
    count = {s: sum(r.state == s for r in records) for s in ("running", "complete", "pruned", "failed")}
    return CategoryProgress(category, expected, best=next(iter(rank_trials(records)), None), **count)


def estimate_time_left_s(
    board: Sequence[CategoryProgress], durations_s: Sequence[float], concurrency: int, pace_s: float | None = None
) -> float | None:
    """Seconds until the sweep ends; None while no trial has ended.

    The mean over all that ended counts, pruned trials included, since as many of those to come will be pruned; running
    trials count as half done. What passes between trials shows in the pace alone, so the longer of the two counts.

    Args:
        board: Every category.
        durations_s: Of the trials that ended.
        concurrency: Most trials at once.
        pace_s: From one trial's end to the next's, since the first that ended; None: not known yet.
    """
    if not durations_s:
        return None
    running = sum(c.running for c in board)
    waiting = sum(max(0, c.expected - c.ended - c.running) for c in board)
    trials = waiting + running / 2
    return trials * max(statistics.fmean(durations_s) / max(1, min(concurrency, waiting + running)), pace_s or 0.0)


def format_duration(seconds: float) -> str:
    """Such as ``48 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_params(params: dict[str, Any]) -> str:
    """Searched settings without their sections, floats to three digits."""
    shown = {k.rpartition(".")[2]: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in params.items()}
    return ", ".join(f"{k} {v}" for k, v in shown.items())


class ProgressCallback(Callback):
    """Shows a sweep's progress on standard error.

    All that it shows is the searcher's, so that this keeps nothing itself and can be pickled at any time.

    Args:
        searcher: Of the same run.
        ranked: Whether trials compete, as in a sweep, so that some are pruned and one is the best.
        interval_s: Between two lines where standard error is no terminal.
        console: For tests; None: standard error.
        clock: For tests; seconds that only grow.
    """

    def __init__(
        self,
        searcher: MultiplexSearcher | SharedSearcher | FixedRuns[Any],
        *,
        ranked: bool = True,
        interval_s: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._searcher = searcher
        self._ranked = ranked
        self._interval_s = interval_s
        self._console = console
        self._clock = clock
        self._started_s: float | None = None
        self._shown_s = float("-inf")
        self._live: Live | None = None
        self._announced: set[str] = set()
        self._waiting = 0
        self._earlier = 0
        self._first: tuple[float, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        clocks = {"_started_s": None, "_shown_s": float("-inf"), "_first": None}
        return self.__dict__ | {"_live": None, "_console": None, **clocks}

    def setup(self, *args: Any, **info: Any) -> None:
        """Start the clock, once for all Tune runs of a search; categories that ended before are not announced again."""
        logging.getLogger("ray.tune.tune").addFilter(_is_news)
        board = self._board()
        self._announced = {c.category for c in board if c.done}
        if self._started_s is None:
            self._started_s = self._clock()
            self._earlier = sum(c.ended for c in board)
        if self._console is None:
            self._console = Console(stderr=True)
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Refresh, if it is time."""
        now = self._clock()
        if now - self._shown_s >= (_LIVE_PERIOD_S if self._live else self._interval_s):
            self._waiting = sum(t.status == "PENDING" for t in trials)
            self._show(now)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say why a trial gave up, if it did, and announce a category's end."""
        reason = reported_failure(trial)
        if reason is not None:
            self._print_failure(trial, reason)
        self._announce(trial.config["category"])

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say what went wrong, and announce a category's end; a trial that still counts as running comes again."""
        if self._searcher.record(trial.trial_id).state == "running":
            return
        assert trial.error_file is not None
        reason = trial_error(trial)
        self._searcher.note_failure(trial.trial_id, reason)
        self._print_failure(trial, f"{reason}; see {trial.path}/{Path(trial.error_file).name}")
        self._announce(trial.config["category"])

    def _print_failure(self, trial: Trial, reason: str) -> None:
        name = trial.config.get("label", f"trial {trial.config['index']}")
        self._print(f"{trial.config['category']}: {name} failed: {reason}")

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Show where the sweep ended, interrupted or not, and give the terminal back."""
        self._waiting = sum(t.status == "PENDING" for t in trials)
        self._show(self._clock())
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _board(self) -> list[CategoryProgress]:
        searcher = self._searcher
        return [summarise(c, searcher.expected_trials(c), searcher.records(c)) for c in searcher.categories]

    def _show(self, now: float) -> None:
        self._shown_s = now
        board = self._board()
        if self._live is None:
            self._print(self._summary(board, now))
            return
        assert self._console is not None
        rows = max(3, self._console.height - _FRAME_ROWS)
        self._live.update(Group(_table(board, rows, self._ranked), Text(self._summary(board, now))), refresh=True)

    def _announce(self, category: str) -> None:
        progress = summarise(category, self._searcher.expected_trials(category), self._searcher.records(category))
        if self._live is not None or not progress.done or category in self._announced:
            return
        self._announced.add(category)
        if not self._ranked:
            self._print(f"{category}: {progress.complete} runs complete, {progress.failed} failed")
            return
        line = (
            f"{category}: {progress.ended} trials ended "
            f"({progress.complete} complete, {progress.pruned} pruned, {progress.failed} failed), "
        )
        if progress.best is None:
            self._print(line + "no winner")
        else:
            self._print(line + f"best {progress.best.objective:.4f} with {format_params(progress.best.params)}")

    def _summary(self, board: Sequence[CategoryProgress], now: float) -> str:
        durations_s = [r.duration_s for r in self._searcher.records() if r.state != "running" and r.epoch > 0]
        concurrency = self._searcher.max_concurrent or sum(c.expected for c in board)
        left_s = estimate_time_left_s(board, durations_s, concurrency, self._pace_s(now, sum(c.ended for c in board)))
        elapsed_s = now - (now if self._started_s is None else self._started_s)
        parts = [
            f"{sum(c.ended for c in board)}/{sum(c.expected for c in board)} {'trials' if self._ranked else 'runs'}",
            f"{sum(c.running for c in board) - self._waiting} running",
            # an autoscaling cluster may still be starting their nodes
            *([f"{self._waiting} waiting for resources"] if self._waiting else []),
            *([f"{sum(c.pruned for c in board)} pruned"] if self._ranked else []),
            f"{sum(c.failed for c in board)} failed",
            f"{sum(c.done for c in board)}/{len(board)} categories",
            f"{format_duration(elapsed_s)} elapsed",
        ]
        if left_s:
            parts.append(f"about {format_duration(left_s)} left")
        return ", ".join(parts)

    def _pace_s(self, now: float, ended: int) -> float | None:
        """Seconds a trial since the first that ended here; what came before it, the start of processes, comes once."""
        if self._first is None:
            if ended > self._earlier:
                self._first = now, ended
            return None
        since_s, before = self._first
        return (now - since_s) / (ended - before) if ended > before else None

    def _print(self, line: str) -> None:
        assert self._console is not None
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _is_news(record: logging.LogRecord) -> bool:
    """Tune ends with a list of the trials that failed or were interrupted, by ids that mean nothing to a person."""
    return not record.getMessage().startswith("Trials did not complete")


def _table(board: Sequence[CategoryProgress], rows: int, ranked: bool) -> Table:
    """The categories that run first, then those that ended, then those that wait; as many as fit."""
    table = Table()
    table.add_column("category")
    for name in ("ended", "running", "pruned", "failed", "best") if ranked else ("ended", "running", "failed"):
        table.add_column(name, justify="right")
    if ranked:
        table.add_column("with")
    ordered = sorted(board, key=lambda c: (c.running == 0, c.ended == 0))
    for c in ordered[:rows]:
        cells: list[str | Text] = [
            Text(c.category, style="green" if c.done else ""),
            f"{c.ended}/{c.expected}",
            str(c.running),
            *([str(c.pruned)] if ranked else []),
            Text(str(c.failed), style="red" if c.failed else ""),
        ]
        if ranked:
            cells += [
                "" if c.best is None else f"{c.best.objective:.4f}",
                "" if c.best is None else Text(format_params(c.best.params), overflow="ellipsis", no_wrap=True),
            ]
        table.add_row(*cells)
    if len(ordered) > rows:
        hidden = ordered[rows:]
        table.caption = f"and {len(hidden)} more categories, {sum(c.done for c in hidden)} of them done"
    return table
