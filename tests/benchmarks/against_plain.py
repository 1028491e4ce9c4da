"""The same real sweep with this project and as written by hand: total time, best validation result, lines of code.

Both sides search noise sigma, Perlin threshold and the share of labelled defects on magnetic tile, with the same images
and split, the same backbone and weights, epochs, images an epoch, learning rates and their schedule, no flips, and
successive halving with the same rungs; one core a trial, as many trials at once as there are cores. Pixel metrics are
computed at the size of the images. By hand is ``tests.benchmarks.plain_use``; it looks at the validation images after
every epoch, this project when trials are compared. This project's time includes what the other does not do: images of
the splits are read from shards, every run is tracked, and the champion is scored on test and registered.

Each side's result is kept in ``--out``, and is not measured again.

    python -m tests.benchmarks.against_plain --raw magnetic_tile --weights resnet18.safetensors --out against
    python -m tests.benchmarks.against_plain ... --trials 2 --epochs 1 --draws 16 --images 12    # a try
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssn.data.ingest import ingest
from ssn.data.manifest import load_manifest
from ssn.data.reader import open_search_data
from tests.benchmarks.measure import describe_machine
from tests.benchmarks.plain_lines import count_lines

DATASET = "magnetic_tile"
ROOT = Path(__file__).resolve().parents[2]


def prepare(raw: Path, out: Path, images: int | None) -> None:
    """Shards for one side, folders for the other, of the same split.

    Args:
        raw: The dataset as it is published.
        out: Where ``shards`` and ``folders`` go.
        images: Only so many of every kind; None: all.
    """
    if (out / "folders").is_dir():
        return
    if images is not None:
        raw = _some(raw, out / "raw", images)
    ingest(load_manifest(DATASET), raw, str(out / "shards"))
    data = open_search_data(str(out / "shards"), DATASET, DATASET)
    partial = out / "partial-folders"
    shutil.rmtree(partial, ignore_errors=True)
    left_out: Counter[str] = Counter()
    for split, name in (("train", "train"), ("pool", "train"), ("validation", "validation")):
        for kind in ("good", "defect", "masks"):
            (partial / name / kind).mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(data.stream(split)):  # type: ignore[arg-type]
            file = f"{split}-{number:05d}.png"  # whatever the bytes are: PIL looks at them, not at the name
            if sample.label and sample.mask is None:
                left_out[split] += 1  # nothing to learn pixels from
                continue
            (partial / name / ("defect" if sample.label else "good") / file).write_bytes(sample.image)
            if sample.label:
                assert sample.mask is not None
                (partial / name / "masks" / file).write_bytes(sample.mask)
    say(f"defective images without a mask, left out of the folders: {dict(left_out)}")
    partial.rename(out / "folders")


def _some(raw: Path, target: Path, images: int) -> Path:
    for folder in sorted(raw.glob("MT_*")):
        (target / folder.name / "Imgs").mkdir(parents=True, exist_ok=True)
        for image in sorted((folder / "Imgs").glob("*.jpg"))[:images]:
            for file in (image, image.with_suffix(".png")):
                if file.exists():
                    shutil.copy(file, target / folder.name / "Imgs")
    return target


def our_settings(a: argparse.Namespace) -> str:
    """The YAML file that a user of this project writes; what is searched are its defaults."""
    return (
        f"model: {{backbone: resnet18, weights: {Path(a.weights).absolute()}, variant: jims}}\n"
        f"data: {{image_size: [{a.size}, {a.size}]}}\n"
        f"eval: {{size: [{a.size}, {a.size}], every_n_epochs: {a.epochs}}}\n"
        f"train: {{epochs: {a.epochs}, batch_size: {a.batch}, draws_per_epoch: {a.draws}, precision: {a.precision}, "
        # the other side flips nothing either
        "flip_defects: false}\n"
        f"search: {{trials: {a.trials}, grace_epochs: 1, eta: 3}}\n"
        # the other side trains nothing again
        "finalists: {count: 1, seeds: 1}\n"
    )


def run_ours(a: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Sweep with this project."""
    settings = out / "ours.yaml"
    settings.write_text(our_settings(a))
    shutil.rmtree(out / "ours", ignore_errors=True)
    command = [sys.executable, "-m", "tuning", "sweep", DATASET, "--data", str(out / "shards")]
    command += ["--config", str(settings), "--out", str(out / "ours"), "--json", str(out / "leaderboard.json")]
    command += ["--tracking-uri", f"sqlite:///{(out / 'ours' / 'mlflow.db').absolute()}"]
    (out / "ours").mkdir(parents=True)
    duration_s = _time(command)
    category = json.loads((out / "leaderboard.json").read_text())["categories"][DATASET]
    return {
        "duration_s": duration_s,
        # the settings, and the commands that ingest and sweep
        "lines": len(settings.read_text().splitlines()) + 2,
        "best_validation": category["validation"]["objective"],
        "trials": category["trials"],
        "epochs": sum(trial["epoch"] for trial in category["history"]),
        "config": category["params"],
        "sweep": category,
    }


def run_plain(a: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Sweep as by hand."""
    shutil.rmtree(out / "plain", ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.plain_use"]
    command += ["--data", str((out / "folders").absolute()), "--out", str(out / "plain"), "--weights", a.weights]
    command += ["--json", str(out / "plain_found.json")]
    for name in ("trials", "epochs", "draws", "batch", "size"):
        command += [f"--{name}", str(getattr(a, name))]
    duration_s = _time(command)
    found = json.loads((out / "plain_found.json").read_text())
    return {"duration_s": duration_s, "lines": count_lines(), **found}


def _time(command: Sequence[str]) -> float:
    say(" ".join(command))
    start = time.perf_counter()
    # Ray would otherwise make a token file that later clusters of this user then insist on
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    return time.perf_counter() - start


def to_markdown(ours: dict[str, Any], plain: dict[str, Any]) -> str:
    """Both sides, and how much less the first takes."""
    rows = [
        ("total time, s", f"{ours['duration_s']:.0f}", f"{plain['duration_s']:.0f}"),
        ("best validation objective", f"{ours['best_validation']:.4f}", f"{plain['best_validation']:.4f}"),
        ("lines of user code", str(ours["lines"]), str(plain["lines"])),
    ]
    return "\n".join(
        [
            "| | this project | Ray Tune, Optuna and anomalib by hand |",
            "|:---|---:|---:|",
            *(f"| {name} | {own} | {their} |" for name, own, their in rows),
            "",
            f"{plain['duration_s'] / ours['duration_s']:.1f} times less time",
        ]
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="magnetic tile as published")
    parser.add_argument("--weights", required=True, help="torchvision's ResNet18, a safetensors file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--draws", type=int, default=72, help="images per epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--size", type=int, default=256, help="above 64: anomalib cannot draw its noise for smaller maps"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of this project's side")
    parser.add_argument("--images", type=int, help="only so many of every kind, for a try")
    parser.add_argument("--only", choices=("ours", "plain"), help="measure one side")
    a = parser.parse_args(argv)
    a.out = a.out.absolute()
    a.out.mkdir(parents=True, exist_ok=True)
    prepare(a.raw, a.out, a.images)
    sides: dict[str, dict[str, Any]] = {}
    for name, run in (("ours", run_ours), ("plain", run_plain)):
        kept = a.out / f"{name}.json"
        if not kept.exists() and a.only in (None, name):
            kept.write_text(json.dumps({**run(a, a.out), "machine": describe_machine(1)}, indent=1))
        if kept.exists():
            sides[name] = json.loads(kept.read_text())
    if len(sides) == 2:
        print(to_markdown(sides["ours"], sides["plain"]))


if __name__ == "__main__":
    main()
