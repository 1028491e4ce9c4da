"""No fault costs more than it must; see ``faults.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.faults import FAULTS, Bench, cluster, inflict

pytestmark = [pytest.mark.integration, pytest.mark.faults]

Where = tuple[str, int, Path]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Where]:
    with cluster(tmp_path_factory.mktemp("faults")) as found:
        yield found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_nothing_is_lost_nor_doubled_nor_left_running(
    fault: Callable[[Bench], float], where: Where, tmp_path: Path
) -> None:
    cost = inflict(fault, tmp_path / "sweep", where)
    assert (cost.lost, cost.doubled, cost.stale) == (0, 0, 0)
