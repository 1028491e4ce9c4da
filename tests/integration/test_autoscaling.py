"""Demand starts nodes and idleness ends them; GPUs that could come count."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.integration import autoscaling

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_sweep_scales_the_cluster_from_none_to_two_and_back(tmp_path: Path) -> None:
    outcome = autoscaling.run(tmp_path)
    assert outcome.placement == [True, 1, "2 CPU, 2 GPU (as its autoscaler may grow it)", 0]
    nodes = [count for _, count in outcome.workers]
    assert (nodes[0], max(nodes), nodes[-1]) == (0, 2, 0)
    peak = nodes.index(2)
    assert all(before <= after for before, after in pairwise(nodes[: peak + 1]))
    assert "6/6 trials, 0 running, 0 pruned, 0 failed" in outcome.output
    picture = tmp_path / "nodes.png"
    autoscaling.draw(outcome, picture)
    assert picture.stat().st_size > 0
