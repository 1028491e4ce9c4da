"""Pixel metrics of 150 million pixels, as many as KolektorSDD2's test split has: memory beyond the start, and time.

``python -m tests.benchmarks.aupro_memory``. Each side works in a process of its own, from maps and masks that come
image by image; Linux alone, as ``tests.benchmarks.probe``.

* ``ours``: what ``ssn.evaluation`` does with a split: maps and masks to temporary files, then pixel AUROC, pixel AP and
  AUPRO, all exact.
* ``plain sort``: scikit-learn's ``roc_auc_score`` of all pixels at once: pixel AUROC alone, a third of the work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssn.metrics import pixel_metrics
from ssn.spool import Spool
from tests.benchmarks.probe import peak_beyond_now


@dataclass(frozen=True)
class Split:
    """How much there is to score; by default as KolektorSDD2's test split at 232 x 640."""

    images: int = 1004
    height: int = 232
    width: int = 640
    defective: int = 110

    def draw(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Map and mask of each image: noise, and defects of 2 % of an image where scores are higher."""
        rng = np.random.default_rng(0)
        for index in range(self.images):
            map_HW = rng.standard_normal((self.height, self.width), np.float32)
            mask_HW = np.zeros((self.height, self.width), bool)
            if index < self.defective:
                for _ in range(2):
                    top, left = (int(rng.integers(side - side // 10)) for side in mask_HW.shape)
                    mask_HW[top : top + self.height // 10, left : left + self.width // 10] = True
                map_HW[mask_HW] += 2
            yield map_HW, mask_HW


def score_ours(split: Split) -> dict[str, float]:
    """All three metrics, as ``ssn.evaluation`` computes them."""
    shape = (split.height, split.width)
    with Spool(shape, np.float32) as maps, Spool(shape, bool) as masks:
        for map_HW, mask_HW in split.draw():
            maps.append(map_HW)
            masks.append(mask_HW)
        return pixel_metrics(maps, masks).values


def score_plainly(split: Split) -> dict[str, float]:
    """Pixel AUROC by a sort of everything."""
    from sklearn.metrics import roc_auc_score

    shape = (split.images, split.height, split.width)
    maps, masks = np.empty(shape, np.float32), np.empty(shape, bool)
    for index, (map_HW, mask_HW) in enumerate(split.draw()):
        maps[index], masks[index] = map_HW, mask_HW
    return {"pixel_auroc": float(roc_auc_score(masks.ravel(), maps.ravel()))}


SIDES: dict[str, Callable[[Split], dict[str, float]]] = {"ours": score_ours, "plain sort": score_plainly}


def measure(side: str, split: Split) -> dict[str, Any]:
    """A side's figures, from a process of its own.

    Raises:
        MemoryError: the process did not live to tell.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.aupro_memory", "--measure", json.dumps([side, asdict(split)])],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode != 0:
        raise MemoryError(f"{side}: ended with status {done.returncode}, -9 being the kernel's when it runs out")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _measure_here(side: str, split: Split) -> dict[str, Any]:
    if side == "plain sort":
        import sklearn.metrics  # noqa: F401 (what it takes to import is not what is measured)
    pixel_metrics(np.zeros((1, 2, 2)), np.eye(2)[None])
    start = time.perf_counter()
    for _ in split.draw():
        pass
    draw_s = time.perf_counter() - start
    values: dict[str, float] = {}
    start = time.perf_counter()
    peak = peak_beyond_now(lambda: values.update(SIDES[side](split)))
    return {"peak_bytes": peak, "duration_s": time.perf_counter() - start - draw_s, "metrics": values}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Split()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=SIDES, help="one side; the plain sort needs 8 GB by default")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        side, split = json.loads(arguments.measure)
        print(json.dumps(_measure_here(side, Split(**split))))
        return
    split = Split(**{name: getattr(arguments, name) for name in asdict(defaults)})
    print(f"{split.images * split.height * split.width / 1e6:.1f} million pixels, {split.defective} defective images")
    for side in [arguments.only] if arguments.only else SIDES:
        found = measure(side, split)
        metrics = ", ".join(f"{name} {value:.6f}" for name, value in found["metrics"].items())
        print(f"{side}: peak {found['peak_bytes'] / 1e6:.0f} MB, {found['duration_s']:.1f} s; {metrics}", flush=True)


if __name__ == "__main__":
    main()
