"""The synthetic dataset: reproducible, exactly masked, and not to be solved by a global statistic."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

import ssn.demo_data
from ssn.demo_data import CATEGORIES, generate, render
from ssn.errors import SSNError

DEFECTS = [(category, defect) for category, kind in CATEGORIES.items() for defect in kind.defects]
Image8 = NDArray[np.uint8]


def grey(image: Image8) -> NDArray[np.float64]:
    return image.astype(np.float64).mean(axis=2)


def local_std_max(image: Image8) -> float:
    g = grey(image)
    mean = ndimage.uniform_filter(g, 9)
    return float(np.sqrt(np.maximum(ndimage.uniform_filter(g * g, 9) - mean * mean, 0)).max())


STATISTICS: dict[str, Callable[[Image8], float]] = {
    "mean": lambda image: float(grey(image).mean()),
    "std": lambda image: float(grey(image).std()),
    "max": lambda image: float(grey(image).max()),
    "min": lambda image: float(grey(image).min()),
    "percentile 1": lambda image: float(np.percentile(grey(image), 1)),
    "percentile 99": lambda image: float(np.percentile(grey(image), 99)),
    "gradient energy": lambda image: float(sum((g**2).mean() for g in np.gradient(grey(image)))),
    "Laplacian variance": lambda image: float(ndimage.laplace(grey(image)).var()),
    "range over deviation": lambda image: float(np.ptp(grey(image)) / grey(image).std()),
    "largest local deviation": local_std_max,
    "colour spread": lambda image: float((image[..., 0].astype(float) - image[..., 2]).std()),
    "saturation": lambda image: float(np.ptp(image.astype(float), axis=2).mean()),
}


def trivial_statistics_auroc(normals: list[Image8], defectives: list[Image8]) -> dict[str, float]:
    """Image AUROC of each statistic, whichever way round it separates."""
    labels = [0] * len(normals) + [1] * len(defectives)
    aurocs = {}
    for name, statistic in STATISTICS.items():
        auroc = float(roc_auc_score(labels, [statistic(image) for image in (*normals, *defectives)]))
        aurocs[name] = max(auroc, 1 - auroc)
    return aurocs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "raw"
    generate(out, train_normals=2)
    return out


def read_all(folder: Path) -> list[Image8]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_layout_is_mvtec_ads(dataset: Path) -> None:
    assert sorted(p.name for p in dataset.iterdir()) == ["NOTICE.txt", *sorted(CATEGORIES)]
    assert "Synthetic" in (dataset / "NOTICE.txt").read_text()
    for category, kind in CATEGORIES.items():
        root = dataset / category
        assert sorted(p.name for p in (root / "test").iterdir()) == sorted(["good", *kind.defects])
        assert len(list((root / "train/good").glob("*.png"))) == 2
        assert len(list((root / "test/good").glob("*.png"))) == 30
        for defect in kind.defects:
            images = sorted(p.stem for p in (root / "test" / defect).glob("*.png"))
            assert images == [f"{i:03d}" for i in range(20)]
            assert sorted(p.stem for p in (root / "ground_truth" / defect).glob("*.png")) == [
                f"{name}_mask" for name in images
            ]
            for mask in read_all(root / "ground_truth" / defect):
                assert mask.shape == (128, 128)
                assert set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_global_statistic_separates_the_test_split(dataset: Path, category: str) -> None:
    normals = read_all(dataset / category / "test/good")
    defectives = [
        im for defect in CATEGORIES[category].defects for im in read_all(dataset / category / "test" / defect)
    ]
    aurocs = trivial_statistics_auroc(normals, defectives)
    assert max(aurocs.values()) <= 0.80, aurocs


def test_the_check_finds_what_a_global_statistic_does_separate() -> None:
    normals = [render("woven", None, seed=0, index=i)[0] for i in range(6)]
    aurocs = trivial_statistics_auroc(normals, [image // 4 for image in normals])
    assert aurocs["mean"] == 1.0
    assert aurocs["std"] == 1.0


@pytest.mark.parametrize(("category", "defect"), DEFECTS)
def test_masks_are_exact_and_defects_visible(category: str, defect: str) -> None:
    """The same photograph with and without the defect differs inside of the mask, and hardly outside."""
    for index in range(4):
        clean, empty = render(category, None, seed=1, index=index)
        marred, mask = render(category, defect, seed=1, index=index)
        assert not empty.any()
        assert 0.002 < mask.mean() < 0.12
        difference = np.abs(marred.astype(float) - clean).max(axis=2)
        beyond = ~ndimage.binary_dilation(mask, iterations=3)  # the camera's blur crosses the mask's rim
        assert difference[beyond].max() <= 1
        assert difference[mask].mean() > 10


def test_the_nuisance_is_larger_than_the_defects_effect_on_brightness_and_contrast() -> None:
    for category, kind in CATEGORIES.items():
        normals = np.array([STATISTICS["mean"](render(category, None, seed=2, index=i)[0]) for i in range(12)])
        for defect in kind.defects:
            shifts = [STATISTICS["mean"](render(category, defect, seed=2, index=i)[0]) - normals[i] for i in range(4)]
            assert np.abs(shifts).max() < normals.std()


def test_contrast_scales_the_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = render("speckled", None, seed=0, index=5)[0].astype(float)
    full = np.abs(render("speckled", "crack", seed=0, index=5)[0] - clean).sum()
    monkeypatch.setattr(ssn.demo_data, "DEFECT_CONTRAST", 0.5)
    half = np.abs(render("speckled", "crack", seed=0, index=5)[0] - clean).sum()
    monkeypatch.setattr(ssn.demo_data, "DEFECT_CONTRAST", 0.0)
    none = np.abs(render("speckled", "crack", seed=0, index=5)[0] - clean).sum()
    assert none == 0
    assert 0.3 * full < half < 0.7 * full


def digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    seen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        steps: list[tuple[str, int, int]] = []
        written = generate(
            tmp_path / name,
            seed=seed,
            size=32,
            train_normals=1,
            test_normals=1,
            test_defects=3,
            on_progress=lambda *step, steps=steps: steps.append(step),
        )
        assert written == dict.fromkeys(CATEGORIES, 5)
        assert steps == [(category, i, 5) for category in CATEGORIES for i in range(1, 6)]
        seen.append(digest(tmp_path / name))
    assert seen[0] == seen[1] != seen[2]


def test_no_two_images_are_alike(dataset: Path) -> None:
    digests = [hashlib.sha256(p.read_bytes()).digest() for p in dataset.rglob("*.png") if "ground_truth" not in p.parts]
    assert len(set(digests)) == len(digests) == 3 * (2 + 30 + 60)


def test_existing_data_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "woven").mkdir()
    with pytest.raises(SSNError, match=r"woven already exists; remove it or choose another --out"):
        generate(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "woven"]


@pytest.mark.parametrize("wrong", [{"size": 31}, {"train_normals": 0}, {"test_defects": 0}])
def test_counts_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(SSNError, match="at least"):
        generate(tmp_path / "out", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
