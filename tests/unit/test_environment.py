"""What a run says of the code and the job that made it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ssn.errors import SSNError
from tuning.sweep import check_lasting
from tuning.tracking.environment import code_digest, environment_tags, job_tags

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory of a submitted job's driver."""
    metadata = {"job_submission_id": "raysubmit_1", "job_name": "raysubmit_1", "line": "7"}
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {}, "metadata": metadata}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_digest_follows_the_code_and_not_its_place(tmp_path: Path) -> None:
    def checkout(name: str, **files: str) -> str:
        for file, text in files.items():
            path = tmp_path / name / file.replace("_", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(text)
        return code_digest(tmp_path / name)

    first = checkout("a", ssn_model="1", tuning_sweep="2")
    assert checkout("b", ssn_model="1", tuning_sweep="2", tests_x="3") == first
    assert checkout("c", ssn_model="1", tuning_sweep="3") != first
    assert checkout("d", ssn_model="1", tuning_other="2") != first


def test_a_job_is_tagged_with_its_id_and_what_was_said_of_it(in_a_job: Path) -> None:
    assert job_tags() == {"ray_job": "raysubmit_1", "ray_job_line": "7"}


def test_outside_a_job_there_is_nothing_to_say_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB, raising=False)
    tags = environment_tags()
    assert not [key for key in tags if key.startswith("ray_job")]
    assert re.fullmatch("[0-9a-f]{64}", tags["code_digest"])


@pytest.mark.parametrize(
    ("out", "tracking_uri", "said"),
    [
        ("runs", "http://127.0.0.1:5000", "--out runs lies in the Ray job's working directory"),
        ("s3://bucket/runs", "sqlite:///mlflow.db", "mlflow.db lies in the Ray job's working directory"),
    ],
)
def test_what_would_be_lost_with_a_job_is_refused(out: str, tracking_uri: str, said: str, in_a_job: Path) -> None:
    with pytest.raises(SSNError, match=re.escape(said)):
        check_lasting(out, tracking_uri)


def test_what_lasts_is_taken(in_a_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_lasting("s3://bucket/runs", "http://127.0.0.1:5000")
    check_lasting("/shared/runs", "sqlite:////shared/mlflow.db")
    monkeypatch.delenv(JOB)
    check_lasting("runs", "sqlite:///mlflow.db")
