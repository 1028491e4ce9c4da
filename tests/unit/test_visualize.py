"""Pictures of anomaly maps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssn.errors import SSNError
from ssn.visualize import (
    CONTOUR_RGB,
    Case,
    case_figure,
    colour_range,
    outline,
    overlay_heatmap,
    pick_cases,
    save_overlay,
)

GREY = np.full((40, 60, 3), 100, np.uint8)


def make_case(score: float, label: int, size: tuple[int, int] = (8, 8)) -> Case:
    map_HW = np.full(size, -3.0, np.float32)
    map_HW[2:4, 2:4] = score
    mask_HW = np.zeros(GREY.shape[:2], bool)
    mask_HW[10:20, 15:30] = label == 1
    return Case(GREY, map_HW, score, label, mask_HW)


def test_overlay_leaves_normal_surface_as_it_is() -> None:
    assert np.array_equal(overlay_heatmap(GREY, np.full((5, 5), -20.0)), GREY)


def test_overlay_colours_what_stands_out() -> None:
    map_HW = np.full((40, 60), -20.0)
    map_HW[5:10, 5:10] = 20.0
    out = overlay_heatmap(GREY, map_HW)
    changed = (out != GREY).any(axis=-1)
    expected = np.zeros((40, 60), bool)
    expected[5:10, 5:10] = True
    assert np.array_equal(changed, expected)


def test_overlay_is_comparable_across_images() -> None:
    logit = np.full((40, 60), 1.0)
    other = logit.copy()
    other[0, 0] = 30.0
    assert np.array_equal(overlay_heatmap(GREY, logit)[20, 20], overlay_heatmap(GREY, other)[20, 20])


def test_overlay_outlines_ground_truth_outside_of_the_defect() -> None:
    mask_HW = np.zeros((40, 60), bool)
    mask_HW[10:20, 10:20] = True
    out = overlay_heatmap(GREY, np.full((5, 5), -20.0), mask_HW)
    drawn = (out == CONTOUR_RGB).all(axis=-1)
    assert not (drawn & mask_HW).any()
    assert np.array_equal(drawn, outline(mask_HW))
    assert drawn.sum() == 44  # the ring of a 12 x 12 square


def test_overlay_does_not_change_its_arguments() -> None:
    image, map_HW = GREY.copy(), np.zeros((4, 4))
    overlay_heatmap(image, map_HW, np.ones((4, 4), bool))
    assert np.array_equal(image, GREY)
    assert not map_HW.any()


def test_save_overlay_writes_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    save_overlay(path, GREY, np.zeros((4, 4), np.float32))
    with Image.open(path) as picture:
        assert picture.size == (60, 40)


def test_save_overlay_names_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(SSNError, match=r"a\.nosuchformat"):
        save_overlay(tmp_path / "a.nosuchformat", GREY, np.zeros((4, 4), np.float32))


def test_pick_cases_ranks_and_repeats_nothing() -> None:
    defects = [make_case(score, 1) for score in (9, 8, 7, 3, 2, 1, -5)]
    normals = [make_case(score, 0) for score in (6, -6, -7)]
    picked = pick_cases([*normals, *defects], count=2)
    scores = {kind: [(c.label, c.score) for c in cases] for kind, cases in picked.items()}
    assert scores == {"best": [(1, 9), (1, 8)], "median": [(1, 3), (1, 2)], "worst": [(1, -5), (0, 6)]}


@pytest.mark.parametrize("labels", [[1], [0], [1, 1, 1], [0, 0, 0, 0], [0, 1]])
def test_pick_cases_of_few_images(labels: list[int]) -> None:
    cases = [make_case(float(i), label) for i, label in enumerate(labels)]
    picked = [id(case) for kind in pick_cases(cases).values() for case in kind]
    assert len(picked) == len(set(picked))
    assert len(picked) >= min(len(cases), 3)


def test_colour_range_is_shared_and_starts_at_the_normal_surface() -> None:
    cases = [make_case(-2.0, 0), make_case(5.0, 1), make_case(9.0, 1)]
    assert colour_range(cases, cases[:2]) == (-3.0, 5.0)


def test_colour_range_of_flat_maps_is_not_empty() -> None:
    flat = Case(GREY, np.zeros((4, 4), np.float32), 0.0, 0)
    low, high = colour_range([flat], [flat])
    assert low < high


@pytest.mark.parametrize("labels", [[1], [0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
def test_case_figure_writes_a_picture(tmp_path: Path, labels: list[int]) -> None:
    path = tmp_path / "new" / "cases.png"
    case_figure([make_case(float(i), label) for i, label in enumerate(labels)], path, title="bolt")
    with Image.open(path) as picture:
        assert picture.width > 400
        assert picture.height > 200


def test_case_figure_needs_cases(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cases"):
        case_figure([], tmp_path / "a.png")


def test_matplotlib_is_imported_late() -> None:
    code = "import sys, ssn.visualize; sys.exit('matplotlib' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
