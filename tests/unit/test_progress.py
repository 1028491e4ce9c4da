"""What a person sees of a sweep; no Ray runtime, no terminal, a clock that is set by hand."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ssn.config import Config, flatten
from tuning.execution.weights import weights_key
from tuning.reporting.progress import (
    CategoryProgress,
    ProgressCallback,
    estimate_time_left_s,
    format_duration,
    format_params,
    summarise,
)
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import FloatRange

EPOCHS = 9


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeTrial:
    """What the callback looks at of a Tune trial."""

    path = "s3://bucket/sweep/screw-000"
    trial_id = "a"
    pickled_error_file = None

    def __init__(self, suggestion: dict[str, Any], error_file: Path | None = None, status: str = "RUNNING") -> None:
        self.config = suggestion
        self.status = status
        self.error_file = None if error_file is None else str(error_file)
        self.last_result: dict[str, Any] = {}


def searcher(names: tuple[str, ...] = ("screw", "tile"), trials: int = 2) -> MultiplexSearcher:
    base = flatten(Config().resolved()) | {"train.epochs": EPOCHS}
    weights = {weights_key(Config().model): "weights"}
    space = {"synthesis.noise_sigma": FloatRange(1e-3, 0.3, log=True)}
    search = MultiplexSearcher(
        [CategorySearch(n, base, space, f"data of {n}", weights, 0) for n in names],
        sweep_id="sweep",
        trials_per_category=trials,
    )
    search.set_max_concurrency(2)
    return search


def finish(search: MultiplexSearcher, trial_id: str, epoch: int = EPOCHS, objective: float = 0.8) -> None:
    search.on_trial_complete(trial_id, {"epoch": epoch, "objective": objective, "duration_s": 10.0})


def callback(search: MultiplexSearcher, **console: Any) -> tuple[ProgressCallback, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    shown = ProgressCallback(search, console=Console(file=out, **({"width": 200} | console)), clock=clock)
    return shown, out, clock


def lines(out: io.StringIO) -> list[str]:
    text = out.getvalue().splitlines()
    out.seek(0)
    out.truncate()
    return text


def test_plain_lines_come_once_per_interval() -> None:
    search = searcher()
    shown, out, clock = callback(search)
    shown.setup()
    shown.on_step_end(1, [])
    assert lines(out) == ["0/4 trials, 0 running, 0 pruned, 0 failed, 0/2 categories, 0 s elapsed"]
    search.suggest("a")
    search.suggest("b")
    clock.now_s += 29
    shown.on_step_end(2, [])
    assert lines(out) == []
    clock.now_s += 1
    finish(search, "a")
    shown.on_step_end(3, [])
    # One ended after 10 s; two wait and one is half done, two at a time.
    assert lines(out) == [
        "1/4 trials, 1 running, 0 pruned, 0 failed, 0/2 categories, 30 s elapsed, about 12 s left",
    ]


def test_trials_whose_node_is_not_there_yet_do_not_run() -> None:
    search, out, clock = searcher(), io.StringIO(), Clock()
    shown: Any = ProgressCallback(search, console=Console(file=out, width=200), clock=clock)
    shown.setup()
    first, second = search.suggest("a"), search.suggest("b")
    shown.on_step_end(1, [FakeTrial(first), FakeTrial(second, status="PENDING")])
    assert "0/4 trials, 1 running, 1 waiting for resources, 0 pruned" in out.getvalue()


def test_end_of_a_category_is_announced_once() -> None:
    search = searcher()
    shown, out, _ = callback(search)
    shown.setup()
    suggestions = {t: search.suggest(t) for t in ("a", "b")}
    finish(search, "a")
    shown.on_trial_complete(1, [], FakeTrial(suggestions["a"]))
    assert lines(out) == []
    suggestions["c"] = search.suggest("c")
    finish(search, "c", epoch=3, objective=0.3)
    shown.on_trial_complete(2, [], FakeTrial(suggestions["c"]))
    expected = "screw: 2 trials ended (1 complete, 1 pruned, 0 failed), best 0.8000 with noise_sigma 0.015"
    assert lines(out) == [expected]
    shown.on_trial_complete(2, [], FakeTrial(suggestions["c"]))
    assert lines(out) == []


def test_category_without_a_winner_says_so(tmp_path: Path) -> None:
    search = searcher(("screw",), trials=1)
    shown, out, _ = callback(search)
    shown.setup()
    suggestion = search.suggest("a")
    error = tmp_path / "error.txt"
    error.write_text("Failure # 1 (occurred at noon)\nTraceback\n  line\nRuntimeError: [bold] no GPU\n\n")
    search.on_trial_complete("a", error=True)
    shown.on_trial_error(1, [], FakeTrial(suggestion, error))
    assert lines(out) == [
        "screw: trial 0 failed: RuntimeError: [bold] no GPU; see s3://bucket/sweep/screw-000/error.txt",
        "screw: 1 trials ended (0 complete, 0 pruned, 1 failed), no winner",
    ]
    assert search.records()[0].failure == "RuntimeError: [bold] no GPU"


def test_trial_that_gave_up_says_why() -> None:
    search = searcher(("screw",), trials=1)
    shown, out, _ = callback(search)
    shown.setup()
    trial: Any = FakeTrial(search.suggest("a"))
    trial.last_result = {"failure": "the training loss became nan"}
    search.on_trial_complete("a", trial.last_result)
    shown.on_trial_complete(1, [], trial)
    assert lines(out) == [
        "screw: trial 0 failed: the training loss became nan",
        "screw: 1 trials ended (0 complete, 0 pruned, 1 failed), no winner",
    ]


def test_last_line_comes_at_the_end_whatever_the_interval() -> None:
    search = searcher(("screw",), trials=1)
    shown, out, clock = callback(search)
    shown.setup()
    shown.on_step_end(1, [])
    lines(out)
    search.suggest("a")
    finish(search, "a")
    clock.now_s += 5
    shown.on_experiment_end([])
    assert lines(out) == ["1/1 trials, 0 running, 0 pruned, 0 failed, 1/1 categories, 5 s elapsed"]


def test_resumed_sweep_does_not_announce_what_ended_before() -> None:
    search = searcher(("screw", "tile"), trials=1)
    suggestion = search.suggest("a")
    finish(search, "a")
    search.suggest("b")
    shown, out, _ = callback(search)
    shown.setup()
    shown.on_trial_complete(1, [], FakeTrial(suggestion))
    assert lines(out) == []


def test_terminal_shows_a_table() -> None:
    search = searcher()
    shown, out, clock = callback(search, force_terminal=True, height=40)
    shown.setup()
    search.suggest("a")
    search.suggest("b")
    finish(search, "a")
    shown.on_step_end(1, [])
    clock.now_s += 0.1
    shown.on_step_end(2, [])
    shown.on_experiment_end([])
    text = out.getvalue()
    assert "screw" in text
    assert "0.8000" in text
    assert "noise_sigma 0.015" in text
    assert "about 12 s left" in text
    assert text.endswith("\x1b[?25h"), "the cursor is given back"


def test_table_is_cut_to_the_terminal() -> None:
    search = searcher(tuple(f"category{i:02d}" for i in range(50)), trials=1)
    search.set_max_concurrency(60)
    for i in range(20):
        search.suggest(f"t{i}")
    for i in range(19):
        finish(search, f"t{i}")
    shown, out, _ = callback(search, force_terminal=True, height=20)
    shown.setup()
    shown.on_step_end(1, [])
    text = out.getvalue()
    shown.on_experiment_end([])
    assert "category19" in text, "what runs comes first"
    assert "category00" in text
    assert "category49" not in text
    assert "and 38 more categories, 8 of them done" in text


def test_callback_can_be_pickled_with_its_searcher_at_any_time() -> None:
    search = searcher()
    shown, _, _ = callback(search, force_terminal=True)
    shown.setup()
    copy, copied = pickle.loads(pickle.dumps((shown, search)))
    shown.on_experiment_end([])
    assert copy._searcher is copied
    assert copy._live is None


def test_summary_counts_states() -> None:
    search = searcher(("screw",), trials=5)
    search.set_max_concurrency(9)
    for t in "abcde":
        search.suggest(t)
    finish(search, "a", objective=0.5)
    finish(search, "b", objective=0.6)
    finish(search, "c", epoch=3, objective=0.9)
    search.on_trial_complete("d", error=True)
    progress = summarise("screw", 5, search.records("screw"))
    assert (progress.complete, progress.pruned, progress.failed, progress.running) == (2, 1, 1, 1)
    assert (progress.ended, progress.done) == (4, False)
    assert progress.best is not None
    assert progress.best.objective == 0.6


def progress(expected: int, running: int, complete: int) -> CategoryProgress:
    return CategoryProgress("screw", expected, running, complete, 0, 0, None)


@pytest.mark.parametrize(
    ("board", "durations_s", "concurrency", "expected"),
    [
        ([progress(4, 0, 0)], [], 2, None),
        ([progress(4, 0, 1)], [10.0], 1, 30.0),
        ([progress(5, 2, 1)], [10.0], 2, 15.0),
        ([progress(4, 1, 3)], [10.0, 20.0], 8, 7.5),
        ([progress(4, 0, 4)], [10.0], 2, 0.0),
        ([progress(3, 0, 1), progress(3, 0, 1)], [10.0], 4, 10.0),
    ],
)
def test_time_left(
    board: list[CategoryProgress], durations_s: list[float], concurrency: int, expected: float | None
) -> None:
    assert estimate_time_left_s(board, durations_s, concurrency) == expected


def test_time_between_trials_counts_too() -> None:
    board = [progress(10, 0, 4)]
    assert estimate_time_left_s(board, [1.0], 2, pace_s=5.0) == 30.0
    assert estimate_time_left_s(board, [20.0], 2, pace_s=5.0) == 60.0


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5940, "99 min"), (11100, "3 h 05 min")]
)
def test_format_duration(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


def test_format_params() -> None:
    params = {"synthesis.noise_sigma": 0.0123456, "train.supervision_ratio": 1.0, "model.variant": "jims"}
    assert format_params(params) == "noise_sigma 0.0123, supervision_ratio 1, variant jims"
