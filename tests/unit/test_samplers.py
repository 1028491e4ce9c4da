"""The replay by which samplers are compared, and that ours is worth more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import optuna
import pytest

from tests.benchmarks.samplers import METHODS, OURS, SPACES, replay
from tuning.settings import Against


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("against", ["none", "labels"])
def test_replay_depends_on_its_seed_alone(against: Against) -> None:
    space = SPACES["5 axes, one conditional"]
    first = [replay(METHODS[OURS], space, 8, seed, against) for seed in (0, 1)]
    assert [replay(METHODS[OURS], space, 8, seed, against) for seed in (0, 1)] == first
    assert first[0] != first[1]
    assert all(0 < value < 1.1 for value in first)


def test_ours_finds_more_than_chance() -> None:
    space = SPACES["3 axes"]
    ours, chance = (
        statistics.fmean(replay(METHODS[name], space, 32, seed, "none") for seed in range(8))
        for name in (OURS, "random")
    )
    assert ours > chance
