"""The end of a sweep: per category the winner is chosen, measured against the registered champion, scored, registered.

Choosing and measuring see validation alone. The test split is opened for what is about to be registered, and for no
other configuration.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ssn.data.reader import SearchData, open_test_data
from ssn.errors import SSNError
from tuning.champions.category_result import CategoryResult, ChampionScore, describe_search, mean_scores
from tuning.champions.finalists import Selection
from tuning.champions.incumbent import (
    UNOPPOSED,
    Incumbent,
    Rescored,
    Verdict,
    compare_recorded,
    compare_rescored,
    favour_cheaper,
    images_to_leave_out,
    not_comparable,
    out_of_bounds,
    recorded_objective,
    rescore,
    yardstick,
)
from tuning.champions.score import score_champion
from tuning.execution.train_worker import Placement
from tuning.persistence.ledger import SweepLedger
from tuning.search.costs import trial_cost
from tuning.settings import SweepSettings
from tuning.tracking.protocol import count_scores

if TYPE_CHECKING:
    import ray
    from rich.console import Console

    from tuning.champions.registry import ChampionVersion
    from tuning.champions.winner import TrialRecord

T = TypeVar("T")

AT_ONCE = 16
"""Categories whose models are in the object store at the same time, waiting to be scored."""


@dataclass(frozen=True)
class _Candidate:
    """A category's winner, before the registered champion has been heard."""

    selection: Selection
    run_ids: tuple[str, ...]
    """Of the winner's runs, in order."""
    run_id: str
    """Of the one to register."""
    incumbent: Incumbent | None
    verdict: Verdict | None
    """None while both models are being scored."""
    pending: ray.ObjectRef | None = None


@dataclass(frozen=True)
class Crowning:
    """What it takes to choose, score and register the champions of a sweep."""

    settings: SweepSettings
    dataset: str
    data_uri: str
    data: Mapping[str, SearchData]
    placement: Placement
    ledger: SweepLedger
    """Whatever has been scored or registered before, by an earlier driver of the same sweep, is not again."""
    tracker: Any
    console: Console

    @property
    def sweep_id(self) -> str:
        return self.ledger.sweep_id

    def crown(
        self,
        trials: Mapping[str, Sequence[TrialRecord]],
        finalists: Mapping[str, Sequence[TrialRecord]],
        select: Callable[[str], Selection],
    ) -> list[CategoryResult]:
        """Do it for every category; several are scored at once.

        What goes wrong with one category does not cost the others their champions: its result says what.

        Args:
            trials: Of the search, by category.
            finalists: Further runs, by category.
            select: Chooses a category's winner.
        """
        runs = {
            (r.category, r.tags["trial_identity"]): r.run_id
            for r in self.tracker.find_runs(self.dataset, sweep_id=self.sweep_id)
            if r.parent_run_id is not None
        }
        names, results = list(self.data), []
        for start in range(0, len(names), AT_ONCE):
            group = names[start : start + AT_ONCE]
            candidates = {name: _outcome(self._nominate, name, select, runs) for name in group}
            judged = {name: _outcome(self._judge, name, candidates[name]) for name in group}
            scoring = {
                name: _outcome(self._start_scoring, name, candidates[name], judged[name], len(group)) for name in group
            }
            results += [
                self._conclude(
                    name, trials[name], finalists.get(name, ()), candidates[name], judged[name], scoring[name]
                )
                for name in group
            ]
        return results

    def _nominate(
        self, name: str, select: Callable[[str], Selection], runs: Mapping[tuple[str, str], str]
    ) -> _Candidate:
        """Choose a category's winner and, where the registered champion must be scored again, start that."""
        from tuning.champions.registry import find_incumbent, load_trial_model

        selection = select(name)
        winner = selection.winner
        run_ids = tuple(runs[name, run.trial_key] for run in winner.runs)
        run_id = runs[name, winner.median_run.trial_key]
        incumbent = find_incumbent(self.tracker.tracking_uri, self.dataset, name)

        def candidate(verdict: Verdict | None, pending: ray.ObjectRef | None = None) -> _Candidate:
            return _Candidate(selection, run_ids, run_id, incumbent, verdict, pending)

        if incumbent is None or incumbent.run_id in run_ids:
            return candidate(UNOPPOSED)
        excluded = out_of_bounds(name, incumbent, self.settings.objective)
        if excluded is not None:
            return candidate(excluded)
        fingerprint = self.data[name].info.search_fingerprint
        recorded = recorded_objective(incumbent, search_fingerprint=fingerprint, judged_by=self._yardstick())
        if recorded is not None:
            verdict = compare_recorded(name, incumbent, winner.mean, recorded)
            return candidate(self._weigh_costs(name, selection, verdict))
        try:
            champion = load_trial_model(incumbent.run_id, self.tracker.tracking_uri)
            left_out = images_to_leave_out(champion, data_changed=incumbent.search_fingerprint != fingerprint)
        except SSNError as error:
            return candidate(not_comparable(name, incumbent, str(error)))
        pending = self._remote(rescore, self.placement.cpus).remote(
            load_trial_model(run_id, self.tracker.tracking_uri),
            champion,
            self.data[name],
            left_out,
            self.settings.objective,
            self.settings.eval,
            self._device(),
            self.placement.cpus,
        )
        return candidate(None, pending)

    def _judge(self, name: str, candidate: _Candidate | str) -> Verdict:
        import ray

        if isinstance(candidate, str):
            raise SSNError(candidate)
        if candidate.verdict is not None:
            return candidate.verdict
        assert candidate.incumbent is not None
        assert candidate.pending is not None
        try:
            rescored = cast(Rescored, ray.get(candidate.pending))
        except SSNError as error:
            # what cannot be scored gives way; a scoring process that died says nothing of its model
            return not_comparable(name, candidate.incumbent, _message(error))
        verdict = compare_rescored(name, candidate.incumbent, rescored)
        return self._weigh_costs(name, candidate.selection, verdict)

    def _start_scoring(
        self, name: str, candidate: _Candidate | str, verdict: Verdict | str, categories: int
    ) -> list[ray.ObjectRef | ChampionScore]:
        """Score the winner's runs on test, as those of so many categories at once; none where the registered champion
        stays."""
        from tuning.champions.registry import load_trial_model

        if isinstance(candidate, str) or isinstance(verdict, str) or not verdict.promoted:
            return []
        test = open_test_data(self.data_uri, self.dataset, name)
        cpus = self._cpus(categories * len(candidate.run_ids))
        score = self._remote(score_champion, cpus)
        return [
            self.ledger.read_score(name, run.trial_key)
            or score.remote(
                load_trial_model(run_id, self.tracker.tracking_uri),
                test,
                self._device(),
                cpus,
                draw=run_id == candidate.run_id,
            )
            for run, run_id in zip(candidate.selection.winner.runs, candidate.run_ids, strict=True)
        ]

    def _conclude(
        self,
        name: str,
        trials: Sequence[TrialRecord],
        finalists: Sequence[TrialRecord],
        candidate: _Candidate | str,
        verdict: Verdict | str,
        scoring: list[ray.ObjectRef | ChampionScore] | str,
    ) -> CategoryResult:
        from tuning.champions.registry import ChampionVersion, tag_version

        def result(**found: Any) -> CategoryResult:
            return CategoryResult(category=name, trials=trials, finalists=finalists, **found)

        if isinstance(candidate, str) or isinstance(verdict, str):
            return result(failure=candidate if isinstance(candidate, str) else verdict)
        known = {"selection": candidate.selection, "verdict": verdict, "run_id": candidate.run_id}
        if not verdict.promoted:
            assert verdict.incumbent is not None
            stays = verdict.incumbent
            tag_version(
                self.tracker.tracking_uri,
                stays.name,
                stays.version,
                {"kept_by_sweep": self.sweep_id, "kept_because": verdict.reason},
            )
            return result(**known, champion=ChampionVersion(stays.name, stays.version, stays.run_id, created=False))
        if isinstance(scoring, str):
            return result(**known, failure=scoring)
        champion = self.ledger.read_champion(name)
        if champion is None:
            self.console.print(f"scoring and registering the champion of {name}", highlight=False, markup=False)
        scores = _outcome(self._wait_for_scores, name, candidate, scoring)
        if isinstance(scores, str):
            return result(**known, failure=scores)
        if champion is None:
            champion = self._register(name, candidate, verdict, scores, len(trials))
            self.ledger.write_champion(name, champion)
        return result(**known, scores=tuple(scores), champion=champion)

    def _wait_for_scores(
        self, name: str, candidate: _Candidate, scoring: Sequence[ray.ObjectRef | ChampionScore]
    ) -> list[ChampionScore]:
        import ray

        scores = []
        for run, pending in zip(candidate.selection.winner.runs, scoring, strict=True):
            score = pending if isinstance(pending, ChampionScore) else cast(ChampionScore, ray.get(pending))
            self.ledger.write_score(name, run.trial_key, score)
            scores.append(score)
        return scores

    def _register(
        self,
        category: str,
        candidate: _Candidate,
        verdict: Verdict,
        scores: Sequence[ChampionScore],
        num_trials: int,
    ) -> ChampionVersion:
        from tuning.champions.registry import Decision, promote

        info = self.data[category].info
        runs = self.tracker.find_runs(self.dataset, category=category)
        times = count_scores(runs, category=category, test_fingerprint=info.test_fingerprint, besides=candidate.run_ids)
        for run_id, score in zip(candidate.run_ids, scores, strict=True):
            times += 1
            self._log_score(run_id, score, times)
        winner, means = candidate.selection.winner, mean_scores(scores)
        measured = winner.median_run.metrics
        stds = {f"test_{name}_std": f"{std:.6g}" for name, (_, std) in means.items() if std is not None}
        return promote(
            candidate.run_id,
            self.tracker.tracking_uri,
            decision=Decision(
                validation_objective=winner.mean,
                num_trials=num_trials,
                test_metrics={name: mean for name, (mean, _) in means.items()},
                train_masks=int(measured.get("masks_used", 0)),
                train_weak_labels=int(measured.get("weak_labels_used", 0)),
                validation_labels=info.counts["validation"].defective,
                validation_masks=info.counts["validation"].masks,
                extra={
                    **self._yardstick(),
                    **({"latency_ms": f"{measured['latency_ms']:.6g}"} if "latency_ms" in measured else {}),
                    "searched": describe_search(self.settings),
                    **stds,
                    **({} if winner.std is None else {"validation_objective_std": f"{winner.std:.6g}"}),
                    "seeds": str(len(winner.runs)),
                    "finalists": "; ".join(finalist.describe() for finalist in candidate.selection.finalists),
                    "decision_rule": candidate.selection.rule,
                    "decision_against": verdict.reason or "no registered champion",
                    "test_split_scored_times": str(times),
                },
            ),
        )

    def _log_score(self, run_id: str, score: ChampionScore, times: int) -> None:
        with tempfile.TemporaryDirectory(prefix="cases-") as scratch:
            pictures = []
            if score.picture is not None:
                pictures.append(Path(scratch, "test_cases.png"))
                pictures[0].write_bytes(score.picture)
            self.tracker.log_summary(
                run_id,
                metrics={f"test_{name}": value for name, value in score.metrics.items()},
                tags={
                    "test_split_scored_times": str(times),
                    **{f"undefined_test_{name}": reason for name, reason in score.undefined.items()},
                },
                files=pictures,
                artifact_path="pictures",
            )

    def _weigh_costs(self, name: str, selection: Selection, verdict: Verdict) -> Verdict:
        objective = self.settings.objective
        cost = trial_cost(selection.winner.median_run.metrics, objective.against)
        return favour_cheaper(name, verdict, objective, cost)

    def _yardstick(self) -> dict[str, str]:
        return yardstick(self.settings.objective, self.settings.eval)

    def _device(self) -> str:
        return "cuda" if self.placement.use_gpu else "cpu"

    def _cpus(self, tasks: int) -> float:
        """Of each of so many tasks: a trial's, or more where there are more than they need, for no trial runs now."""
        import ray

        needed = {name: amount for name, amount in self.placement.per_worker.items() if amount > 0}
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        # a node without the GPU will hold none of them, however many CPUs it has
        nodes = [node["CPU"] for node in alive if all(node.get(name, 0.0) >= amount for name, amount in needed.items())]
        spare = sum(nodes) // tasks
        return max(self.placement.cpus, min(spare, *nodes)) if nodes else self.placement.cpus

    def _remote(self, function: Callable[..., Any], cpus: float) -> Any:
        """A Ray task with a trial's GPU."""
        import ray

        gpus = self.placement.gpus if self.placement.use_gpu else 0
        return ray.remote(function).options(num_cpus=cpus, num_gpus=gpus)


def _outcome(action: Callable[..., T], *args: Any) -> T | str:
    """What ``action`` returns, or why it could not, as one line."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return action(*args)
    except SSNError as error:
        return _message(error)
    except RayError as error:
        if isinstance(error, RayTaskError):
            raise
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return f"the process that scores its model died ({what}); --resume scores it again"


def _message(error: SSNError) -> str:
    """One that Ray brings back from a task carries the task's traceback; its cause is the error itself."""
    return str(getattr(error, "cause", error))
