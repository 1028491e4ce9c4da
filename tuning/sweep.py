"""The sweep: every category searched in one Ray Tune run, its champion chosen on validation, scored, registered.

The search is given ``SearchData`` alone. Test data is opened after it has ended, for the winners only.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ssn.config import ModelConfig, flatten
from ssn.data.reader import SearchData, list_categories, open_search_data, open_test_data
from ssn.data.sampling import attainable_ratios
from ssn.data.storage import join_uri
from ssn.errors import SSNError
from tuning.capacity import check_fits, cluster_capacity, use_gpu
from tuning.interrupt import StopFlag, terminate_as_interrupt
from tuning.ledger import STUDIES_FILE, SweepLedger
from tuning.objective import TrialContext, check_objective, check_protocol
from tuning.report import Leaderboard
from tuning.resume import check_unchanged, close_runs, describe_sweep, read_earlier, resume_command
from tuning.scheduler import rung_epochs
from tuning.settings import SweepSettings
from tuning.space import resolve_space
from tuning.sweep_lock import SweepLock
from tuning.sweep_result import CategoryResult, ChampionScore, SweepResult, leaderboard_row, parent_summary
from tuning.tracking.protocol import count_scores
from tuning.train_worker import Placement, weights_key
from tuning.tune_run import open_storage, run_tune

if TYPE_CHECKING:
    from rich.console import Console

    from ssn.checkpoint import Checkpoint
    from ssn.data.reader import TestData
    from tuning.benchmark_plan import BenchmarkSettings
    from tuning.champions import ChampionVersion
    from tuning.resume import ResumedSweep
    from tuning.search import MultiplexSearcher
    from tuning.study_database import StudyDatabase
    from tuning.tracking.protocol import Sweep
    from tuning.winner import TrialRecord

T = TypeVar("T")

RAY_FOLDER = "ray"
"""Where Ray keeps checkpoints and its own state, below the sweep's folder."""

# Ray and Tune talk a lot by default, and each line would break the live view. Read when ray or Tune is imported.
_RAY_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see tuning.interrupt
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Tune's own record of a run, which grows with every trial and which nobody reads: at the end, and not meanwhile
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
}


def sweep(
    settings: SweepSettings,
    *,
    dataset: str,
    data_uri: str,
    categories: Sequence[str] | None,
    tracking_uri: str,
    out: Path | str,
    console: Console | None = None,
    resumed: ResumedSweep | None = None,
) -> SweepResult:
    """Search every category and register its champion.

    Args:
        settings: What to search, how to judge, how to place trials.
        dataset: Name under which the data was ingested.
        data_uri: Where.
        categories: None: all that are there.
        tracking_uri: MLflow server or database.
        out: Folder or object-store URI for the sweep's ledger and checkpoints.
        console: For notices; None: standard error.
        resumed: A sweep to go on with, whose settings, data and tracker the others are.

    Raises:
        SSNError: the data, the tracker, the cluster or the settings cannot serve; said before anything starts. Also if
            no category has a champion at the end.
        KeyboardInterrupt: after an interrupt, with every run closed.
    """
    import optuna

    from tuning.tracking import MLflowTracker
    from tuning.tracking.environment import environment_tags

    started_s = time.monotonic()
    console = console or open_stderr()
    notify = functools.partial(console.print, highlight=False, markup=False)
    data = open_categories(data_uri, dataset, categories)
    for search_data in data.values():
        check_protocol(search_data.info)
        check_objective(settings.objective, search_data.info)
    data_uri = data_uri if "://" in data_uri else str(Path(data_uri).absolute())
    check_lasting(out, tracking_uri)
    tracker = MLflowTracker(tracking_uri)
    tracker.check()
    if resumed is not None:
        resumed.check_tracker(tracker)

    sweep_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    ledger = SweepLedger.open(out, sweep_id) if resumed is None else resumed.ledger
    with contextlib.ExitStack() as held:
        lock = SweepLock(ledger.files, ledger.sweep_id, notify=notify)
        if resumed is not None:
            held.enter_context(lock)  # before Ray takes its seconds
        connect_ray()
        placement = place(settings)
        # the digest is part of every trial's identity; a hub that cannot be reached is found out before a trial starts
        weights_digest = load_weights_digest(settings.model)
        run = _Run(
            settings=settings,
            dataset=dataset,
            data_uri=data_uri,
            data=data,
            weights_digest=weights_digest,
            placement=placement,
            out=out,
            ledger=ledger,
            tags=environment_tags(),
        )
        if resumed is None:
            held.enter_context(lock)
            ledger.create(run.describe(tracker.tracking_uri))
            earlier: list[TrialRecord] = []
        else:
            for line in check_unchanged(ledger.sweep_id, resumed.description, run.describe(tracker.tracking_uri)):
                notify(f"note: {line}")
            earlier = read_earlier(ledger, retry_failed=resumed.retry_failed)
            for path in ledger.files.damaged:
                notify(f"note: {path} is damaged or of another version; its trial is done again")
            states = [record.state for record in earlier]
            notify(
                f"going on with sweep {ledger.sweep_id}: {len(states) - states.count('running')} trials have ended, "
                f"{states.count('running')} were cut short"
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with terminate_as_interrupt():
            leaderboard, results = run.execute(earlier, tracker, console)
    failures = [
        result.failure if result.failure.startswith(result.category) else f"{result.category}: {result.failure}"
        for result in results
        if result.failure
    ]
    if len(failures) == len(results):
        raise SSNError(failures[0])
    for failure in failures:
        console.print(f"warning: {failure}", highlight=False, markup=False)
    return SweepResult(leaderboard, results, time.monotonic() - started_s)


def open_categories(data_uri: str, dataset: str, categories: Sequence[str] | None) -> dict[str, SearchData]:
    """Search data of the chosen categories, or of all.

    Raises:
        SSNError: nothing was ingested there, or a category is unknown.
    """
    there = list_categories(data_uri, dataset)
    if not there:
        raise SSNError(
            f"no category of {dataset} at {data_uri}; ingest it first (ssn ingest {dataset} --out {data_uri})"
        )
    for name in categories or ():
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(there)}"
            raise SSNError(f"{dataset} at {data_uri} has no category {name!r}{hint}")
    return {name: open_search_data(data_uri, dataset, name) for name in dict.fromkeys(categories or there)}


def check_lasting(out: Path | str, tracking_uri: str) -> None:
    """Refuse to keep a sweep where it would be lost: a Ray job's working directory goes with the job.

    Raises:
        SSNError: saying which option to give.
    """
    from tuning.tracking.mlflow_tracker import sqlite_path

    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # set for a submitted job's driver
        return
    if "://" not in str(out) and not Path(out).is_absolute():
        raise SSNError(
            f"--out {out} lies in the Ray job's working directory, which is deleted with the job and which other nodes "
            "do not see; give an s3:// URI, or the absolute path of a folder that all nodes share"
        )
    database = sqlite_path(tracking_uri)
    if database is not None and database.is_relative_to(Path.cwd()):
        raise SSNError(
            f"MLflow's database {database} lies in the Ray job's working directory, which is deleted with the job; "
            "give --tracking-uri http://host:port, or set MLFLOW_TRACKING_URI where the cluster is started"
        )


def connect_ray() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, as a submitted job does, or start one on this machine.

    Raises:
        SSNError: the cluster cannot be joined, or the machine is too busy to start one.
    """
    for key, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if "RAY_ADDRESS" not in os.environ:
        # a cluster on the loopback interface; unset, ray would make a token file that later clusters then insist on
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")  # never a stranger's cluster that happens to run here
        if address == "local":
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # ray raises nothing narrower
                if "timed out during startup" not in str(error):
                    raise
                raise SSNError("Ray did not start in time on this machine: it is too busy; end other work") from error
        else:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise SSNError(f"cannot join the Ray cluster at RAY_ADDRESS={address}: {reason}") from error


def place(settings: SweepSettings | BenchmarkSettings) -> Placement:
    """Decide where trials run, and refuse at once what the cluster can never hold.

    Raises:
        SSNError: see :func:`tuning.capacity.check_fits`; also more than one worker per trial.
    """
    capacity = cluster_capacity()
    wanted = settings.resources
    gpu = use_gpu(wanted.use_gpu, capacity)
    num_workers = (1 if gpu else 0) if wanted.num_workers is None else wanted.num_workers
    placement = Placement(
        num_workers=num_workers,
        use_gpu=gpu,
        cpus=wanted.cpus_per_worker,
        gpus=wanted.gpus_per_worker if gpu else 0.0,
    )
    check_fits(capacity, num_workers=num_workers, per_worker=placement.per_worker)
    if num_workers > 1:
        raise SSNError(
            f"resources.num_workers is {num_workers}, but a trial trains on one worker in this release; use 0 or 1"
        )
    return placement


@dataclass(frozen=True)
class _Run:
    """One sweep, from its searcher to its champions."""

    settings: SweepSettings
    dataset: str
    data_uri: str
    data: Mapping[str, SearchData]
    weights_digest: str
    placement: Placement
    out: Path | str
    ledger: SweepLedger
    tags: Mapping[str, str]
    """Of the environment."""

    @property
    def sweep_id(self) -> str:
        return self.ledger.sweep_id

    def describe(self, tracking_uri: str) -> dict[str, Any]:
        code = {key: self.tags[key] for key in ("git_commit", "code_digest") if key in self.tags}
        return describe_sweep(
            self.settings,
            dataset=self.dataset,
            data_uri=self.data_uri,
            data=self.data,
            tracking_uri=tracking_uri,
            weights_digest=self.weights_digest,
            code=code | {key: value for key, value in self.tags.items() if key.startswith("version_")},
        )

    @property
    def rungs(self) -> tuple[int, ...]:
        search = self.settings.search
        return rung_epochs(self.settings.train.epochs, self.settings.grace_epochs(), search.eta)

    def searcher(
        self, earlier: Sequence[TrialRecord], database: StudyDatabase | None
    ) -> tuple[MultiplexSearcher, list[str]]:
        from tuning.search import CategorySearch, MultiplexSearcher

        base, space, notices = flatten(self.settings.config().resolved()), self.settings.space(), []
        searches = []
        for name, data in self.data.items():
            pool = data.info.counts["pool"]
            axes, found = resolve_space(
                space,
                category=name,
                base=base,
                attainable=attainable_ratios(pool.masks),
                num_defective=pool.defective,
            )
            notices += found
            searches.append(
                CategorySearch(
                    category=name,
                    base=base,
                    space=axes,
                    search_fingerprint=data.info.search_fingerprint,
                    weights_digest=self.weights_digest,
                    split_seed=data.info.split_seed,
                )
            )
        searcher = MultiplexSearcher(
            searches,
            sweep_id=self.sweep_id,
            trials_per_category=self.settings.search.trials,
            search_seed=self.settings.search.seed,
            earlier=earlier,
            database=database,
        )
        return searcher, notices

    def open_database(self, notify: Callable[[str], None]) -> StudyDatabase | None:
        """Where the studies are shown; None: nowhere."""
        from tuning.study_database import StudyDatabase

        url = self.settings.search.storage
        if url is None and self.ledger.files.is_local:
            url = f"sqlite:///{self.ledger.files.path(STUDIES_FILE)}"
        return None if url is None else StudyDatabase(url, notify=notify)

    def execute(
        self, earlier: Sequence[TrialRecord], tracker: Any, console: Console
    ) -> tuple[Leaderboard, list[CategoryResult]]:
        """Search, crown and report; however it ends, no run is left open.

        Args:
            earlier: Trials that there are already.
            tracker: Where runs go.
            console: For notices.
        """
        notify = functools.partial(console.print, highlight=False, markup=False)
        from tuning.study_database import INTERRUPT_TIMEOUT_S

        database = self.open_database(notify)
        searcher, notices = self.searcher(earlier, database)
        for notice in notices:
            notify(f"note: {notice}")
        sweep_tags = self.tracked(tracker)
        status = "FAILED"
        try:
            for line in close_runs(tracker, sweep_tags, self.ledger, earlier, open_storage(self.out)[1]):
                notify(f"warning: {line}")
            if not searcher.done:
                self.search(searcher, tracker, sweep_tags)
            if not searcher.done:
                raise KeyboardInterrupt
            if database is not None:
                database.close()
                database = None
            results = self.crown(searcher, tracker, sweep_tags, console)
            leaderboard = _leaderboard(self, results, [*notices, *searcher.notices], tracker.tracking_uri)
            self.log_leaderboard(tracker, sweep_tags, leaderboard, results)
            status = "FINISHED" if any(result.champion for result in results) else "FAILED"
        except KeyboardInterrupt:
            status = "KILLED"
            num_ended = sum(record.state != "running" for record in searcher.records())
            notify(f"interrupted; {num_ended} trials have ended, and none of them is lost")
            notify(f"to go on: {resume_command(self.sweep_id, self.out)}")
            raise
        except Exception:
            notify(f"the sweep broke off; to go on, once that is mended: {resume_command(self.sweep_id, self.out)}")
            raise
        finally:
            if database is not None:
                database.close(INTERRUPT_TIMEOUT_S)
            tracker.finish_sweep(sweep_tags, status)
        return leaderboard, results

    def tracked(self, tracker: Any) -> Sweep:
        from tuning.tracking import Sweep

        described = Sweep(
            sweep_id=self.sweep_id,
            dataset=self.dataset,
            categories={
                name: {
                    "search_fingerprint": data.info.search_fingerprint,
                    "test_fingerprint": data.info.test_fingerprint,
                    "split_seed": str(data.info.split_seed),
                    "backbone": self.settings.model.backbone,
                    "backbone_digest": self.weights_digest,
                    "data_uri": self.data_uri,
                }
                for name, data in self.data.items()
            },
            tags=self.tags,
        )
        tracker.start_sweep(described)
        return described

    def search(self, searcher: MultiplexSearcher, tracker: Any, sweep_tags: Sweep) -> None:
        """Run Tune to the end, or until it is interrupted."""
        from tuning.ledger_callback import LedgerCallback
        from tuning.progress import ProgressCallback
        from tuning.scheduler import MultiplexScheduler

        settings, stop = self.settings, StopFlag()
        storage = open_storage(join_uri(self.ledger.files.root_uri, RAY_FOLDER))
        scheduler = MultiplexScheduler(
            max_epochs=settings.train.epochs,
            grace=settings.grace_epochs(),
            eta=settings.search.eta,
            history=searcher,
        )
        scheduler.enter_earlier(searcher.records())
        run_tune(
            searcher,
            scheduler,
            [
                ProgressCallback(searcher),
                LedgerCallback(
                    tracker, sweep_tags, ledger=self.ledger, keeper=searcher, filesystem=storage[1], stop=stop
                ),
            ],
            {
                name: TrialContext(data=data, objective=settings.objective, rung_epochs=self.rungs)
                for name, data in self.data.items()
            },
            name=f"{self.sweep_id}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
            data_uri=self.data_uri,
            weights_digests={weights_key(settings.model): self.weights_digest},
            placement=self.placement,
            storage=storage,
            concurrency=settings.search.max_concurrent,
            stop=stop,
            num_to_keep=None,  # the ledger's callback removes them
        )

    def crown(
        self, searcher: MultiplexSearcher, tracker: Any, sweep_tags: Sweep, console: Console
    ) -> list[CategoryResult]:
        """Choose, score and register each category's champion; several are scored at once."""
        import ray

        from tuning.champions import load_trial_model
        from tuning.winner import select_winner

        runs = {
            (r.category, r.tags.get("trial_identity")): r.run_id
            for r in tracker.find_runs(self.dataset, sweep_id=self.sweep_id)
        }
        device = "cuda" if self.placement.use_gpu else "cpu"
        score = ray.remote(score_champion).options(
            num_cpus=self.placement.cpus, num_gpus=self.placement.gpus if self.placement.use_gpu else 0
        )

        def start(name: str) -> tuple[TrialRecord, str, ray.ObjectRef | ChampionScore]:
            winner = select_winner(searcher.records(name))
            run_id = runs[name, winner.trial_key]
            known = self.ledger.read_score(name, winner.trial_key)
            if known is not None:
                return winner, run_id, known
            model = load_trial_model(run_id, tracker.tracking_uri)
            test = open_test_data(self.data_uri, self.dataset, name)
            return winner, run_id, score.remote(model, test, device, self.placement.cpus)

        # what goes wrong with one category must not cost the others their champions
        started = {name: _outcome(start, name) for name in self.data}
        results = []
        for name, outcome in started.items():
            trials = searcher.records(name)
            default = next((t for t in trials if t.index == 0), None)
            if isinstance(outcome, str):
                results.append(CategoryResult(name, None, default, trials, None, None, None, outcome))
                continue
            winner, run_id, pending = outcome
            if isinstance(pending, ChampionScore):
                scored: ChampionScore | str = pending
            else:
                console.print(f"scoring and registering the champion of {name}", highlight=False, markup=False)
                scored = _outcome(lambda ref: cast(ChampionScore, ray.get(ref)), pending)
            if isinstance(scored, str):
                results.append(CategoryResult(name, winner, default, trials, None, None, run_id, scored))
                continue
            self.ledger.write_score(name, winner.trial_key, scored)
            champion = self.ledger.read_champion(name)
            if champion is None:
                champion = self._register(tracker, name, winner, run_id, scored, len(trials))
                self.ledger.write_champion(name, champion)
            results.append(CategoryResult(name, winner, default, trials, scored, champion, run_id))
        return results

    def _register(
        self, tracker: Any, category: str, winner: TrialRecord, run_id: str, scored: ChampionScore, num_trials: int
    ) -> ChampionVersion:
        from tuning.champions import Decision, promote

        info = self.data[category].info
        runs = tracker.find_runs(self.dataset, category=category)
        times = 1 + count_scores(runs, category=category, test_fingerprint=info.test_fingerprint, besides=run_id)
        with tempfile.TemporaryDirectory(prefix="cases-") as scratch:
            picture = Path(scratch, "test_cases.png")
            picture.write_bytes(scored.picture)
            tracker.log_summary(
                run_id,
                metrics={f"test_{name}": value for name, value in scored.metrics.items()},
                tags={
                    "test_split_scored_times": str(times),
                    **{f"undefined_test_{name}": reason for name, reason in scored.undefined.items()},
                },
                files=[picture],
                artifact_path="pictures",
            )
        assert winner.objective is not None
        return promote(
            run_id,
            tracker.tracking_uri,
            decision=Decision(
                validation_objective=winner.objective,
                num_trials=num_trials,
                test_metrics=scored.metrics,
                train_masks=int(winner.metrics.get("masks_used", 0)),
                train_weak_labels=int(winner.metrics.get("weak_labels_used", 0)),
                validation_labels=info.counts["validation"].defective,
                validation_masks=info.counts["validation"].masks,
                extra={"test_split_scored_times": str(times), "objective_metric": self.settings.objective.metric},
            ),
        )

    def log_leaderboard(
        self, tracker: Any, sweep_tags: Sweep, leaderboard: Leaderboard, results: Sequence[CategoryResult]
    ) -> None:
        """Summarise each category in its parent run, and keep the whole table there."""
        parents = {
            r.category: r.run_id
            for r in tracker.find_runs(self.dataset, sweep_id=self.sweep_id)
            if r.parent_run_id is None
        }
        with tempfile.TemporaryDirectory(prefix="leaderboard-") as scratch:
            table = Path(scratch, "leaderboard.md")
            table.write_text(leaderboard.markdown())
            for result in results:
                metrics, tags = parent_summary(self.data[result.category], result)
                tracker.log_summary(parents[result.category], metrics=metrics, tags=tags, files=[table])


def score_champion(model: Checkpoint, test: TestData, device: str, cpus: float) -> ChampionScore:
    """Score a winner on the test split; runs where a trial would."""
    from ssn.bundle import find_backbone
    from ssn.evaluation import evaluate_samples
    from ssn.predictor import Predictor
    from ssn.visualize import case_figure
    from tuning.objective import use_threads

    use_threads(cpus)
    predictor = Predictor.from_checkpoint(model, find_backbone(model), device=device)
    evaluation = evaluate_samples(predictor, test.stream(), keep_images=True)
    with tempfile.TemporaryDirectory(prefix="cases-") as scratch:
        picture = Path(scratch, "cases.png")
        case_figure(evaluation.cases(), picture, title=f"{test.info.dataset}: {test.info.category}, test split")
        return ChampionScore(
            metrics=evaluation.metrics.values,
            undefined=evaluation.metrics.undefined,
            num_images=len(evaluation.ids),
            num_defective=int(evaluation.labels.sum()),
            picture=picture.read_bytes(),
        )


def _outcome(action: Callable[..., T], *args: Any) -> T | str:
    """What ``action`` returns, or why it could not, as one line."""
    try:
        return action(*args)
    except SSNError as error:
        # one that Ray brings back from a task carries the task's traceback; its cause is the error itself
        return str(getattr(error, "cause", error))


def load_weights_digest(model: ModelConfig) -> str:
    """Of the weights as loaded. Calibration of random ones follows from them and the data, so it adds nothing."""
    from ssn.backbone import load_backbone

    return load_backbone(model).digest


def _leaderboard(run: _Run, results: Sequence[CategoryResult], notes: Sequence[str], tracking_uri: str) -> Leaderboard:
    notes = list(notes)
    if run.settings.objective.cost_per_mask == 0 and any(d.info.counts["pool"].masks for d in run.data.values()):
        notes.append("labels were free in this search (objective.cost_per_mask is 0)")
    return Leaderboard(
        dataset=run.dataset,
        sweep_id=run.sweep_id,
        rows=[leaderboard_row(run.data[r.category], r) for r in results],
        tracking_uri=tracking_uri,
        notes=notes,
    )


def open_stderr() -> Console:
    """For notices."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)
