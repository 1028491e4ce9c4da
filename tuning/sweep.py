"""The sweep: every category searched in one Ray Tune run, its champion chosen on validation, scored, registered.

The search is given ``SearchData`` alone. Test data is opened after it has ended, for the winners only.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import gc
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssn.config import unflatten
from ssn.data.reader import SearchData, list_categories, open_search_data
from ssn.data.storage import join_uri
from ssn.errors import SSNError
from tuning.budget import Spent
from tuning.champions.category_result import CategoryResult, describe_search
from tuning.champions.incumbent import yardstick
from tuning.execution.capacity import Capacity, check_fits, cluster_capacity, use_gpu
from tuning.execution.feature_sizes import MapSizes, size_feature_groups
from tuning.execution.interrupt import StopFlag, terminate_as_interrupt
from tuning.execution.objective import TrialContext, check_objective, check_protocol
from tuning.execution.train_worker import Placement
from tuning.execution.tune_run import SharedFeatures, feature_budget_bytes, open_storage, run_tune, share_features
from tuning.execution.weights import load_weights_digests, weights_key
from tuning.persistence.ledger import STUDIES_FILE, SweepLedger
from tuning.persistence.resume import (
    check_unchanged,
    close_runs,
    count_trials,
    describe_sweep,
    read_earlier,
    resume_command,
)
from tuning.persistence.study_database import INTERRUPT_TIMEOUT_S, StudyDatabase
from tuning.persistence.sweep_lock import SweepLock
from tuning.reporting.report import Leaderboard, count_infeasible
from tuning.reporting.sweep_result import SweepResult, describe_decision, leaderboard_row, parent_summary
from tuning.search.costs import check_against, describe_pick
from tuning.search.feature_groups import category_spaces, models_of
from tuning.search.space import CategorySpace
from tuning.settings import SweepSettings
from tuning.tracking.protocol import CLOSE_PATIENCE_S, STOP_PATIENCE_S

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler
    from rich.console import Console

    from tuning.benchmarking.plan import BenchmarkSettings
    from tuning.champions.finalists import FinalistRun, Finals, Selection
    from tuning.champions.winner import TrialRecord
    from tuning.execution.budget_stopper import BudgetStopper
    from tuning.persistence.resume import ResumedSweep
    from tuning.reporting.progress import ProgressCallback
    from tuning.reporting.shared_report import SharedComparison
    from tuning.search.fixed_runs import FixedRuns
    from tuning.search.searcher import MultiplexSearcher
    from tuning.search.shared import SharedSearcher
    from tuning.search.warm_start import Start
    from tuning.tracking.protocol import Sweep

RAY_FOLDER = "ray"
"""Where Ray keeps checkpoints and its own state, below the sweep's folder."""

# Ray and Tune talk a lot by default, and each line would break the live view. Read when ray or Tune is imported.
_RAY_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see tuning.execution.interrupt
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

    from tuning.execution.budget_stopper import BudgetStopper
    from tuning.tracking import MLflowTracker, Outbox
    from tuning.tracking.environment import environment_tags
    from tuning.tracking.outbox import outbox_folder

    started_s = time.monotonic()
    console = console or open_stderr()
    notify = functools.partial(console.print, highlight=False, markup=False)
    data = open_categories(data_uri, dataset, categories)
    for search_data in data.values():
        check_protocol(search_data.info)
        check_objective(settings.objective, search_data.info)
    check_overrides(settings, data_uri, dataset)
    spaces = category_spaces(settings, {name: search_data.info for name, search_data in data.items()})
    check_against(settings.objective, {key for space in spaces.values() for key in space.axes})
    data_uri = data_uri if "://" in data_uri else str(Path(data_uri).absolute())
    check_lasting(out, tracking_uri)
    store = MLflowTracker(tracking_uri, persistent=False)
    store.check()
    if resumed is not None:
        resumed.check_tracker(store)
    sweep_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    ledger = SweepLedger.open(out, sweep_id) if resumed is None else resumed.ledger
    with contextlib.ExitStack() as held:
        lock = SweepLock(ledger.files, ledger.sweep_id, notify=notify)
        if resumed is not None:
            held.enter_context(lock)  # before Ray takes its seconds
        connect_ray()
        placement = place(settings)
        check_budget(settings, placement)
        # digests are part of trials' identities; a hub that cannot be reached is found out before a trial starts
        weights_digests = load_weights_digests(model for space in spaces.values() for model in models_of(space))
        run = _Run(
            settings=settings,
            dataset=dataset,
            data_uri=data_uri,
            data=data,
            spaces=spaces,
            weights_digests=weights_digests,
            features_fit=check_features(spaces, data),
            placement=placement,
            stopper=BudgetStopper(
                settings.budget(),
                gpus_per_trial=placement.gpus_per_trial,
                spent=Spent() if resumed is None else ledger.read_spent(),
                note=ledger.write_spent,
            ),
            out=out,
            ledger=ledger,
            tags=environment_tags(),
        )
        described = run.describe(store.tracking_uri)
        earlier: list[TrialRecord] = []
        if resumed is None:
            held.enter_context(lock)
            ledger.create(described)
        else:
            for line in check_unchanged(ledger.sweep_id, resumed.description, described):
                notify(f"note: {line}")
            earlier = read_earlier(ledger, retry_failed=resumed.retry_failed)
            for path in ledger.files.damaged:
                notify(f"note: {path} is damaged or of another version; its trial is done again")
            notify(f"going on with sweep {ledger.sweep_id}: {count_trials(earlier)}")
        tracker = Outbox(store, outbox_folder(out, ledger.sweep_id))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        starts, found = run.starts(tracker)
        notices = list(dict.fromkeys([*(notice for space in spaces.values() for notice in space.notices), *found]))
        for notice in notices:
            notify(f"note: {notice}")
        with terminate_as_interrupt():
            leaderboard, results, comparison = run.execute(earlier, starts, notices, tracker, console)
    failures = [
        result.failure if result.failure.startswith(result.category) else f"{result.category}: {result.failure}"
        for result in results
        if result.failure
    ]
    if len(failures) == len(results):
        raise SSNError(failures[0])
    for failure in failures:
        console.print(f"warning: {failure}", highlight=False, markup=False)
    return SweepResult(leaderboard, results, time.monotonic() - started_s, comparison)


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
        _check_category(name, there, f"{dataset} at {data_uri} has no category {name!r}")
    return {name: open_search_data(data_uri, dataset, name) for name in dict.fromkeys(categories or there)}


def check_overrides(settings: SweepSettings, data_uri: str, dataset: str) -> None:
    """Refuse a search space of its own for a category that is not there.

    Raises:
        SSNError: naming the nearest one that is.
    """
    there = list_categories(data_uri, dataset)
    for name in settings.search.categories:
        _check_category(name, there, f"search.categories.{name}: {dataset} at {data_uri} has no such category")


def _check_category(name: str, there: Sequence[str], problem: str) -> None:
    if name not in there:
        near = difflib.get_close_matches(name, there, n=1)
        raise SSNError(problem + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(there)}"))


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


def place(settings: SweepSettings | BenchmarkSettings, capacity: Capacity | None = None) -> Placement:
    """Decide where trials run, and refuse at once what the cluster can never hold.

    Args:
        settings: What trials ask for.
        capacity: Of the cluster; None: of the connected one.

    Raises:
        SSNError: see :func:`tuning.execution.capacity.check_fits`; also workers of one trial that would share a GPU.
    """
    capacity = capacity or cluster_capacity()
    wanted = settings.resources
    gpu = use_gpu(wanted.use_gpu, capacity)
    num_workers = (1 if gpu else 0) if wanted.num_workers is None else wanted.num_workers
    placement = Placement(
        num_workers=num_workers,
        use_gpu=gpu,
        cpus=wanted.cpus_per_worker,
        gpus=wanted.gpus_per_worker if gpu else 0.0,
        memory_bytes=round(1e9 * (wanted.memory_gb_per_worker or 0)),
    )
    check_fits(capacity, num_workers=num_workers, per_worker=placement.per_worker)
    if num_workers > 1 and gpu and wanted.gpus_per_worker < 1:
        raise SSNError(
            f"resources.gpus_per_worker is {wanted.gpus_per_worker:g}, but the {num_workers} workers of a trial need a "
            "GPU each (nccl); use 1, or a single worker"
        )
    return placement


def check_features(spaces: Mapping[str, CategorySpace], data: Mapping[str, SearchData]) -> bool:
    """Whether the connected cluster has memory for all features that trials may want.

    Raises:
        SSNError: a backbone cannot be built.
    """
    measure, budget_bytes = MapSizes(), feature_budget_bytes()
    return budget_bytes >= sum(
        group.num_bytes
        for name, space in spaces.items()
        for group in size_feature_groups(space, data[name].info, measure, budget_bytes=budget_bytes)
    )


def check_budget(settings: SweepSettings, placement: Placement) -> None:
    """Refuse a budget that nothing would ever be counted against.

    Raises:
        SSNError: GPU hours are limited where trials hold no GPU.
    """
    if settings.search.max_gpu_hours is not None and not placement.use_gpu:
        raise SSNError("search.max_gpu_hours is set, but trials run on CPUs here; limit search.time_budget instead")


@dataclass(frozen=True)
class _Run:
    """One sweep, from its searcher to its champions."""

    settings: SweepSettings
    dataset: str
    data_uri: str
    data: Mapping[str, SearchData]
    spaces: Mapping[str, CategorySpace]
    weights_digests: Mapping[str, str]
    features_fit: bool
    """Whether the cluster has memory for the features of all categories at once."""
    placement: Placement
    stopper: BudgetStopper
    """Of the search and of its finalists."""
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
            weights_digests=self.weights_digests,
            code=code | {key: value for key, value in self.tags.items() if key.startswith("version_")},
        )

    def starts(self, tracker: Any) -> tuple[dict[str, tuple[Start, ...]], list[str]]:
        """What each category tries before the sampler is asked, and what to tell the user about it."""
        from tuning.champions.registry import find_champion
        from tuning.search.warm_start import plan_starts, read_transfers

        search, earlier = self.settings.search, None
        if search.shared:
            return dict.fromkeys(self.data, ()), []
        if search.transfer:
            split_seeds = {name: data.info.split_seed for name, data in self.data.items()}
            earlier = read_transfers(tracker.find_runs(self.dataset), split_seeds)
        starts, notices = {}, []
        for name, data in self.data.items():
            find = functools.partial(find_champion, tracker.tracking_uri, self.dataset, name)
            starts[name], found = plan_starts(
                data.info,
                self.spaces[name],
                trials_per_category=search.trials,
                find=find if search.warm_start else None,
                earlier=earlier,
            )
            notices += found
        return starts, notices

    def searcher(
        self,
        starts: Mapping[str, tuple[Start, ...]],
        earlier: Sequence[TrialRecord],
        database: StudyDatabase | None,
    ) -> MultiplexSearcher | SharedSearcher:
        from tuning.search.searcher import CategorySearch, MultiplexSearcher

        search = self.settings.search
        categories = [
            CategorySearch(
                category=name,
                base=self.spaces[name].base,
                space=self.spaces[name].axes,
                search_fingerprint=data.info.search_fingerprint,
                weights_digests={
                    key: self.weights_digests[key] for key in map(weights_key, models_of(self.spaces[name]))
                },
                split_seed=data.info.split_seed,
                starts=starts[name],
            )
            for name, data in self.data.items()
        ]
        if search.shared:
            from tuning.search.shared import make_shared_searcher

            return make_shared_searcher(
                categories,
                pools={name: data.info.counts["pool"] for name, data in self.data.items()},
                sweep_id=self.sweep_id,
                num_configurations=search.trials,
                search_seed=search.seed,
                eta=search.eta,
                max_trials=search.max_trials,
                earlier=earlier,
                database=database,
            )
        return MultiplexSearcher(
            categories,
            sweep_id=self.sweep_id,
            trials_per_category=search.trials,
            search_seed=search.seed,
            transfer=search.transfer,
            against=self.settings.objective.against,
            max_trials=search.max_trials,
            reuse_features=not self.features_fit,
            earlier=earlier,
            database=database,
        )

    def open_database(self, notify: Callable[[str], None]) -> StudyDatabase | None:
        """Where the studies are shown; None: nowhere."""
        url = self.settings.search.storage
        if url is None and self.ledger.files.is_local:
            url = f"sqlite:///{self.ledger.files.path(STUDIES_FILE)}"
        return None if url is None else StudyDatabase(url, notify=notify)

    def execute(
        self,
        earlier: Sequence[TrialRecord],
        starts: Mapping[str, tuple[Start, ...]],
        notices: Sequence[str],
        tracker: Any,
        console: Console,
    ) -> tuple[Leaderboard, list[CategoryResult], SharedComparison | None]:
        """Search, crown and report; however it ends, no run is left open.

        Args:
            earlier: Trials that there are already.
            starts: What each category tries first.
            notices: For the leaderboard.
            tracker: Where runs go.
            console: For notices.
        """
        from tuning.champions.crown import Crowning

        notify = functools.partial(console.print, highlight=False, markup=False)
        database = self.open_database(notify)
        searcher = self.searcher(starts, earlier, database)
        sweep_tags = self.tracked(tracker)
        status = "FAILED"
        try:
            for line in close_runs(tracker, sweep_tags, self.ledger, earlier, open_storage(self.out)[1]):
                notify(f"warning: {line}")
            features = share_features(self.sweep_id)
            self.search(searcher, tracker, sweep_tags, features)
            if not searcher.done:
                raise KeyboardInterrupt
            if database is not None:
                database.close()
                database = None
            finals = self.try_finalists(searcher, earlier, tracker, sweep_tags, features)
            features.end()
            crowning = Crowning(
                settings=self.settings,
                dataset=self.dataset,
                data_uri=self.data_uri,
                data=self.data,
                placement=self.placement,
                ledger=self.ledger,
                tracker=tracker,
                console=console,
            )
            results = crowning.crown(
                {name: searcher.records(name) for name in self.data},
                finals.records,
                functools.partial(self.select, searcher, finals),
            )
            notes = [*notices, *searcher.notices, *filter(None, [finals.ended_by])]
            leaderboard = _leaderboard(self, results, notes, tracker.tracking_uri)
            comparison = self.compare(tracker, results)
            ended_by = [text for text in (searcher.ended_by, finals.ended_by) if text is not None]
            self.log_leaderboard(tracker, leaderboard, results, comparison, ended_by)
            status = "FINISHED" if any(result.champion for result in results) else "FAILED"
        except KeyboardInterrupt:
            status = "KILLED"
            notify(f"interrupted; {count_trials(self.ledger.read_trials())}, and nothing is lost")
            notify(f"to go on: {resume_command(self.sweep_id, self.out)}")
            raise
        except Exception:
            notify(f"the sweep broke off; to go on, once that is mended: {resume_command(self.sweep_id, self.out)}")
            raise
        finally:
            if database is not None:
                database.close(INTERRUPT_TIMEOUT_S)
            tracker.finish_sweep(sweep_tags, status)
            tracker.close(STOP_PATIENCE_S if status == "KILLED" else CLOSE_PATIENCE_S)
        return leaderboard, results, comparison

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
                    "backbone": self.spaces[name].base["model.backbone"],
                    "backbone_digest": self.weights_digests[weights_key(unflatten(self.spaces[name].base).model)],
                    "data_uri": self.data_uri,
                }
                for name, data in self.data.items()
            },
            tags=self.tags,
        )
        tracker.start_sweep(described)
        return described

    def search(
        self,
        searcher: MultiplexSearcher | SharedSearcher,
        tracker: Any,
        sweep_tags: Sweep,
        features: SharedFeatures,
    ) -> None:
        """Run Tune to the end, or until it is interrupted or a budget is spent, now or before a resume."""
        from ray.tune.schedulers import FIFOScheduler

        from tuning.reporting.progress import ProgressCallback
        from tuning.search.scheduler import MultiplexScheduler
        from tuning.search.shared import SharedSearcher

        ended_by = self.ledger.read_end("search")
        if ended_by is None and not searcher.done:
            scheduler: TrialScheduler
            if isinstance(searcher, SharedSearcher):
                scheduler = FIFOScheduler()  # whole trials count, and configurations are dropped between them
            else:
                scheduler = MultiplexScheduler(
                    self.settings.rungs(), against=self.settings.objective.against, history=searcher
                )
                scheduler.enter_earlier(searcher.records())
            self.tune(searcher, scheduler, ProgressCallback(searcher), tracker, sweep_tags, features)
            ended_by = self.stopper.ended_by
            if ended_by is not None:
                self.ledger.write_end("search", ended_by)
        if ended_by is not None:
            self.stopper.ended_by = ended_by
            if not searcher.done:
                searcher.end(ended_by)

    def try_finalists(
        self,
        searcher: MultiplexSearcher | SharedSearcher,
        earlier: Sequence[TrialRecord],
        tracker: Any,
        sweep_tags: Sweep,
        features: SharedFeatures,
    ) -> Finals:
        """Train each category's best trials with more seeds; nothing is pruned.

        Raises:
            KeyboardInterrupt: some did not run to their end.
        """
        from ray.tune.schedulers import FIFOScheduler

        from tuning.champions.finalists import FinalistRun, Finals, plan_finalists
        from tuning.champions.winner import rank_trials
        from tuning.reporting.progress import ProgressCallback
        from tuning.search.fixed_runs import FixedRuns
        from tuning.search.shared import SharedSearcher, plan_shared_finalists
        from tuning.tracking.protocol import FINALIST_STAGE

        finalists = self.settings.finalists
        if isinstance(searcher, SharedSearcher):
            planned = plan_shared_finalists(searcher, finalists)
        else:
            planned = {
                name: plan_finalists(
                    rank_trials(self.candidates(searcher, name)), finalists, functools.partial(searcher.identity, name)
                )
                for name in self.data
            }
        todo = [run for runs in planned.values() for run in runs]
        if not todo:
            return Finals(planned)
        if self.stopper.ended_by is not None:
            return Finals(
                dict.fromkeys(self.data, ()), ended_by=f"{self.stopper.ended_by} left no finalist further seeds"
            )
        runs = FixedRuns(
            todo, stage=FINALIST_STAGE, label=lambda run: run.label, tags=FinalistRun.tags, earlier=earlier
        )
        ended_by = self.ledger.read_end(FINALIST_STAGE)
        if ended_by is None and not runs.done:
            self.tune(runs, FIFOScheduler(), ProgressCallback(runs, ranked=False), tracker, sweep_tags, features)
            ended_by = self.stopper.ended_by
            if ended_by is not None:
                self.ledger.write_end(FINALIST_STAGE, ended_by)
        if not runs.done and ended_by is None:
            raise KeyboardInterrupt
        if not runs.done:
            runs.end(f"{ended_by} ended the finalists' further runs")
        return Finals(planned, {name: runs.records(name) for name in self.data}, runs.ended_by)

    def select(self, searcher: MultiplexSearcher | SharedSearcher, finals: Finals, name: str) -> Selection:
        """A category's winner, or its run of the configuration that wins for all."""
        from tuning.champions.finalists import select_finalist
        from tuning.search.shared import SharedSearcher, select_shared

        if isinstance(searcher, SharedSearcher):
            return select_shared(searcher, self.settings.finalists, finals.planned, finals.records)[name]
        trials = self.candidates(searcher, name)
        return select_finalist(trials, finals.planned[name], finals.records.get(name, ()))

    def candidates(self, searcher: MultiplexSearcher, name: str) -> list[TrialRecord]:
        """The category's trials that may become its champion."""
        from tuning.search.pareto import contenders

        return list(contenders(searcher.records(name), self.settings.objective))

    def tune(
        self,
        searcher: MultiplexSearcher | SharedSearcher | FixedRuns[FinalistRun],
        scheduler: TrialScheduler,
        progress: ProgressCallback,
        tracker: Any,
        sweep_tags: Sweep,
        features: SharedFeatures,
    ) -> None:
        """Run trials, in as many Tune runs as it takes, to the end, an interrupt, or until a budget is spent."""
        from tuning.persistence.ledger_callback import LedgerCallback
        from tuning.search.portion import Portion

        stop = StopFlag()
        storage = open_storage(join_uri(self.ledger.files.root_uri, RAY_FOLDER))
        ledger = LedgerCallback(
            tracker, sweep_tags, ledger=self.ledger, keeper=searcher, filesystem=storage[1], stop=stop
        )
        portion, goes_on = Portion(searcher, ledger.has_begun), True
        while goes_on:
            portion.refill()
            run_tune(
                portion,
                scheduler,
                [progress, ledger],
                {
                    name: TrialContext(data=data, objective=self.settings.objective, rungs=self.settings.rungs())
                    for name, data in self.data.items()
                },
                name=f"{self.sweep_id}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
                data_uri=self.data_uri,
                weights_digests=self.weights_digests,
                placement=self.placement,
                storage=storage,
                concurrency=self.settings.search.max_concurrent,
                stop=stop,
                stopper=self.stopper,
                num_to_keep=None,  # the ledger's callback removes them
                features=features,
            )
            gc.collect()  # a run's trials refer to each other, and would stay for long
            ended = searcher.done or stop or self.stopper.ended_by is not None
            goes_on = portion.has_more and not ended
        self.stopper.note_spent()

    def compare(self, tracker: Any, results: Sequence[CategoryResult]) -> SharedComparison | None:
        """A shared search's models with those that were tuned by category; None for any other search."""
        from tuning.reporting.shared_report import compare_with_tuned

        if not self.settings.search.shared:
            return None
        return compare_with_tuned(
            results,
            tracker.find_runs(self.dataset),
            dataset=self.dataset,
            fingerprints={name: data.info.search_fingerprint for name, data in self.data.items()},
            judged_by=yardstick(self.settings.objective, self.settings.eval),
        )

    def log_leaderboard(
        self,
        tracker: Any,
        leaderboard: Leaderboard,
        results: Sequence[CategoryResult],
        comparison: SharedComparison | None,
        ended_by: Sequence[str],
    ) -> None:
        """Summarise each category in its parent run, and keep the whole table there."""
        parents = {
            r.category: r.run_id
            for r in tracker.find_runs(self.dataset, sweep_id=self.sweep_id)
            if r.parent_run_id is None
        }
        judged_by = yardstick(self.settings.objective, self.settings.eval)
        with tempfile.TemporaryDirectory(prefix="leaderboard-") as scratch:
            tables = {"leaderboard.md": leaderboard.markdown()}
            if comparison is not None:
                tables["comparison.md"] = comparison.markdown()
            for name, text in tables.items():
                Path(scratch, name).write_text(text)
            for result in results:
                metrics, tags = parent_summary(self.data[result.category], result)
                tags |= {"ended_by": "; ".join(ended_by)} if ended_by else {}
                decision = Path(scratch, result.category, "decision.json")
                decision.parent.mkdir()
                decision.write_text(json.dumps(describe_decision(result, self.settings), indent=2) + "\n")
                tracker.log_summary(
                    parents[result.category],
                    metrics=metrics,
                    tags={**judged_by, "searched": describe_search(self.settings), **tags},
                    files=[
                        *(Path(scratch, name) for name in tables),
                        decision,
                        *self.draw_front(result, Path(scratch)),
                    ],
                )

    def draw_front(self, result: CategoryResult, scratch: Path) -> list[Path]:
        """Files that show what a category's objective costs, if that was asked for."""
        from tuning.search.pareto_chart import write_front

        objective, counts = self.settings.objective, self.data[result.category].info.counts["validation"]
        if objective.against == "none":
            return []
        return write_front(
            Path(tempfile.mkdtemp(dir=scratch)),
            result.trials,
            None if result.selection is None else result.selection.winner.trial.index,
            objective,
            heading=f"{self.dataset}, {result.category}",
            about=f"Judged by {counts.normal} normal and {counts.defective} defective validation images, so that small "
            "differences may be chance.",
        )


def _leaderboard(run: _Run, results: Sequence[CategoryResult], notes: Sequence[str], tracking_uri: str) -> Leaderboard:
    notes = [*notes, *(notice for result in results for notice in result.notices())]
    unpriced = run.settings.objective.cost_per_mask == 0 and run.settings.objective.against != "labels"
    if unpriced and any(d.info.counts["pool"].masks for d in run.data.values()):
        notes.append("labels were free in this search (objective.cost_per_mask is 0)")
    notes += describe_pick(run.settings.objective)
    rows = [leaderboard_row(run.data[r.category], r) for r in results]
    notes += count_infeasible(rows)
    return Leaderboard(
        dataset=run.dataset,
        sweep_id=run.sweep_id,
        rows=rows,
        tracking_uri=tracking_uri,
        notes=notes,
    )


def open_stderr() -> Console:
    """For notices."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)
