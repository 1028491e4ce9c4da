"""What a sweep says of a category: how many labels its champion used, and with how many of their masks."""

from __future__ import annotations

import pytest

from ssn.config import Config, flatten
from ssn.data.reader import SearchData
from tests.planted_features import plant_features
from tuning.champions.category_result import CategoryResult, ChampionScore
from tuning.champions.finalists import Finalist, Selection
from tuning.champions.registry import ChampionVersion
from tuning.champions.winner import TrialRecord
from tuning.reporting.sweep_result import leaderboard_row, parent_summary


@pytest.mark.parametrize(
    ("metrics", "labels", "masks"),
    [
        ({"masks_used": 4, "weak_labels_used": 0}, 4, 4),
        ({"masks_used": 2, "weak_labels_used": 3}, 5, 2),
        ({"masks_used": 0, "weak_labels_used": 5}, 5, 0),
        ({"masks_used": 0}, 0, 0),
    ],
)
def test_labels_used_with_and_without_masks_are_counted(metrics: dict[str, int], labels: int, masks: int) -> None:
    winner = TrialRecord(
        trial_id="t",
        trial_key="k",
        category="plate",
        index=0,
        number=0,
        max_epochs=3,
        config=flatten(Config()),
        params={},
        state="complete",
        epoch=3,
        objectives={3: 0.9},
        metrics=dict(metrics),
    )
    finalist = Finalist(winner, (winner,))
    result = CategoryResult(
        "plate",
        [winner],
        selection=Selection(finalist, (finalist,)),
        scores=[ChampionScore({"image_auroc": 0.8}, {}, 5, 2, b"")],
        champion=ChampionVersion("made_up.plate", "1", "run", created=True),
        run_id="run",
    )
    data = SearchData(plant_features(pool=5, pool_masks=4).info, {})
    row = leaderboard_row(data, result)
    assert (row.train_labels, row.train_masks) == (labels, masks)
    _, tags = parent_summary(data, result)
    assert (tags["train_labels"], tags["train_masks"]) == (str(labels), str(masks))


def test_category_without_a_winner_has_no_labels() -> None:
    row = leaderboard_row(SearchData(plant_features().info, {}), CategoryResult("plate", [], failure="why"))
    assert (row.train_labels, row.train_masks) == (None, None)
