"""A Ray that does not start: what can be mended is said in one line, everything else keeps its traceback."""

from __future__ import annotations

from typing import Any

import pytest
import ray

import tuning.sweep
from ssn.errors import SSNError
from tuning.sweep import connect_ray


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(tuning.sweep, "_RAY_ENVIRONMENT", {})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**arguments: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, Exception("The current node timed out during startup. This could happen because ..."))
    with pytest.raises(SSNError, match="Ray did not start in time on this machine: it is too busy"):
        connect_ray()


def test_another_failure_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, Exception("out of file descriptors"))
    with pytest.raises(Exception, match=r"^out of file descriptors$"):
        connect_ray()


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    refuse(monkeypatch, ConnectionError("no answer\nsecond line"))
    with pytest.raises(SSNError, match=r"^cannot join the Ray cluster at RAY_ADDRESS=10\.0\.0\.1:6379: no answer$"):
        connect_ray()
