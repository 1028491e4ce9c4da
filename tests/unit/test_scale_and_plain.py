"""The benchmarks of the platform: replayed curves, the driver's time by part, and the split that both sides share."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ssn.config import Config, flatten
from ssn.data.reader import open_search_data
from tests.benchmarks import replay_scale
from tests.benchmarks.against_plain import DATASET, prepare, to_markdown
from tests.benchmarks.plain_lines import count_lines
from tests.benchmarks.replay_scale import EPOCHS, Split, curve
from tests.raw_folders import write_image


def test_curves_are_the_trials_own_and_always_the_same() -> None:
    def of(category: str, sigma: float) -> list[float]:
        config = flatten(Config()) | {"synthesis.noise_sigma": sigma}
        trial = {"category": category, "trial_key": f"{category}{sigma}", "config": config}
        return [result["objective"] for result in curve(trial) if "objective" in result]

    assert of("a", 0.01) == of("a", 0.01)
    assert len({*of("a", 0.01), *of("a", 0.2), *of("b", 0.01)}) == 9
    assert of("a", 0.01)[0] < of("a", 0.01)[-1]
    assert len(curve({"category": "a", "trial_key": "k", "config": flatten(Config())})) == EPOCHS


def test_time_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner:
        def work(self) -> int:
            now[0] += 3.0
            return 7

    class Outer:
        def work(self) -> int:
            now[0] += 1.0
            return Inner().work()

    now = [0.0]
    monkeypatch.setattr(replay_scale, "perf_counter", lambda: now[0])
    split = Split()
    split.watch(Inner, "work", "inner")
    split.watch(Outer, "work", "outer")
    assert Outer().work() == 7
    assert split.seconds == Counter({"inner": 3.0, "outer": 1.0})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(0)
    for kind, count in (("Free", 20), ("Blowhole", 8), ("Crack", 8)):
        for i in range(count):
            stem = base / "raw" / f"MT_{kind}" / "Imgs" / f"{kind}{i}"
            write_image(stem.with_suffix(".jpg"), rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
            mask = np.zeros((24, 24), np.uint8)
            mask[: 0 if kind == "Free" else 6, :6] = 255
            write_image(stem.with_suffix(".png"), mask)
    prepare(base / "raw", base / "out", images=12)
    return base / "out"


def test_both_sides_get_the_same_images(prepared: Path) -> None:
    counts = open_search_data(str(prepared / "shards"), DATASET, DATASET).info.counts
    files = {
        (split, kind): len(list((prepared / "folders" / split / kind).iterdir()))
        for split in ("train", "validation")
        for kind in ("good", "defect", "masks")
    }
    assert files["train", "good"] == counts["train"].normal
    assert files["train", "defect"] == files["train", "masks"] == counts["pool"].masks > 0
    assert files["validation", "good"] == counts["validation"].normal
    assert files["validation", "defect"] == files["validation", "masks"] == counts["validation"].masks > 0
    before = time.time_ns()
    prepare(prepared / "nowhere", prepared, images=None)  # what is there is not made again
    assert (prepared / "folders").stat().st_mtime_ns < before


def test_table_compares() -> None:
    table = to_markdown(
        {"duration_s": 10.0, "best_validation": 0.9, "lines": 6},
        {"duration_s": 65.0, "best_validation": 0.8, "lines": 80},
    )
    assert "| best validation objective | 0.9000 | 0.8000 |" in table
    assert table.endswith("6.5 times less time")


def test_what_the_user_writes_is_counted() -> None:
    assert 50 < count_lines() < 100
