"""Fronts, their knee and area, and which trial of a front wins."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pytest
from PIL import Image

from ssn.errors import SSNError
from tuning.champions.winner import RecordState, TrialRecord, select_winner
from tuning.search.pareto import Point, contenders, hypervolume, knee, make_points, pareto_front
from tuning.search.pareto_chart import front_csv, write_front
from tuning.settings import ObjectiveSettings

EPOCHS = 9
LABELS = ObjectiveSettings(against="labels")


def points(*pairs: tuple[float, float]) -> list[Point]:
    """Of (cost, objective)."""
    return [Point(objective, cost, index) for index, (cost, objective) in enumerate(pairs)]


def pairs(found: list[Point]) -> list[tuple[float, float]]:
    return [(p.cost, p.objective) for p in found]


def random_points(rng: random.Random) -> list[Point]:
    return [
        Point(rng.choice((0.1, 0.2, 0.3, 0.4, 0.5)), float(rng.randint(0, 6)), index, rng.random() < 0.8)
        for index in range(rng.randint(1, 25))
    ]


def dominates(a: Point, b: Point) -> bool:
    no_worse = a.objective >= b.objective and a.cost <= b.cost
    return no_worse and (a.objective > b.objective or a.cost < b.cost)


def test_front_is_what_no_feasible_point_dominates() -> None:
    for seed in range(300):
        found = random_points(random.Random(seed))
        feasible = [p for p in found if p.feasible]
        expected = {p.index for p in feasible if not any(dominates(other, p) for other in feasible)}
        front = pareto_front(found)
        assert {p.index for p in front} == expected
        assert pairs(front) == sorted(pairs(front)), "by rising cost and objective"


def test_front_does_not_depend_on_the_order() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        found = random_points(rng)
        front = pareto_front(found)
        rng.shuffle(found)
        assert pareto_front(found) == front


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        (((0, 0.5), (2, 0.9), (10, 1.0)), 2),
        (((0, 0.5), (2, 0.55), (10, 1.0)), 10),  # below the line: no bulge
        (((0, 0.5), (5, 0.75), (10, 1.0)), 10),  # on the line
        (((0, 0.5), (10, 1.0)), 10),
        (((3, 0.5),), 3),
        (((0, 0.5), (1, 0.9), (5, 0.95), (10, 1.0)), 1),
    ],
)
def test_knee(front: tuple[tuple[float, float], ...], expected: float) -> None:
    assert knee(pareto_front(points(*front))).cost == expected


def test_knee_does_not_depend_on_units() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        front = pareto_front([Point(rng.random(), rng.random(), index) for index in range(12)])
        scaled = [Point(3 * p.objective - 7, 1000 * p.cost + 5, p.index) for p in front]
        assert knee(scaled).index == knee(front).index


def test_hypervolume_is_the_area_that_a_grid_counts() -> None:
    for seed in range(50):
        found = random_points(random.Random(seed))
        front = pareto_front(found)
        cells = sum(
            any(p.cost <= column and p.objective > row / 10 + 0.05 for p in front)
            for column in range(6)
            for row in range(10)
        )
        assert hypervolume(found, worst_objective=0.0, worst_cost=6.0) == pytest.approx(cells / 10)


def test_more_points_never_lessen_the_hypervolume() -> None:
    for seed in range(50):
        found = random_points(random.Random(seed))
        areas = [hypervolume(found[:n], worst_objective=0.0, worst_cost=7.0) for n in range(len(found) + 1)]
        assert areas == sorted(areas)
        assert areas[0] == 0


def trial(
    index: int, objective: float, labels: int, state: RecordState = "complete", excess: float = -1.0, **metrics: float
) -> TrialRecord:
    epoch = EPOCHS if state == "complete" else 3
    return TrialRecord(
        trial_id=f"t{index}",
        trial_key=f"k{index}",
        category="screw",
        index=index,
        number=index,
        max_epochs=EPOCHS,
        config={},
        params={"synthesis.noise_sigma": 0.1 * (index + 1)},
        state=state,
        epoch=epoch,
        objectives={epoch: objective},
        metrics={"masks_used": labels, "weak_labels_used": 0, "excess_max_masks": excess, **metrics},
    )


TRIALS = [
    trial(0, 0.5, 0),
    trial(1, 0.9, 2),
    trial(2, 0.8, 3),
    trial(3, 0.95, 10),
    trial(4, 0.99, 12, excess=0.2),
    trial(5, 0.99, 1, "pruned"),
    trial(6, 0.95, 11),
]


def test_only_complete_trials_are_points() -> None:
    assert [p.index for p in make_points(TRIALS, "labels")] == [0, 1, 2, 3, 4, 6]


def pick_winner(trials: list[TrialRecord], objective: ObjectiveSettings) -> TrialRecord:
    return select_winner(contenders(trials, objective))


def test_contenders_are_the_front_or_its_knee() -> None:
    assert [t.index for t in contenders(TRIALS, LABELS)] == [0, 1, 3]
    assert [t.index for t in contenders(TRIALS, ObjectiveSettings(against="labels", pick="knee"))] == [1]
    assert contenders(TRIALS, ObjectiveSettings()) == TRIALS


def test_winner_is_the_cheapest_of_the_most_accurate_or_the_knee() -> None:
    assert pick_winner(TRIALS, LABELS).index == 3
    assert pick_winner(TRIALS, ObjectiveSettings(against="labels", pick="knee")).index == 1
    assert pick_winner(TRIALS, ObjectiveSettings()).index == 3
    with pytest.raises(SSNError, match="no winner"):
        pick_winner(TRIALS[4:6], LABELS)


def test_equal_points_go_by_the_rule_for_ties() -> None:
    tied = [trial(0, 0.9, 2, val_image_ap=0.5), trial(1, 0.9, 2, val_image_ap=0.6), trial(2, 0.1, 0)]
    assert pick_winner(tied, LABELS).index == 1


def test_table_has_every_trial() -> None:
    rows = list(csv.DictReader(io.StringIO(front_csv(TRIALS, 3, LABELS))))
    assert [row["index"] for row in rows] == [str(i) for i in range(7)]
    assert [row["on_front"] for row in rows] == ["True", "True", "False", "True", "False", "False", "False"]
    assert [row["labels_used"] for row in rows] == ["0.0", "2.0", "3.0", "10.0", "12.0", "1.0", "11.0"]
    assert rows[5]["objective"] == ""
    assert [i for i, row in enumerate(rows) if row["champion"] == "True"] == [3]
    assert rows[1]["synthesis.noise_sigma"] == "0.2"


def test_picture_and_table_are_written(tmp_path: Path) -> None:
    files = write_front(tmp_path, TRIALS, 3, LABELS, heading="parts, screw", about="Judged by 9 images.")
    assert [f.name for f in files] == ["pareto.png", "pareto.csv"]
    with Image.open(files[0]) as picture:
        assert picture.size[0] > 900
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}
    assert (0x0B, 0x5F, 0xA5) in colours, "the front"
    assert (0xC8, 0x54, 0x1A) in colours, "the champion"
    one = write_front(tmp_path, TRIALS[:1], None, LABELS, heading="parts, screw", about="")
    assert len(one) == 2, "a front of one point"
    assert write_front(tmp_path, TRIALS[5:6], None, LABELS, heading="parts, screw", about="") == []
