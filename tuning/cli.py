"""The commands of ``python -m tuning``: search over every category of a dataset, champions, reports.

As thin as those of ``ssn.cli``: parse, call one function, print what it returns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssn.cli import ConfigOption, DataOption, DatasetArgument, JsonOption, SetOption, dataset_name
from ssn.console import print_table, print_whole, run_app, write_json
from ssn.errors import SSNError

if TYPE_CHECKING:
    from tuning.reporting.report import Leaderboard

app = typer.Typer(
    help="Hyperparameter search for SuperSimpleNet on Ray, with one MLflow champion per category.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
champions = typer.Typer(help="The registered model of each category.", no_args_is_help=True)
app.add_typer(champions, name="champions")

CategoryOption = Annotated[
    list[str] | None, typer.Option("--category", metavar="NAME", help="Only this category. Repeatable.")
]
TrialsOption = Annotated[int | None, typer.Option("--trials", help="Trials per category (search.trials).")]
MaxTrialsOption = Annotated[
    int | None, typer.Option("--max-trials", help="Most trials of all categories together (search.max_trials).")
]
NumWorkersOption = Annotated[
    int | None, typer.Option("--num-workers", help="Ray Train workers per trial; 0: none (resources.num_workers).")
]
UseGpuOption = Annotated[
    bool | None, typer.Option("--use-gpu/--no-use-gpu", help="By default where there is one (resources.use_gpu).")
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow server or sqlite:///FILE; by default mlflow.db in this folder.",
    ),
]


def main() -> None:
    """Entry point of ``python -m tuning`` and of the console script."""
    run_app(app)


@app.command()
def sweep(
    dataset: Annotated[
        str | None,
        typer.Argument(metavar="DATASET", help="Name of a dataset manifest, or the path of your own (YAML)."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="URI", help="Where ingest wrote: a folder, s3://, gs://.")
    ] = None,
    category: CategoryOption = None,
    trials: TrialsOption = None,
    shared: Annotated[
        bool,
        typer.Option("--shared", help="One configuration for all categories, by its mean objective (search.shared)."),
    ] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Also try what did best in other categories (search.transfer).")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="labels|latency",
            help="Weigh the objective against this cost: a front per category (objective.against).",
        ),
    ] = None,
    set_: SetOption = None,
    config: ConfigOption = None,
    max_trials: MaxTrialsOption = None,
    time_budget: Annotated[
        str | None,
        typer.Option(
            "--time-budget",
            metavar="TIME",
            help="When to stop the search, such as 2h or 90m; champions are chosen among the complete trials "
            "(search.time_budget).",
        ),
    ] = None,
    max_gpu_hours: Annotated[
        float | None,
        typer.Option("--max-gpu-hours", help="GPU hours after which to stop the search (search.max_gpu_hours)."),
    ] = None,
    tracking_uri: TrackingOption = None,
    num_workers: NumWorkersOption = None,
    use_gpu: UseGpuOption = None,
    out: Annotated[
        str, typer.Option("--out", metavar="URI", help="Where the sweep keeps its state: a folder, s3://, gs://.")
    ] = "runs",
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="ID",
            help="Go on with a sweep below --out that was interrupted or died; it needs neither DATASET nor --data.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: also try trials again that failed.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Tune every category of a dataset and register one champion each."""
    from ssn.loader import load_config
    from tuning.settings import SweepSettings

    sets = [
        *(set_ or ()),
        *placement_sets(num_workers, use_gpu),
        *search_sets(trials, max_trials, time_budget, max_gpu_hours),
        *(["search.shared=true"] if shared else ()),
        *(["search.transfer=true"] if transfer else ()),
        *([f"objective.against={against}"] if against is not None else ()),
    ]
    name = None if dataset is None else dataset_name(dataset)
    categories = tuple(category) if category else None
    if resume is not None:
        from tuning.persistence.resume import read_resumed

        resumed = read_resumed(
            out,
            resume,
            dataset=name,
            data_uri=data,
            categories=categories,
            files=config or (),
            sets=sets,
            retry_failed=retry_failed,
        )
        settings = resumed.settings
        name, data, categories = resumed.description["dataset"], resumed.description["data_uri"], resumed.categories
        tracking_uri = tracking_uri or resumed.description["tracking_uri"]
    elif name is None or data is None:
        raise SSNError("a sweep needs DATASET and --data URI, or --resume ID")
    elif retry_failed:
        raise SSNError("--retry-failed goes with --resume ID")
    else:
        resumed = None
        settings = load_config(
            SweepSettings, files=config or (), sets=sets, defaults=read_defaults(data, name, categories)
        )

    from tuning.sweep import sweep as run_sweep  # after the settings are known to be right: Ray takes seconds

    result = run_sweep(
        settings,
        dataset=name,
        data_uri=data,
        categories=categories,
        tracking_uri=resolve_tracking_uri(tracking_uri),
        out=out,
        resumed=resumed,
    )
    show_leaderboard(result.leaderboard)
    if result.comparison is not None:
        print_whole(result.comparison.table())
    if json_file is not None:
        write_json(json_file, result.to_dict())


@app.command()
def plan(
    dataset: DatasetArgument,
    data: DataOption,
    category: CategoryOption = None,
    trials: TrialsOption = None,
    set_: SetOption = None,
    config: ConfigOption = None,
    max_trials: MaxTrialsOption = None,
    time_budget: Annotated[
        str | None,
        typer.Option("--time-budget", metavar="TIME", help="As for a sweep, such as 2h or 90m (search.time_budget)."),
    ] = None,
    max_gpu_hours: Annotated[
        float | None, typer.Option("--max-gpu-hours", help="As for a sweep (search.max_gpu_hours).")
    ] = None,
    num_workers: NumWorkersOption = None,
    use_gpu: UseGpuOption = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure durations and memory with a few images and steps, here or on the cluster of RAY_ADDRESS.",
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option("--price-per-hour", min=0, help="Of one node; with --calibrate, what the search would cost."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Show what a sweep would search, and its trials, epochs, features, memory, hours and cost, without starting it."""
    from ssn.loader import load_config
    from tuning.settings import SweepSettings

    sets = [
        *(set_ or ()),
        *placement_sets(num_workers, use_gpu),
        *search_sets(trials, max_trials, time_budget, max_gpu_hours),
    ]
    name = dataset_name(dataset)
    categories = tuple(category) if category else None
    settings = load_config(SweepSettings, files=config or (), sets=sets, defaults=read_defaults(data, name, categories))

    from tuning.planning.plan import plan as make_plan  # after the settings are known to be right: torch takes seconds
    from tuning.planning.plan_text import plan_lines, plan_table

    planned = make_plan(
        settings,
        dataset=name,
        data_uri=data,
        categories=categories,
        calibrate=calibrate,
        price_per_hour=price_per_hour,
    )
    print_whole(plan_table(planned))
    print("\n".join(plan_lines(planned)))
    if json_file is not None:
        write_json(json_file, planned.to_dict())


@app.command()
def benchmark(
    dataset: DatasetArgument,
    data: DataOption,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="URI",
            help="Results, tables and pictures: a folder, s3://, gs://. Runs that are there are not done again.",
        ),
    ],
    configs: Annotated[
        list[str] | None,
        typer.Option(
            "--configs",
            metavar="NAME|FILE",
            help="default (the dataset's settings), champion (the registered one's), or a YAML file of settings by "
            "name. Repeatable. [default: default]",
        ),
    ] = None,
    category: CategoryOption = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Repetitions; number r has the train seed r and the label seed r.")
    ] = 3,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="KEY=A,B,...",
            help="Every configuration with each of these values, as in train.supervision_ratio=0,0.25,1. Repeatable.",
        ),
    ] = None,
    weak: Annotated[
        str | None,
        typer.Option("--weak", metavar="drop,use", help="Short for --over train.weak_labels=drop,use."),
    ] = None,
    set_: SetOption = None,
    paper: Annotated[
        Path | None,
        typer.Option(
            "--paper",
            metavar="FILE",
            help="CSV of published figures (dataset, category, metric, mean_percent, std_percent), shown beside ours "
            "under the official protocol.",
        ),
    ] = None,
    paper_dataset: Annotated[
        str | None, typer.Option("--paper-dataset", metavar="NAME", help="What FILE calls it. [default: DATASET]")
    ] = None,
    tracking_uri: TrackingOption = None,
    num_workers: Annotated[
        int | None,
        typer.Option("--num-workers", help="Ray Train workers per run; 0: none (resources.num_workers)."),
    ] = None,
    use_gpu: UseGpuOption = None,
    json_file: JsonOption = None,
) -> None:
    """Score fixed settings on the test split: mean and deviation over repetitions, and what labels are worth."""
    from tuning.benchmarking.benchmark import benchmark as run_benchmark
    from tuning.benchmarking.table import read_paper

    name = dataset_name(dataset)
    result = run_benchmark(
        dataset=name,
        data_uri=data,
        categories=tuple(category) if category else None,
        configurations=configs or ["default"],
        seeds=seeds,
        sets=[*(set_ or ()), *placement_sets(num_workers, use_gpu)],
        overs=[*(over or ()), *([f"train.weak_labels={weak}"] if weak is not None else ())],
        tracking_uri=resolve_tracking_uri(tracking_uri),
        out=out,
        paper=read_paper(paper, paper_dataset or name) if paper is not None else None,
    )
    print_whole(result.table.table())
    for file in result.files:
        print(f"written: {file}")
    if json_file is not None:
        write_json(json_file, result.to_dict())


@champions.command("promote")
def promote(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="A complete trial's run, as MLflow's pages show it.")],
    tracking_uri: TrackingOption = None,
) -> None:
    """Make a trial, picked by hand, the champion of its category."""
    from tuning.champions.registry import promote as run_promote

    champion = run_promote(run_id, resolve_tracking_uri(tracking_uri))
    print(f"{champion.name} version {champion.version}: {champion.model_uri}")


@champions.command("list")
def list_(
    dataset: Annotated[str | None, typer.Argument(metavar="[DATASET]", help="Only this dataset's champions.")] = None,
    tracking_uri: TrackingOption = None,
    json_file: JsonOption = None,
) -> None:
    """Show the champion of every category, and what it was chosen by."""
    rows = read_champions(resolve_tracking_uri(tracking_uri), dataset)
    if not rows:
        print("no champions yet; `tuning sweep` registers them", file=sys.stderr)
    print_table([{key: row[key] for key in ("model", "version", "validation_objective", "run_id")} for row in rows])
    if json_file is not None:
        write_json(json_file, rows)


@app.command()
def report(
    dataset: DatasetArgument,
    sweep_id: Annotated[str | None, typer.Option("--sweep", metavar="ID", help="By default the latest.")] = None,
    tracking_uri: TrackingOption = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown rather than a table.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Show the leaderboard of a sweep again, read from its runs."""
    from tuning.reporting.report import leaderboard_from_runs
    from tuning.tracking.mlflow_tracker import MLflowTracker
    from tuning.tracking.protocol import PARENT_STAGE

    uri, name = resolve_tracking_uri(tracking_uri), dataset_name(dataset)
    found = MLflowTracker(uri).find_runs(name, sweep_id=sweep_id)
    sweeps = {run.tags["sweep_id"] for run in found if run.stage == PARENT_STAGE}
    runs = [run for run in found if run.tags["sweep_id"] in sweeps]
    if not runs:
        which = f"sweep {sweep_id}" if sweep_id else "any sweep"
        raise SSNError(f"{uri} has no runs of {which} of {name}; check --tracking-uri and the dataset's name")
    latest = sweep_id or next(run for run in reversed(runs) if run.parent_run_id is None).tags["sweep_id"]
    of_sweep = [run for run in runs if run.tags["sweep_id"] == latest]
    leaderboard = leaderboard_from_runs(name, latest, of_sweep, tracking_uri=uri)
    show_leaderboard(leaderboard, markdown=markdown)
    if json_file is not None:
        write_json(json_file, leaderboard.as_dict())


@app.command()
def replay(
    outbox: Annotated[Path, typer.Argument(metavar="OUTBOX", help="The folder that the sweep named.")],
    tracking_uri: Annotated[
        str | None,
        typer.Option("--tracking-uri", metavar="URI", help="Where MLflow is now, if not where the sweep had it."),
    ] = None,
) -> None:
    """Write to MLflow what a sweep could not while MLflow was away, and end the runs that a killed sweep left open."""
    from tuning.tracking.outbox import replay as run_replay

    count = run_replay(outbox, tracking_uri)
    print(f"{count} operations replayed")


def placement_sets(num_workers: int | None, use_gpu: bool | None) -> list[str]:
    """Options of their own as the ``--set`` options that they stand for."""
    given = {"resources.num_workers": num_workers, "resources.use_gpu": use_gpu}
    return [f"{key}={str(value).lower()}" for key, value in given.items() if value is not None]


def search_sets(
    trials: int | None, max_trials: int | None, time_budget: str | None, max_gpu_hours: float | None
) -> list[str]:
    """Options of their own as the ``--set`` options that they stand for."""
    given = {
        "search.trials": trials,
        "search.max_trials": max_trials,
        "search.time_budget": time_budget,
        "search.max_gpu_hours": max_gpu_hours,
    }
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def show_leaderboard(leaderboard: Leaderboard, *, markdown: bool = False) -> None:
    """Print a leaderboard and its notes on stdout."""
    if markdown:
        print(leaderboard.markdown())
        return
    print_whole(leaderboard.table())
    if leaderboard.footer():
        print(leaderboard.footer())


def read_champions(tracking_uri: str, dataset: str | None) -> list[dict[str, Any]]:
    """One row per registered model that has a champion: its name, version, run and the tags it was registered with."""
    from tuning.champions.registry import ALIAS
    from tuning.tracking.mlflow_tracker import explained, open_client

    client = open_client(tracking_uri)
    rows: list[dict[str, Any]] = []
    with explained(tracking_uri):
        token: str | None = ""
        while token is not None:
            page = client.search_registered_models(page_token=token or None)
            for model in page:
                if ALIAS in model.aliases and (dataset is None or model.tags.get("dataset") == dataset):
                    version = client.get_model_version_by_alias(model.name, ALIAS)
                    objective = version.tags.get("validation_objective")
                    rows.append(
                        {
                            "model": model.name,
                            "version": str(version.version),
                            "validation_objective": float(objective) if objective is not None else None,
                            "run_id": version.run_id,
                            "tags": dict(version.tags),
                        }
                    )
            token = page.token or None
    return sorted(rows, key=lambda row: str(row["model"]))


def read_defaults(data_uri: str, dataset: str, categories: Sequence[str] | None) -> dict[str, Any]:
    """The manifest's defaults as they were when the categories were ingested; all must agree.

    Raises:
        SSNError: there are no shards, or the categories were ingested with different defaults.
    """
    from ssn.data.reader import list_categories, open_search_data

    names = list(categories or list_categories(data_uri, dataset))
    defaults = {name: open_search_data(data_uri, dataset, name).info.defaults for name in names}
    for name in names[1:]:
        if defaults[name] != defaults[names[0]]:
            raise SSNError(
                f"categories {names[0]} and {name} of {dataset} were ingested with different manifest defaults; "
                "ingest them again, or sweep them one by one with --category"
            )
    return dict(defaults[names[0]]) if names else {}


def resolve_tracking_uri(tracking_uri: str | None) -> str:
    """The store to use: as given, else a database in the working folder."""
    from tuning.tracking.mlflow_tracker import default_tracking_uri

    return tracking_uri or default_tracking_uri(Path.cwd())
