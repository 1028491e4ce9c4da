"""Which trials become finalists, which finalist wins, and which of its runs stands for it. No Ray."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from ssn.config import Config, flatten
from ssn.errors import SSNError
from tuning.champions.finalists import Finalist, FinalistRun, plan_finalists, select_finalist
from tuning.champions.winner import TrialRecord, rank_trials
from tuning.search.fixed_runs import FixedRuns
from tuning.settings import FinalistSettings
from tuning.tracking.protocol import FINALIST_STAGE

EPOCHS = 3
BASE = flatten(Config()) | {"train.epochs": EPOCHS, "train.train_seed": 5}


def trial(index: int, objective: float | None, state: str = "complete", **metrics: float) -> TrialRecord:
    return TrialRecord(
        trial_id=f"t{index}",
        trial_key=f"k{index}",
        category="screw",
        index=index,
        number=index,
        max_epochs=EPOCHS,
        config=BASE | {"synthesis.noise_sigma": 0.01 * (index + 1)},
        params={"synthesis.noise_sigma": 0.01 * (index + 1)},
        state=state,  # type: ignore[arg-type]
        epoch=EPOCHS,
        objectives={} if objective is None else {1: 0.99, EPOCHS: objective},
        metrics={"objective": objective, **metrics},
    )


def plan(trials: list[TrialRecord], count: int = 3, seeds: int = 3) -> list[FinalistRun]:
    return plan_finalists(
        rank_trials(trials),
        FinalistSettings(count=count, seeds=seeds),
        lambda config: f"{config['synthesis.noise_sigma']:.2f}/{config['train.train_seed']}",
    )


def records(planned: list[FinalistRun], outcomes: dict[int, list[float | str]]) -> list[TrialRecord]:
    """Runs as :class:`FixedRuns` records them: by trial, an objective per repetition, or why it failed."""
    runs = FixedRuns(planned, stage=FINALIST_STAGE, label=lambda run: run.label, tags=FinalistRun.tags)
    for at, run in enumerate(planned):
        assert runs.suggest(f"f{at}") is not None
        outcome = outcomes[run.trial_index][run.repetition - 1]
        if isinstance(outcome, str):
            runs.note_failure(f"f{at}", outcome)
            runs.on_trial_complete(f"f{at}", None, error=True)
        else:
            runs.on_trial_complete(f"f{at}", {"epoch": EPOCHS, "objective": outcome, "val_image_ap": 0.5})
    assert runs.done
    return runs.records()


def test_runs_go_on_from_a_ledger() -> None:
    planned = plan([trial(0, 0.5), trial(1, 0.9)], count=2, seeds=3)

    def fixed(earlier: Sequence[TrialRecord] = ()) -> FixedRuns[FinalistRun]:
        return FixedRuns(
            planned, stage=FINALIST_STAGE, label=lambda run: run.label, tags=FinalistRun.tags, earlier=earlier
        )

    first = fixed()
    for at in range(3):
        first.suggest(f"f{at}")
    first.on_trial_complete("f0", {"epoch": EPOCHS, "objective": 0.8})
    first.record("f1").checkpoint = "/checkpoint"
    foreign = dataclasses.replace(first.record("f0"), index=3, trial_key="of another plan")
    second = fixed([first.record("f0"), first.record("f1"), foreign, trial(2, 0.9)])
    suggested = [second.suggest(f"g{at}") for at in range(4)]
    assert suggested[3] == "FINISHED"
    assert [s["index"] for s in suggested[:3]] == [1, 2, 3]  # type: ignore[index]
    assert [s.get("resume_from") for s in suggested[:3]] == ["/checkpoint", None, None]  # type: ignore[union-attr]
    for at in range(3):
        second.on_trial_complete(f"g{at}", {"epoch": EPOCHS, "objective": 0.7})
    assert second.done
    assert {(r.index, r.objective) for r in second.records()} == {(0, 0.8), (1, 0.7), (2, 0.7), (3, 0.7)}
    assert {r.stage for r in second.records()} == {FINALIST_STAGE}
    assert fixed(second.records()).done


def test_best_complete_trials_are_repeated_with_the_seeds_that_follow() -> None:
    trials = [trial(0, 0.5), trial(1, 0.9), trial(2, 0.95, "pruned"), trial(3, 0.7), trial(4, 0.6)]
    planned = plan(trials, count=2, seeds=3)
    assert [(run.trial_index, run.repetition) for run in planned] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert [run.index for run in planned] == [0, 1, 2, 3]
    for run in planned:
        changed = {key for key in BASE if run.config[key] != trials[run.trial_index].config[key]}
        assert changed == {"train.train_seed", "train.label_seed"}
        assert (run.config["train.train_seed"], run.config["train.label_seed"]) == (5 + run.repetition, run.repetition)
    assert planned[0].identity == "0.02/6"
    assert planned[0].tags() == {"finalist_of": "1", "repetition": "1"}


@pytest.mark.parametrize(("count", "seeds"), [(1, 3), (3, 1)])
def test_one_finalist_or_one_seed_costs_nothing_more(count: int, seeds: int) -> None:
    trials = [trial(0, 0.5), trial(1, 0.9)]
    assert plan(trials, count=count, seeds=seeds) == []
    chosen = select_finalist(trials, [], [])
    assert chosen.winner.runs == (trials[1],)
    assert (chosen.winner.mean, chosen.winner.std) == (0.9, None)
    assert chosen.winner.median_run is trials[1]


def test_highest_mean_wins_whatever_the_search_said() -> None:
    trials = [trial(0, 0.80), trial(1, 0.90), trial(2, 0.1)]
    planned = plan(trials, count=2)
    chosen = select_finalist(trials, planned, records(planned, {0: [0.82, 0.84], 1: [0.60, 0.70]}))
    assert chosen.winner.trial.index == 0
    assert chosen.winner.objectives == (0.80, 0.82, 0.84)
    assert chosen.winner.mean == pytest.approx(0.82)
    assert chosen.winner.std == pytest.approx(0.02)
    assert chosen.winner.median_run.config["train.train_seed"] == 6
    assert chosen.winner.median_run.params == trials[0].params
    assert [finalist.trial.index for finalist in chosen.finalists] == [0, 1]
    assert chosen.winner.describe() == "trial 0: 0.820 ± 0.020 (n=3)"
    assert chosen.notices == ()


def test_ties_in_the_mean_go_to_image_ap() -> None:
    trials = [trial(0, 0.8, val_image_ap=0.6), trial(1, 0.8, val_image_ap=0.9)]
    planned = plan(trials)
    same = records(planned, {0: [0.8, 0.8], 1: [0.8, 0.8]})
    assert select_finalist(trials, planned, same).winner.trial.index == 1
    trials[1].metrics["val_image_ap"] = 0.6
    assert select_finalist(trials, planned, same).winner.trial.index == 0, "a full tie: the earlier trial"


@pytest.mark.parametrize(
    ("objectives", "median"),
    [((0.5,), 0), ((0.9, 0.1, 0.5), 2), ((0.9, 0.1), 1), ((0.4, 0.1, 0.3, 0.2), 3), ((0.5, 0.5, 0.5), 1)],
)
def test_median_run_is_the_lower_middle_one(objectives: tuple[float, ...], median: int) -> None:
    runs = tuple(trial(at, objective) for at, objective in enumerate(objectives))
    assert Finalist(runs[0], runs).median_run.index == median


def test_finalist_with_a_failed_run_is_out() -> None:
    trials = [trial(0, 0.80), trial(1, 0.90)]
    planned = plan(trials)
    chosen = select_finalist(trials, planned, records(planned, {0: [0.7, 0.7], 1: [0.95, "the loss became nan"]}))
    assert chosen.winner.trial.index == 0
    assert chosen.finalists[-1].failures == ("trial 1, seed 7: the loss became nan",)
    assert chosen.notices == (
        "screw: finalist trial 1 is out, because 1 of its runs failed: trial 1, seed 7: the loss became nan",
    )
    told = json.loads(json.dumps(chosen.as_dict()))
    assert [finalist["n"] for finalist in told["finalists"]] == [3, 2]
    assert told["winner_trial"] == 0


def test_search_decides_where_every_finalist_failed() -> None:
    trials = [trial(0, 0.80), trial(1, 0.90)]
    planned = plan(trials)
    chosen = select_finalist(trials, planned, records(planned, {0: ["boom", 0.7], 1: [math.nan, 0.95]}))
    assert (chosen.winner.trial.index, len(chosen.winner.runs)) == (1, 1)
    assert chosen.notices == (
        "screw: every finalist had a run that failed (trial 1, seed 6: its objective was nan at epoch 3), so the "
        "search's own runs decide",
    )


def test_run_that_never_finished_is_a_failure() -> None:
    trials = [trial(0, 0.80), trial(1, 0.70)]
    planned = plan(trials)
    done = records(planned, {0: [0.8, 0.8], 1: [0.7, 0.7]})
    chosen = select_finalist(trials, planned, [record for record in done if record.index != 1])
    assert chosen.winner.trial.index == 1
    assert chosen.finalists[1].failures == ("trial 0, seed 7: it did not finish",)


def test_no_complete_trial_has_no_finalist() -> None:
    trials = [trial(0, 0.9, "pruned")]
    assert plan(trials) == []
    with pytest.raises(SSNError, match="screw: no winner"):
        select_finalist(trials, [], [])


def test_means_are_of_what_every_run_reported() -> None:
    first, second = trial(0, 0.8, val_loss=1.0), trial(0, 0.9, val_loss=3.0, val_aupro=0.5)
    first.metrics["hostname"] = second.metrics["hostname"] = "here"
    means: dict[str, Any] = Finalist(first, (first, second)).mean_metrics()
    assert means == {"objective": pytest.approx(0.85), "val_loss": 2.0}


def test_finalists_that_a_budget_ends_are_out_and_the_search_decides() -> None:
    trials = [trial(0, 0.5), trial(1, 0.7)]
    planned = plan(trials, count=2, seeds=2)
    runs = FixedRuns(planned, stage=FINALIST_STAGE, label=lambda run: run.label, tags=FinalistRun.tags)
    assert isinstance(runs.suggest("a"), dict)
    runs.on_trial_result("a", {"epoch": 1})
    assert not runs.done
    runs.end("search.time_budget=2h ended the finalists' further runs")
    assert runs.done
    assert [r.state for r in runs.records()] == ["stopped"]
    found = select_finalist(trials, planned, runs.records())
    assert found.winner.trial.index == 1
    assert "search.time_budget=2h ended the finalists' further runs, after 1 of its" in found.notices[0]
