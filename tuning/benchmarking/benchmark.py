"""The benchmark: fixed configurations, repeated, each finished network scored on the test split.

It runs on the sweep's engine, with its placement and its shared features, but nothing is searched and nothing pruned.
What is finished is on the disk, one file per run, so that the same command again does what is left.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssn.config import Config, ModelConfig, unflatten
from ssn.data.reader import CategoryInfo, SearchData, TestData, open_search_data, open_test_data
from ssn.data.storage import join_uri, resolve_uri
from ssn.errors import SSNError
from ssn.loader import load_config
from tuning.benchmarking.label_curve import LabelCurve, curve_rows, draw_label_curve, make_curves
from tuning.benchmarking.plan import (
    CHAMPION,
    BenchmarkSettings,
    Plan,
    PlannedRun,
    make_plan,
    make_variants,
    read_configurations,
)
from tuning.benchmarking.results import ResultStore, RunResult
from tuning.benchmarking.table import BenchmarkTable, PaperNumbers, cost_s, make_rows, partial_means, run_rows, to_csv
from tuning.execution.interrupt import StopFlag, terminate_as_interrupt
from tuning.execution.objective import TrialContext
from tuning.execution.train_worker import Placement
from tuning.execution.tune_run import open_storage, run_tune
from tuning.execution.weights import load_weights_digest, weights_key
from tuning.sweep import check_lasting, connect_ray, open_categories, open_stderr, place
from tuning.tracking.protocol import BENCHMARK_STAGE, CLOSE_PATIENCE_S, STOP_PATIENCE_S, Sweep, count_scores

if TYPE_CHECKING:
    from rich.console import Console

    from tuning.champions.registry import ChampionOrigin

ARTIFACT_FOLDER = "benchmark"
"""Where the parent run has the tables and pictures."""
RAY_FOLDER = "ray"
"""Where Ray keeps its state, beside the results."""


@dataclass(frozen=True)
class BenchmarkResult:
    """A finished benchmark."""

    benchmark_id: str
    table: BenchmarkTable
    runs: Sequence[Mapping[str, Any]]
    """See :func:`tuning.benchmarking.table.run_rows`."""
    curves: Sequence[LabelCurve]
    files: Sequence[str]
    """Where tables and pictures are."""
    failures: Sequence[str]
    num_runs: int
    num_already: int
    """Runs that were finished before."""
    duration_s: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "benchmark_id": self.benchmark_id,
            "dataset": self.table.dataset,
            "protocol": self.table.protocol,
            "num_runs": self.num_runs,
            "num_already": self.num_already,
            "failures": list(self.failures),
            "duration_s": self.duration_s,
            "table": self.table.as_dict(),
            "runs": list(self.runs),
            "label_value": curve_rows(self.curves),
            "files": list(self.files),
        }


def benchmark(
    *,
    dataset: str,
    data_uri: str,
    categories: Sequence[str] | None,
    configurations: Sequence[str],
    seeds: int,
    tracking_uri: str,
    out: str,
    sets: Sequence[str] = (),
    overs: Sequence[str] = (),
    paper: PaperNumbers | None = None,
    console: Console | None = None,
) -> BenchmarkResult:
    """Train and score every configuration on every category, as often as asked for, and write the tables.

    Args:
        dataset: Name under which the data was ingested.
        data_uri: Where.
        categories: None: all that are there.
        configurations: See :func:`tuning.benchmarking.plan.read_configurations`.
        seeds: Repetitions.
        tracking_uri: MLflow server or database.
        out: Folder or object-store URI of results, tables and pictures; finished runs found there are not repeated.
        sets: ``--set`` options, for all configurations.
        overs: ``--over`` options.
        paper: Published figures of the dataset; shown under the official protocol alone.
        console: For notices; None: standard error.

    Raises:
        SSNError: the data, the tracker, the cluster or the settings cannot serve, or a champion was tuned on images of
            the test split; said before anything starts. Also if no run has finished at the end.
        KeyboardInterrupt: after an interrupt, with every run closed.
    """
    from tuning.tracking import MLflowTracker, Outbox
    from tuning.tracking.outbox import outbox_folder

    started_s = time.monotonic()
    notify = functools.partial((console or open_stderr()).print, highlight=False, markup=False)
    data = open_categories(data_uri, dataset, categories)
    tests = {name: open_test_data(data_uri, dataset, name) for name in data}
    infos = {name: search_data.info for name, search_data in data.items()}
    protocol = common_protocol(infos)
    settings = load_config(BenchmarkSettings, sets=sets)
    variants = make_variants(read_configurations(configurations), overs)
    check_lasting(out, tracking_uri)
    mlflow = MLflowTracker(tracking_uri, persistent=False)
    mlflow.check()
    champions: dict[str, Config] = {}
    if any(variant.name == CHAMPION for variant in variants):
        champions = {name: _champion_of(test, mlflow.tracking_uri) for name, test in tests.items()}

    @functools.cache
    def weights_digest(model: ModelConfig) -> str:
        return load_weights_digest(model)

    plan = make_plan(infos, variants, seeds, sets, champions=champions, weights_digest=weights_digest)
    store = ResultStore.open(out, dataset)
    results = store.read_all(plan)
    for path in store.damaged:
        notify(f"note: {path} is damaged or of another version; its run is done again")
    for line in lacking_labels(plan, infos):
        notify(f"note: {line}")
    already = len(results)
    notify(f"{len(plan.runs)} runs fill {len(plan.cells)} cells; {already} of them are there already")
    models = {unflatten(run.config).model for run in plan.runs}
    benchmark_id = store.benchmark_id()
    work = _Work(
        settings=settings,
        dataset=dataset,
        protocol=protocol,
        data_uri=resolve_uri(data_uri),
        data=data,
        tests=tests,
        plan=plan,
        weights_digests={weights_key(model): weights_digest(model) for model in models},
        store=store,
        benchmark_id=benchmark_id,
        tracker=Outbox(mlflow, outbox_folder(join_uri(store.root_uri, RAY_FOLDER), benchmark_id)),
        results=results,
    )
    table, curves, files = work.execute([run for run in plan.runs if run.key not in results], paper, notify)
    return BenchmarkResult(
        benchmark_id=work.benchmark_id,
        table=table,
        runs=run_rows(plan, results, work.failures, dataset=dataset, protocol=protocol),
        curves=curves,
        files=files,
        failures=work.failure_lines(),
        num_runs=len(plan.runs),
        num_already=already,
        duration_s=time.monotonic() - started_s,
    )


def lacking_labels(plan: Plan, infos: Mapping[str, CategoryInfo]) -> list[str]:
    """A line for each kind of label that is asked for and that a category has none of."""
    from ssn.engine import missing_labels

    lines = [missing_labels(config, infos[category]) for (category, _), config in plan.asked.items()]
    return list(dict.fromkeys(line for line in lines if line is not None))


def common_protocol(infos: Mapping[str, CategoryInfo]) -> str:
    """The protocol by which all categories are split.

    Raises:
        SSNError: they differ, so that no mean over them means anything.
    """
    by_protocol: dict[str, str] = {}
    for name, info in infos.items():
        by_protocol.setdefault(info.protocol, name)
    if len(by_protocol) > 1:
        named = " and ".join(f"{name} ({protocol})" for protocol, name in by_protocol.items())
        raise SSNError(f"{named} were ingested under different protocols; benchmark them apart, with --category")
    return next(iter(by_protocol))


def _champion_of(test: TestData, tracking_uri: str) -> Config:
    from tuning.champions.registry import find_champion

    champion = find_champion(tracking_uri, test.info.dataset, test.info.category)
    check_tuning(champion, test)
    return champion.config


def check_tuning(champion: ChampionOrigin, test: TestData) -> None:
    """Refuse a champion that was tuned on an image of this test split, or of which that cannot be told.

    Tuned on means train, pool or validation of its search; images are the same if their files are, byte for byte.

    Raises:
        SSNError: naming the category and how many images there are on both sides.
    """
    info = test.info
    name, way_out = f"{info.dataset}/{info.category}", "leave the configuration champion out, or sweep this data first"
    if champion.search_fingerprint == info.search_fingerprint and info.protocol == "validation":
        return  # ingest keeps this search's splits and this test split apart
    tuned_on = _find_tuned_on(champion, info)
    if tuned_on is None:
        raise SSNError(
            f"{name}: its champion was tuned on images that are no longer at {champion.data_uri}, so it may have seen "
            f"some of this test split; {way_out}"
        )
    shared = len(tuned_on.ids() & test.ids())
    if shared:
        raise SSNError(
            f"{name}: its champion was tuned on {shared} images of this test split, protocol {info.protocol}; {way_out}"
        )


def _find_tuned_on(champion: ChampionOrigin, info: CategoryInfo) -> SearchData | None:
    """The images that a champion was tuned on, if they are still where they were and still the same."""
    if champion.data_uri is None:
        return None
    try:
        found = open_search_data(champion.data_uri, info.dataset, info.category)
    except SSNError:  # gone, or out of reach: either way it cannot be told
        return None
    return found if found.info.search_fingerprint == champion.search_fingerprint else None


@dataclass(frozen=True)
class _Work:
    """One benchmark, from its runs to its tables."""

    settings: BenchmarkSettings
    dataset: str
    protocol: str
    data_uri: str
    data: Mapping[str, SearchData]
    tests: Mapping[str, TestData]
    plan: Plan
    weights_digests: Mapping[str, str]
    store: ResultStore
    benchmark_id: str
    tracker: Any
    results: dict[str, RunResult]
    """Finished runs by key; grows."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a run failed, by key; grows."""

    def execute(
        self, todo: Sequence[PlannedRun], paper: PaperNumbers | None, notify: Any
    ) -> tuple[BenchmarkTable, list[LabelCurve], list[str]]:
        """Do what is left, and report; however it ends, no run is left open in the tracker."""
        if todo:
            connect_ray()
        placement = place(self.settings) if todo else None
        described = self.tracked()
        status = "FAILED"
        with terminate_as_interrupt():
            try:
                if placement is not None:
                    self.run(todo, described, placement, notify)
                if not self.results:
                    raise SSNError(f"no run has finished; the first failure: {self.failure_lines()[0]}")
                reported = self.report(described, paper, notify)
                status = "FINISHED"
            except KeyboardInterrupt:
                status = "KILLED"
                finished, planned = len(self.store.read_all(self.plan)), len(self.plan.runs)
                notify(f"interrupted; {finished} of {planned} runs are finished, the same command does the rest")
                raise
            finally:
                self.tracker.finish_sweep(described, status)
                self.tracker.close(STOP_PATIENCE_S if status == "KILLED" else CLOSE_PATIENCE_S)
        return reported

    def tracked(self) -> Sweep:
        from tuning.tracking.environment import environment_tags

        described = Sweep(
            sweep_id=self.benchmark_id,
            dataset=self.dataset,
            categories={
                name: {
                    "search_fingerprint": data.info.search_fingerprint,
                    "test_fingerprint": data.info.test_fingerprint,
                    "split_seed": str(data.info.split_seed),
                    "protocol": data.info.protocol,
                    "data_uri": self.data_uri,
                }
                for name, data in self.data.items()
            },
            tags=environment_tags(),
            stage=BENCHMARK_STAGE,
        )
        self.tracker.start_sweep(described)
        return described

    def run(self, todo: Sequence[PlannedRun], described: Sweep, placement: Placement, notify: Any) -> None:
        """Run what is left on Tune, and take in results and failures."""
        from ray.tune.schedulers import FIFOScheduler

        from tuning.benchmarking.runs import BenchmarkCallback
        from tuning.benchmarking.score import ScoreOnTest
        from tuning.reporting.progress import ProgressCallback
        from tuning.search.fixed_runs import FixedRuns

        stop = StopFlag()
        storage = open_storage(join_uri(self.store.root_uri, RAY_FOLDER))
        searcher = FixedRuns(
            todo,
            stage=BENCHMARK_STAGE,
            label=lambda run: f"{run.labels[0]}, repetition {run.seed}",
            tags=self._tags,
        )
        tracking = BenchmarkCallback(
            self.tracker,
            described,
            runs=todo,
            store=self.store,
            placement=placement,
            code=describe_code(described.tags),
            times_scored=self.times_scored(),
            filesystem=storage[1],
            stop=stop,
        )
        run_tune(
            searcher,
            FIFOScheduler(),
            [ProgressCallback(searcher, ranked=False), tracking],
            {name: TrialContext(data=data, objective=None, rungs=None) for name, data in self.data.items()},
            name=f"{self.benchmark_id}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
            data_uri=self.data_uri,
            weights_digests=self.weights_digests,
            placement=placement,
            storage=storage,
            concurrency=None,
            stop=stop,
            finish=ScoreOnTest(self.tests),
        )
        self.results.update(self.store.read_all(self.plan))
        self.failures.update({run.key: reason for run, reason in searcher.failures()})
        if not searcher.done:
            raise KeyboardInterrupt
        if self.failures:
            notify(f"warning: {len(self.failures)} of {len(todo)} runs failed; the same command tries them again")

    def _tags(self, run: PlannedRun) -> dict[str, str]:
        return {
            "configuration": "; ".join(run.labels),
            "repetition": str(run.seed),
            "backbone": run.config["model.backbone"],
            "backbone_digest": self.weights_digests[weights_key(unflatten(run.config).model)],
        }

    def times_scored(self) -> dict[str, int]:
        """Per category, how often its test split has been scored, by sweeps and benchmarks."""
        runs = self.tracker.find_runs(self.dataset)
        return {
            name: count_scores(runs, category=name, test_fingerprint=data.info.test_fingerprint)
            for name, data in self.data.items()
        }

    def failure_lines(self) -> list[str]:
        """One line per failed run."""
        by_key = {run.key: run for run in self.plan.runs}
        return [
            f"{by_key[key].category}: {by_key[key].labels[0]}, repetition {by_key[key].seed} failed: {reason}"
            for key, reason in self.failures.items()
        ]

    def report(
        self, described: Sweep, paper: PaperNumbers | None, notify: Any
    ) -> tuple[BenchmarkTable, list[LabelCurve], list[str]]:
        """Write tables and pictures beside the results and to the parent run."""
        infos = {name: data.info for name, data in self.data.items()}
        if paper is not None and self.protocol != "official":
            notify(f"note: {_WHY_NO_PAPER}")
        curves, undrawn = make_curves(self.plan, infos, self.results, self.dataset)
        for line in undrawn:
            notify(f"note: {line}")
        table = self.table(described, infos, paper)
        runs = run_rows(self.plan, self.results, self.failures, dataset=self.dataset, protocol=self.protocol)
        contents = {
            "table.md": table.markdown().encode(),
            "table.csv": table.csv().encode(),
            "table.tex": table.latex().encode(),
            "runs.csv": to_csv(runs).encode(),
        }
        if curves:
            contents["label_value.csv"] = to_csv(curve_rows(curves)).encode()
        about = "; ".join([*describe_settings(self.plan), f"protocol {self.protocol}", table.code, table.hardware])
        for curve in curves:
            contents[f"{curve.name}.png"] = draw_label_curve(curve, notes=about)
        files = [self.store.write_file(name, data) for name, data in contents.items()]
        parent = next(iter(self.tracker.start_sweep(described).values()))
        with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
            for name, data in contents.items():
                Path(scratch, name).write_bytes(data)
            paths = [Path(scratch, name) for name in contents]
            self.tracker.log_summary(parent, files=paths, artifact_path=ARTIFACT_FOLDER)
        return table, curves, files

    def table(self, described: Sweep, infos: Mapping[str, CategoryInfo], paper: PaperNumbers | None) -> BenchmarkTable:
        """Put the table and what belongs below it together."""
        used = list(self.results.values())
        rows = make_rows(self.plan, infos, self.results, paper if self.protocol == "official" else None)
        code = ", ".join(_counted([result.code for result in used]))
        hardware = ", ".join(_counted([result.hardware for result in used]))
        unit = cost_unit(used)
        notes = [
            _PROTOCOLS[self.protocol] + _describe_folds(infos),
            *([_WHY_NO_PAPER] if paper is not None and self.protocol != "official" else []),
            *describe_settings(self.plan),
            "repetition r trains with seed r and, where not all masks are used, chooses them with label seed r",
            *partial_means(self.plan, rows),
            *self.failure_lines(),
            _describe_times(self.times_scored()),
            f"{code}; {hardware}; cost: {sum(map(cost_s, used)):.0f} {unit} in {len(used)} runs, features and all",
        ]
        count = len(self.plan.seeds)
        spread = f"mean ± sample standard deviation over {count} repetitions" if count > 1 else "one repetition"
        return BenchmarkTable(
            dataset=self.dataset,
            protocol=self.protocol,
            title=f"{self.dataset}, test split, protocol {self.protocol}: percent, {spread}",
            rows=rows,
            notes=notes,
            cost_unit=unit,
            code=code,
            hardware=hardware,
        )


_WHY_NO_PAPER = (
    "the paper's figures are left out: they are for the published split, and this data was ingested with the protocol "
    "validation (ssn ingest --protocol official)"
)
_PROTOCOLS = {
    "official": "protocol official: the published train and test split, without a validation split",
    "validation": (
        "protocol validation: this project's own train, validation and test split; its figures do not compare with "
        "published ones"
    ),
}


def describe_code(tags: Mapping[str, str]) -> str:
    """What a run was computed with: ``commit 1a2b3c4``, or a digest of the code where there is no checkout.

    Args:
        tags: From :func:`tuning.tracking.environment.environment_tags`.
    """
    if "git_commit" not in tags:
        return f"code {tags['code_digest'][:12]}"
    return f"commit {tags['git_commit'][:7]}{' with changes' if tags['git_dirty'] == 'true' else ''}"


def describe_settings(plan: Plan) -> list[str]:
    """A line per configuration: backbone, epochs and image size, with those that differ between its runs."""
    lines = []
    for name in dict.fromkeys(variant.name for variant in plan.variants):
        labels = {variant.label for variant in plan.variants if variant.name == name}
        configs = [run.config for run in plan.runs if labels & set(run.labels)]
        networks = dict.fromkeys(
            f"{c['model.backbone']} ({c['model.variant']}, weights {c['model.weights'].rpartition('/')[2]})"
            for c in configs
        )
        epochs = dict.fromkeys(str(c["train.epochs"]) for c in configs)
        sizes = dict.fromkeys("{} x {}".format(*c["data.image_size"]) for c in configs)
        lines.append(f"{name}: {' or '.join(networks)}, {' or '.join(epochs)} epochs, {' or '.join(sizes)} pixels")
    return lines


def cost_unit(results: Sequence[RunResult]) -> str:
    """What :func:`tuning.benchmarking.table.cost_s` of these counts."""
    on_gpu = {result.gpus > 0 for result in results}
    if len(on_gpu) > 1:
        return "core- or GPU-seconds"
    return "GPU-seconds" if on_gpu == {True} else "core-seconds"


def _counted(values: Sequence[str]) -> list[str]:
    """Each value once; with how many runs it stands for, if there are several."""
    counts = Counter(values)
    return list(counts) if len(counts) < 2 else [f"{value} ({count} runs)" for value, count in counts.most_common()]


def _describe_times(times: Mapping[str, int]) -> str:
    low, high = min(times.values()), max(times.values())
    shown = str(low) if low == high else f"{low} to {high}"
    return f"each test split has been scored {shown} times in all, sweeps included"


def _describe_folds(infos: Mapping[str, CategoryInfo]) -> str:
    folds = sorted({info.fold for info in infos.values() if info.fold is not None})
    return f"; fold {', '.join(map(str, folds))} of the published folds" if folds else ""
