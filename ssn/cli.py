"""The commands of ``python -m ssn``: one machine, one category at a time.

Commands are thin. They parse, call one function and print what it returns; what a command needs is imported when it
runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ssn.console import print_table, report_progress, run_app, write_csv, write_json
from ssn.errors import SSNError

app = typer.Typer(
    help="SuperSimpleNet surface-defect detection on one machine: prepare data, train, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="Name of a dataset manifest, or the path of your own (YAML).")
]
DataOption = Annotated[str, typer.Option("--data", metavar="URI", help="Where ingest wrote: a folder, s3://, gs://.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting, as in train.epochs=20. Repeatable."),
]
ConfigOption = Annotated[
    list[Path] | None, typer.Option("--config", metavar="FILE", help="YAML file of settings. Repeatable; last wins.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]


def main() -> None:
    """Entry point of ``python -m ssn`` and of the console script."""
    run_app(app)


@app.command()
def ingest(
    dataset: DatasetArgument,
    raw: Annotated[
        Path, typer.Option("--raw", metavar="DIR", help="The dataset's folder as it was published, or your own table.")
    ],
    out: Annotated[
        str | None, typer.Option("--out", metavar="URI", help="Where to write shards: a folder, s3://, gs://.")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", metavar="NAME", help="Only this category. Repeatable.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read and check everything, say what would be written, write nothing.")
    ] = False,
    split_seed: Annotated[int, typer.Option("--split-seed", help="Seed of the assignment of images to splits.")] = 0,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out corrupt images and count them, rather than stop.")
    ] = False,
    protocol: Annotated[
        Literal["validation", "official"],
        typer.Option(
            "--protocol", help="official: the published train and test split as it is, with nothing to search on."
        ),
    ] = "validation",
    fold: Annotated[
        int | None,
        typer.Option("--fold", metavar="K", help="Of a dataset published in folds, the one to test on (official)."),
    ] = None,
    masks: Annotated[
        int | None,
        typer.Option(
            "--masks",
            metavar="N",
            help="Use the N masks that the dataset's published split files choose; without it, all.",
        ),
    ] = None,
) -> None:
    """Turn raw image folders into verified, split Parquet shards."""
    from ssn.data.ingest import ingest as run_ingest
    from ssn.data.manifest import load_manifest

    manifest = load_manifest(dataset)
    with report_progress("images" if check else "steps") as report:
        reports = run_ingest(
            manifest,
            raw,
            out,
            category or None,
            split_seed=split_seed,
            skip_unreadable=skip_unreadable,
            check=check,
            protocol=protocol,
            fold=fold,
            masks=masks,
            on_progress=report,
        )
    for found in reports:
        print("\n".join(found.lines()))


@app.command()
def train(
    dataset: DatasetArgument,
    data: DataOption,
    category: Annotated[str, typer.Option("--category", metavar="NAME", help="The category to train on.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the trained model.")],
    set_: SetOption = None,
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Keep backbone features here for later runs on the same data."),
    ] = None,
    cache_gb: Annotated[
        float, typer.Option("--cache-gb", min=0.0, help="Most the cache may hold; what was used least recently goes.")
    ] = 20.0,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            "--memory-gb",
            min=0.0,
            help="Most memory for backbone features; beyond it the backbone runs on every batch. "
            "[default: half of the machine's]",
        ),
    ] = None,
) -> None:
    """Train one model with fixed settings."""
    from ssn.config import Config
    from ssn.data.reader import open_search_data
    from ssn.loader import load_config

    name = dataset_name(dataset)
    defaults = open_search_data(data, name, category).info.defaults
    settings = load_config(Config, files=config or (), sets=set_ or (), defaults=defaults)

    # after the settings are known to be right: torch takes seconds
    from ssn.feature_cache import FeatureCache
    from ssn.train_job import train as run_train

    feature_cache = FeatureCache(cache, int(cache_gb * 1e9)) if cache is not None else None
    with report_progress("epochs") as report:
        result = run_train(
            settings,
            data_uri=data,
            dataset=name,
            category=category,
            out=out,
            device=pick_device(device),
            cache=feature_cache,
            memory_bytes=int(memory_gb * 1e9) if memory_gb is not None else None,
            on_progress=report,
            on_notice=lambda line: print(f"note: {line}", file=sys.stderr, flush=True),
        )
    print_json(result)


@app.command()
def evaluate(
    model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model.")],
    data: DataOption,
    split: Annotated[str, typer.Option("--split", help="Split to score: test, validation, pool or train.")] = "test",
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Score a trained model on a split of the category it was trained on, with 95 % intervals over its images."""
    from ssn.train_job import evaluate as run_evaluate

    result = run_evaluate(model_dir, data_uri=data, split=split, device=pick_device(device))
    print_json(result)
    if json_file is not None:
        write_json(json_file, result)


@app.command()
def predict(
    model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or folders of images.")],
    json_file: JsonOption = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write the result as CSV.")
    ] = None,
    heatmaps: Annotated[
        Path | None, typer.Option("--heatmaps", metavar="DIR", help="Write each image with its anomaly map over it.")
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        Literal["fp32", "bf16"],
        typer.Option("--precision", help="bf16: for processors with bfloat16 units."),
    ] = "fp32",
) -> None:
    """Score images: the higher the score (a logit), the more likely a defect."""
    from ssn.train_job import predict as run_predict

    with report_progress("images") as report:
        rows = run_predict(
            model_dir,
            images,
            heatmaps=heatmaps,
            device=pick_device(device),
            precision=precision,
            on_progress=report,
        )
    if json_file is not None:
        write_json(json_file, rows)
    if csv_file is not None:
        write_csv(csv_file, rows)
    if json_file is None and csv_file is None:
        print_table(rows)


@app.command()
def export(
    model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write, .onnx or .xml.")],
    format_: Annotated[Literal["onnx", "openvino"], typer.Option("--format", help="Of the runtime.")] = "onnx",
) -> None:
    """Write a model for ONNX Runtime or OpenVINO: image in, anomaly map and score out."""
    from ssn.export import export as run_export

    print(run_export(model_dir, out, format=format_))


@app.command("demo-data")
def demo_data(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write the raw dataset to.")],
    size: Annotated[int, typer.Option("--size", min=32, help="Side of the square images in pixels.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of every image.")] = 0,
) -> None:
    """Write a small synthetic dataset (woven, brushed, speckled) to try the tools on."""
    from ssn.demo_data import generate

    with report_progress("images") as report:
        written = generate(out, seed=seed, size=size, on_progress=report)
    print(f"{sum(written.values())} synthetic images of {', '.join(written)} in {out}")


def dataset_name(dataset: str) -> str:
    """The name under which ``ingest`` stored a dataset that is given by name or by its manifest's path."""
    from ssn.data.manifest import load_manifest

    return load_manifest(dataset).name if dataset.endswith((".yaml", ".yml")) or os.sep in dataset else dataset


def pick_device(device: str) -> str:
    """``auto`` becomes ``cuda`` or ``cpu``; anything else must be a device that torch can use here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA fails an assertion
        reason = str(error).strip().splitlines()[0]
        raise SSNError(f"--device {device} cannot be used here: {reason}; use cpu or auto") from error
    return device


def print_json(value: Any) -> None:
    """Print a result on stdout as indented JSON."""
    json.dump(value, sys.stdout, indent=2, default=str)
    print()
