"""Result files: what is whole counts, and nothing else."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from ssn.config import digest
from ssn.errors import SSNError
from tests.made_up_benchmark import make_info, plan_of, result_of
from tuning.benchmarking.results import FORMAT_VERSION, RESULTS_FOLDER, ResultStore

PLAN = plan_of([make_info()])
RUN = PLAN.runs[0]
RESULT = result_of(RUN, {"image_auroc": 0.9, "image_ap": 0.8})


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore.open(str(tmp_path), "made_up")


def file_of(store: ResultStore) -> Path:
    (file,) = Path(store.files.root, RESULTS_FOLDER, "bolt").iterdir()
    return file


def test_result_is_read_as_it_was_written(store: ResultStore) -> None:
    assert store.read(RUN) is None
    store.write(RESULT)
    assert store.read(RUN) == RESULT
    assert store.read_all(PLAN) == {RUN.key: RESULT}
    assert store.damaged == []
    assert file_of(store).suffix == ".json"


def test_writing_again_replaces(store: ResultStore) -> None:
    store.write(RESULT)
    store.write(replace(RESULT, elapsed_s=11.0))
    found = store.read(RUN)
    assert found is not None
    assert found.elapsed_s == 11.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"image_auroc": 0.9', '"image_auroc": 0.99'),
        lambda text: text.replace('"image_auroc": 0.9', '"image_auroc": NaN'),
        lambda text: text.replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 0'),
    ],
    ids=["half", "empty", "list", "number", "nan", "version"],
)
def test_damaged_file_does_not_count(store: ResultStore, damage: object) -> None:
    store.write(RESULT)
    file = file_of(store)
    before = file.read_text()
    file.write_text(damage(before))  # type: ignore[operator]
    assert file.read_text() != before
    assert store.read(RUN) is None
    assert store.damaged == [str(file)]
    store.write(RESULT)
    assert store.read(RUN) == RESULT


def test_file_of_another_release_does_not_count(store: ResultStore) -> None:
    """Intact, but without a field that is read today."""
    store.write(RESULT)
    file = file_of(store)
    content = json.loads(file.read_text())["content"]
    del content["hardware"]
    file.write_text(json.dumps({"format_version": FORMAT_VERSION, "sha256": digest(content), "content": content}))
    assert store.read(RUN) is None


def test_file_of_another_run_does_not_count(store: ResultStore) -> None:
    store.write(RESULT)
    file_of(store).rename(file_of(store).with_name(f"{PLAN.runs[1].key[:32]}.json"))
    assert store.read(PLAN.runs[1]) is None
    assert len(store.damaged) == 1


def test_half_written_file_is_none(store: ResultStore) -> None:
    """What a killed process leaves beside the place of the result."""
    folder = Path(store.files.root, RESULTS_FOLDER, "bolt")
    folder.mkdir(parents=True)
    (folder / f"{RUN.key[:32]}.json.4711.partial").write_text("{")
    assert store.read(RUN) is None
    assert store.damaged == []


def test_number_that_is_not_finite_is_never_written(store: ResultStore) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write(replace(RESULT, train_loss=float("nan")))
    assert store.read(RUN) is None


def test_benchmark_keeps_its_id(store: ResultStore, tmp_path: Path) -> None:
    first = store.benchmark_id()
    assert store.benchmark_id() == first
    assert ResultStore.open(str(tmp_path), "made_up").benchmark_id() == first
    assert ResultStore.open(str(tmp_path), "other").benchmark_id() != first


def test_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ResultStore.open(str(tmp_path / "file"), "made_up")
    with pytest.raises(SSNError) as error:
        store.benchmark_id()
    assert str(tmp_path / "file") in str(error.value)
    assert "\n" not in str(error.value)


def test_tables_go_beside_the_results(store: ResultStore, tmp_path: Path) -> None:
    store.benchmark_id()
    assert store.write_file("table.md", b"| a |") == str(tmp_path / "made_up/table.md")
    assert (tmp_path / "made_up/table.md").read_bytes() == b"| a |"


def test_results_lie_in_an_object_store_as_well() -> None:
    """fsspec's in-memory store stands in for one: no folders, no renaming, another process finds it by its URI."""
    store = ResultStore.open("memory://bucket/benchmarks", "made_up")
    identifier = store.benchmark_id()
    assert store.read(RUN) is None
    store.write(RESULT)
    again = pickle.loads(pickle.dumps(store))
    assert again.read(RUN) == RESULT
    assert again.benchmark_id() == identifier
    assert again.write_file("table.md", b"| a |") == "memory://bucket/benchmarks/made_up/table.md"
