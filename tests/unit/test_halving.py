"""Successive halving, replayed on curves: fair to cheap trials, and to categories whose curves differ."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest

from tuning.search.halving import Halving

RUNGS, EPOCHS, ETA = (1, 3, 9), 27, 3
Curve = Callable[[int], float]


def survivors(
    curves: dict[str, Curve], order: list[tuple[str, int]], costs: dict[str, float] | None = None
) -> set[str]:
    """Names of the curves that reach the last epoch, reports arriving in the given order."""
    halving, stopped = Halving(RUNGS, ETA), set()
    for name, epoch in order:
        if name not in stopped and not halving.goes_on(name, epoch, curves[name](epoch), (costs or {}).get(name, 0.0)):
            stopped.add(name)
    return curves.keys() - stopped


def arrivals(names: list[str], rng: random.Random) -> list[tuple[str, int]]:
    """Every trial's rungs in their order, trials interleaved by chance."""
    left = {name: list(RUNGS) for name in names}
    order = []
    while left:
        name = rng.choice(sorted(left))
        order.append((name, left[name].pop(0)))
        if not left[name]:
            del left[name]
    return order


def drawn_curves(rng: random.Random, *, count: int, speed: float, spread: float, level: float) -> dict[str, Curve]:
    """Curves of one category that approach their ends at a speed of its own, with some noise on the way."""

    def one(name: str) -> Curve:
        end, noise = level + spread * rng.random(), {e: spread * rng.gauss(0, 0.05) for e in (*RUNGS, EPOCHS)}
        return lambda epoch: end * (1 - math.exp(-epoch / speed)) + noise[epoch]

    return {f"t{i}": one(f"t{i}") for i in range(count)}


TRANSFORMS: dict[str, Callable[[float, int], float]] = {
    "saturated": lambda value, epoch: 0.99 + 0.001 * value,
    "hard": lambda value, epoch: 0.01 * value - 5,
    "slow": lambda value, epoch: value * epoch / EPOCHS,
    "bent": lambda value, epoch: math.exp(3 * value),
    "falling": lambda value, epoch: value - epoch,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("seed", range(10))
def test_scale_and_speed_of_a_category_change_no_decision(transform: str, seed: int) -> None:
    """The same trials on another scale, however strange: the very same ones go on."""
    rng = random.Random(seed)
    curves = drawn_curves(rng, count=24, speed=5, spread=0.3, level=0.5)
    order = arrivals(list(curves), rng)

    def bend(curve: Curve) -> Curve:
        return lambda epoch: TRANSFORMS[transform](curve(epoch), epoch)

    assert survivors({name: bend(curve) for name, curve in curves.items()}, order) == survivors(curves, order)


def test_categories_keep_the_same_share_of_their_trials() -> None:
    """Fast and slow, spread and crowded, easy and hard: independent draws, the same mean share of survivors."""
    kinds = {
        "fast": {"speed": 1.0, "spread": 0.3, "level": 0.5},
        "slow": {"speed": 30.0, "spread": 0.3, "level": 0.5},
        "crowded": {"speed": 5.0, "spread": 0.01, "level": 0.95},
        "spread": {"speed": 5.0, "spread": 0.9, "level": 0.0},
    }
    shares = {}
    for number, (kind, shape) in enumerate(kinds.items()):
        kept = 0
        for seed in range(60):
            rng = random.Random(1000 * number + seed)
            curves = drawn_curves(rng, count=32, **shape)
            kept += len(survivors(curves, arrivals(list(curves), rng)))
        shares[kind] = kept / (60 * 32)
    # a share's standard error over 60 replays is about 0.01
    assert max(shares.values()) - min(shares.values()) < 0.05, shares
    assert all(1 / ETA**3 < share < 0.4 for share in shares.values()), shares


def test_equal_costs_are_plain_halving() -> None:
    rng = random.Random(0)
    curves = drawn_curves(rng, count=30, speed=5, spread=0.3, level=0.5)
    order = arrivals(list(curves), rng)
    assert survivors(curves, order, dict.fromkeys(curves, 7.0)) == survivors(curves, order)


def replays() -> Iterator[tuple[dict[str, Curve], list[tuple[str, int]], dict[str, float]]]:
    for seed in range(40):
        rng = random.Random(seed)
        curves = drawn_curves(rng, count=20, speed=4, spread=0.4, level=0.4)
        costs = {name: float(rng.choice((0, 1, 2, 5, 10))) for name in curves}
        yield curves, arrivals(list(curves), rng), costs


def test_trial_that_none_beats_at_its_cost_or_below_always_goes_on() -> None:
    """Property: whoever is on the front of objective against cost at every rung is never stopped."""
    stopped = 0
    for curves, order, costs in replays():
        kept = survivors(curves, order, costs)
        stopped += len(curves) - len(kept)
        for name, curve in curves.items():
            on_front = all(
                curve(epoch) >= curves[other](epoch)
                for epoch in RUNGS
                for other in curves
                if costs[other] <= costs[name]
            )
            assert name in kept or not on_front
    assert stopped > 100


def test_dearer_trials_never_stop_a_cheaper_one() -> None:
    """Property: what is left of the cheap ones is what would be left without the dear ones."""
    for curves, order, costs in replays():
        limit = 2.0
        cheap = {name: curve for name, curve in curves.items() if costs[name] <= limit}
        alone = survivors(cheap, [(name, epoch) for name, epoch in order if name in cheap], costs)
        assert survivors(curves, order, costs) & cheap.keys() == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_objective_that_is_no_number_is_the_worst_of_its_rung(bad: float) -> None:
    halving = Halving(RUNGS, ETA)
    assert halving.goes_on("good", 1, 0.5)
    assert not halving.goes_on("bad", 1, bad)
    assert halving.goes_on("good2", 1, 0.6)


def test_reports_between_rungs_and_repeated_ones_stop_nothing() -> None:
    halving = Halving(RUNGS, ETA)
    assert halving.goes_on("a", 1, 0.9)
    assert halving.goes_on("b", 2, 0.1)
    assert not halving.goes_on("b", 3, -1.0) or halving.goes_on("c", 3, 0.0)
    assert halving.goes_on("a", 1, -1.0)
    assert str(halving).startswith("1 trials at epoch 1")
