"""A search never sees the test split: not its labels, not the names of its files, nothing that opens them."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ssn import engine, features, streaming
from ssn.config import Config, flatten
from ssn.data.reader import TEST_FILE, SearchData, TestData, open_search_data, open_test_data
from ssn.errors import SSNError
from tests.planted_features import plant_features
from tuning.execution import feature_store, objective, train_worker
from tuning.execution.objective import TrialContext, run_trial
from tuning.execution.train_worker import Placement, WorkerSetup
from tuning.search.rungs import Rungs
from tuning.settings import ObjectiveSettings
from tuning.tracking.mlflow_tracker import default_tracking_uri

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 4
TEST_NAMES = re.compile(rf"test-\d+\.parquet|{re.escape(TEST_FILE)}")
"""What the test split is stored under."""

# One sweep, then another after the labels of the test split were shuffled, on the same Ray with one CPU. The trainable
# of the first is ours, so that each of its trials looks around before it trains.
DRIVER = """
import hashlib, json, sys
from dataclasses import replace
from pathlib import Path

import ray

import tuning.execution.tune_run
from ssn.config import unflatten
from tests.integration.test_no_leak import shuffle_test_labels, train_curiously
from tuning.champions.registry import load_trial_model
from tuning.settings import FinalistSettings, ResourceSettings, SearchSettings, SweepSettings
from tuning.search.space_syntax import DEFAULT_SPACE
from tuning.sweep import connect_ray, sweep
from tuning.tracking import MLflowTracker

folder, data_uri, tracking_uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = unflatten(json.loads((folder / "config.json").read_text()))
SPACE = {**DEFAULT_SPACE, "train.weak_labels": ["drop", "use"]}
settings = SweepSettings(
    model=config.model, data=config.data, synthesis=config.synthesis, train=config.train, eval=config.eval,
    search=SearchSettings(
        trials=int(sys.argv[4]), grace_epochs=1, eta=2, max_concurrent=1, space=SPACE, warm_start=False
    ),
    finalists=FinalistSettings(count=1),
    resources=ResourceSettings(use_gpu=False),
)


def run(tracking_uri):
    result = sweep(
        settings, dataset="tiny", data_uri=data_uri, categories=["widget"], tracking_uri=tracking_uri,
        out=folder / "runs",
    )
    (found,) = result.categories
    tracker = MLflowTracker(tracking_uri)
    runs = tracker.find_runs("tiny", sweep_id=result.leaderboard.sweep_id)
    model = load_trial_model(found.run_id, tracking_uri)
    keys = ("trial_key", "index", "state", "epoch", "objectives", "config", "params")
    return {
        "trials": [{k: getattr(t, k) for k in keys} for t in found.trials],
        "metrics": {
            r.tags["trial_index"]: {name: tracker.metric_history(r.run_id, name) for name in r.metrics}
            for r in runs if r.parent_run_id is not None
        },
        "champion": {
            "index": found.winner.index,
            "weights": {
                name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
                for name, value in sorted(model.tensors.items())
            },
        },
        "test": dict(found.score.metrics),
    }


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
train_in_trial = tuning.execution.tune_run.train_in_trial
tuning.execution.tune_run.train_in_trial = train_curiously
said = {"before": run(tracking_uri)}
tuning.execution.tune_run.train_in_trial = train_in_trial
shuffle_test_labels(Path(data_uri) / "tiny" / "widget")
# with a registry of its own: the champion that is there already would stay, and nothing be scored
said["after"] = run(tracking_uri.replace("mlflow.db", "mlflow-after.db"))
(folder / "said.json").write_text(json.dumps(said))
"""


def shuffle_test_labels(folder: Path) -> None:
    """Give every test image the label, mask and defect type of another; ids, images and splits stay."""
    for path in sorted(folder.glob("test-*.parquet")):
        rows = pq.ParquetFile(path).metadata.row_group(0).num_rows
        table = pq.read_table(path)
        order = np.random.default_rng(0).permutation(table.num_rows)
        for name in ("label", "mask", "defect_type"):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), table.column(name).take(order))
        pq.write_table(table, path, row_group_size=rows, compression="none", write_page_checksum=True)


# What a trial finds when it looks.


def reach(*roots: object) -> Iterator[object]:
    """Every object that can be reached from some: items, attributes, what closures and methods hold; not modules, types
    and the globals of functions, which are code."""
    seen: set[int] = set()
    queue: list[object] = list(roots)
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, types.ModuleType | type | types.CodeType):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, types.FunctionType):
            queue += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
        else:
            queue += gc.get_referents(thing)


def look_for_test_split(*roots: object) -> list[str]:
    """What leads to the test split: names of its files in any text, and whatever opens them."""
    found = []
    # reach() must keep what it has seen alive: ids are used again
    for thing in list(reach(*roots)):
        text = thing.decode(errors="replace") if isinstance(thing, bytes) else thing
        if isinstance(text, str | os.PathLike) and TEST_NAMES.search(os.fspath(text)):
            found.append(f"names {os.fspath(text)[:200]}")
        if isinstance(thing, TestData) or thing is open_test_data:
            found.append(f"holds {type(thing).__name__}")
    return found


def open_files() -> list[str]:
    """Paths of the files that this process has open or mapped."""
    links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if link.is_symlink()] + Path("/proc/self/maps").read_text().splitlines()


def train_curiously(trial: dict[str, Any], setup: WorkerSetup) -> None:
    """A trainable that notes what leads to the test split from all that a trial is given, and then trains as ever."""
    from ray import tune

    def look_around(*arguments: Any, **named: Any) -> None:
        context: TrialContext = arguments[1]
        found = look_for_test_split(trial, setup, arguments, named, dict(os.environ), sys.argv, open_files())
        try:
            context.data.stream("test")  # type: ignore[arg-type]
            found.append("reads the test split when asked to")
        except SSNError as error:
            refusal = str(error)
        folder = Path(setup.storage_path).parents[4] / "found"
        folder.mkdir(exist_ok=True)
        reached = {thing for thing in reach(trial, setup, arguments, named) if isinstance(thing, str)}
        shards = sorted(name for name in reached if name.endswith(".parquet"))
        note = {"found": found, "refusal": refusal, "shards": shards, "process": os.getpid()}
        (folder / f"{tune.get_context().get_trial_id()}.json").write_text(json.dumps(note))
        run_trial(*arguments, **named)

    train_worker.run_trial = look_around
    train_worker.train_in_trial(trial, setup)


# The sweeps.


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no_leak")
    shutil.copytree(tiny_data, folder / "shards")
    config = replace(tiny_config, train=replace(tiny_config.train, epochs=3))
    (folder / "config.json").write_text(json.dumps(flatten(config)))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, folder, folder / "shards", default_tracking_uri(folder), TRIALS]
    done = subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, cwd=folder, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.integration
@pytest.mark.slow
def test_shuffled_test_labels_change_nothing_but_test_metrics(folder: Path, tiny_data: Path) -> None:
    """Bit for bit: every trial's parameters and metrics after every epoch, the champion's settings and its weights."""
    before, after = (json.loads((folder / "said.json").read_text())[when] for when in ("before", "after"))
    assert len(before["trials"]) == TRIALS
    assert before["trials"] == after["trials"]
    assert before["champion"] == after["champion"]
    assert len(before["champion"]["weights"]) > 10

    def validation(said: dict[str, Any]) -> dict[str, Any]:
        return {
            index: {
                name: history
                for name, history in metrics.items()
                if name.startswith(("val_", "train_loss", "objective", "masks_used", "weak_labels_used"))
            }
            for index, metrics in said["metrics"].items()
        }

    assert validation(before) == validation(after)
    assert sorted(validation(before)) == [str(index) for index in range(TRIALS)]
    assert {"val_loss", "val_image_auroc", "train_loss", "objective"} <= set(validation(before)["0"])

    # the shuffle had teeth: the same champion scores differently, on the same images under other labels
    assert before["test"].keys() == after["test"].keys()
    assert before["test"]["image_auroc"] != after["test"]["image_auroc"]
    assert before["test"]["pixel_ap"] != after["test"]["pixel_ap"]
    was, now = (list(open_test_data(str(uri), "tiny", "widget").stream()) for uri in (tiny_data, folder / "shards"))
    assert [(s.id, s.image, s.split) for s in was] == [(s.id, s.image, s.split) for s in now]
    assert [s.label for s in was] != [s.label for s in now]
    assert sorted(s.label for s in was) == sorted(s.label for s in now)


@pytest.mark.integration
@pytest.mark.slow
def test_curious_trials_find_nothing_of_the_test_split(folder: Path) -> None:
    """Real trials in Ray's processes: arguments, what they hold, the environment and open files."""
    notes = [json.loads(path.read_text()) for path in sorted((folder / "found").glob("*.json"))]
    assert len(notes) == TRIALS
    for note in notes:
        assert note["found"] == []
        assert note["refusal"].startswith("a search reads train, pool, validation, never 'test'")
        # it looked deep enough to find the names of the other splits' files
        assert note["shards"] == [f"{split}-00000.parquet" for split in ("pool", "train", "validation")]
        assert note["process"] != os.getpid()


@pytest.fixture
def arguments(tiny_data: Path) -> tuple[dict[str, Any], TrialContext, WorkerSetup, Any]:
    """What a sweep gives to a trial."""
    data = open_search_data(str(tiny_data), "tiny", "widget")
    context = TrialContext(data=data, objective=ObjectiveSettings(), rungs=Rungs(1))
    setup = WorkerSetup(
        contexts={"widget": context},
        data_uri=str(tiny_data),
        weights_digests={},
        store_name="store",
        namespace="sweep",
        placement=Placement(num_workers=0, use_gpu=False, cpus=1, gpus=0),
        storage_path="runs",
        storage_filesystem=None,
    )
    return {"trial_key": "k", "category": "widget", "index": 0, "config": {}}, context, setup, plant_features()


def test_nothing_that_a_trial_receives_leads_to_the_test_split(arguments: tuple[Any, ...]) -> None:
    import cloudpickle

    assert look_for_test_split(*arguments) == []
    pickled = cloudpickle.dumps(arguments)
    assert TEST_NAMES.search(pickled.decode(errors="replace")) is None
    assert b"train-00000.parquet" in pickled
    assert look_for_test_split(cloudpickle.loads(pickled)) == []
    context = arguments[1]
    with pytest.raises(SSNError, match="a search reads train, pool, validation, never 'test'; use open_test_data"):
        context.data.stream("test")


@pytest.mark.parametrize("way", ["handle", "closure", "method", "name", "bytes", "attribute", "function"])
def test_every_way_to_the_test_split_would_be_found(way: str, tiny_data: Path, arguments: tuple[Any, ...]) -> None:
    test, setup = open_test_data(str(tiny_data), "tiny", "widget"), arguments[2]
    data: SearchData = arguments[1].data

    def closure() -> TestData:
        return test

    ways: dict[str, Callable[[], object]] = {
        "handle": lambda: replace(setup, finish=test),
        "closure": lambda: replace(setup, finish=closure),
        "method": lambda: replace(setup, finish=functools.partial(test.stream, rank=0)),
        "name": lambda: replace(setup, storage_path=str(tiny_data / "tiny" / "widget" / "test-00000.parquet")),
        "bytes": lambda: [b"tiny/widget/test.json"],
        "attribute": lambda: data.__dict__.setdefault("also", [{"test": test}]) and setup,
        "function": lambda: {"open": open_test_data},
    }
    assert look_for_test_split(arguments) == []
    assert look_for_test_split(ways[way](), arguments)


@pytest.mark.parametrize("module", [engine, feature_store, features, objective, streaming, train_worker])
def test_code_that_trials_run_cannot_open_the_test_split(module: types.ModuleType) -> None:
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert not re.search(r"open_test_data|TestData|TEST_FILE", source)
