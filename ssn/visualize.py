"""Anomaly maps as pictures: an overlay per image, and one figure of a model's best, median and worst cases.

matplotlib is imported only when a picture is drawn, and draws off screen.

Shape legend: H W position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ssn.errors import SSNError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

COLOUR_MAP = "inferno"
CONTOUR_RGB = (0, 255, 128)
"""Ground truth is outlined in a green that neither the colour map nor most surfaces have."""


@dataclass(frozen=True)
class Case:
    """One scored image."""

    image_HW3: np.ndarray
    """uint8 RGB, any size."""
    map_HW: np.ndarray
    """Anomaly map in logits, any size."""
    score: float
    """Image logit."""
    label: int
    """0 normal, 1 defective."""
    mask_HW: np.ndarray | None = None
    """Ground truth, bool, any size; None: no mask."""
    title: str = ""


def overlay_heatmap(
    image_HW3: np.ndarray,
    map_HW: np.ndarray,
    mask_HW: np.ndarray | None = None,
    *,
    value_range: tuple[float, float] | None = None,
    opacity: float = 0.65,
) -> np.ndarray:
    """An image with its anomaly map laid over it and its ground truth outlined.

    The map's low end is transparent, so that a normal surface stays as it is and only what stands out is coloured.

    Args:
        image_HW3: ``[H, W, 3]`` uint8.
        map_HW: ``[h, w]`` logits; resized bilinearly to the image.
        mask_HW: ``[h', w']`` bool; resized to the nearest.
        value_range: Logits shown as the colour scale's two ends; by default where the sigmoid is 0.01 and 0.99, so
            that the same colour means the same in every picture of a model.
        opacity: Of the colour at the scale's upper end, in [0, 1].

    Returns:
        ``[H, W, 3]`` uint8.
    """
    import matplotlib

    height, width = image_HW3.shape[:2]
    level_HW = _normalise(_resize(map_HW.astype(np.float32), (height, width)), value_range or DEFAULT_RANGE)
    colour_HW3 = matplotlib.colormaps[COLOUR_MAP](level_HW)[..., :3] * 255
    alpha_HW1 = (opacity * level_HW)[..., None]
    blended = image_HW3 * (1 - alpha_HW1) + colour_HW3 * alpha_HW1
    out = blended.round().clip(0, 255).astype(np.uint8)
    if mask_HW is not None and mask_HW.any():
        out[outline(_resize_mask(mask_HW, (height, width)), thickness=max(1, min(height, width) // 200))] = CONTOUR_RGB
    return out


DEFAULT_RANGE = (float(np.log(0.01 / 0.99)), float(np.log(0.99 / 0.01)))


def save_overlay(path: Path, image_HW3: np.ndarray, map_HW: np.ndarray, mask_HW: np.ndarray | None = None) -> None:
    """Write :func:`overlay_heatmap` as the format that ``path``'s suffix names, creating its folder.

    Raises:
        SSNError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay_heatmap(image_HW3, map_HW, mask_HW)).save(path)
    except (OSError, ValueError) as error:
        raise SSNError(
            f"cannot write heat map {path}: {error}; give a writable folder and a .png or .jpg name"
        ) from error


def outline(mask_HW: np.ndarray, *, thickness: int = 1) -> np.ndarray:
    """The ``thickness`` pixels around a mask, outside of it, so that nothing of the defect is painted over."""
    from scipy.ndimage import binary_dilation

    return binary_dilation(mask_HW, structure=np.ones((3, 3), bool), iterations=thickness) & ~mask_HW


def pick_cases(cases: Sequence[Case], count: int = 3) -> dict[str, list[Case]]:
    """The cases worth looking at.

    Returns:
        ``best``: the defects with the highest scores; ``median``: those in the middle; ``worst``: the images that rank
        most wrongly, missed defects and false alarms in turn. No case occurs twice.
    """
    defects = sorted((c for c in cases if c.label == 1), key=lambda c: c.score, reverse=True)
    normals = sorted((c for c in cases if c.label == 0), key=lambda c: c.score, reverse=True)
    wrong = [case for pair in zip(defects[::-1], normals, strict=False) for case in pair]
    longer = defects[::-1][len(normals) :] + normals[len(defects) :]
    worst = (wrong + longer)[:count]
    left = [c for c in defects if not any(c is w for w in worst)]
    best = left[:count]
    left = left[count:]
    start = max(0, (len(left) - count) // 2)
    return {"best": best, "median": left[start : start + count], "worst": worst}


def case_figure(cases: Sequence[Case], path: Path, *, title: str = "", count: int = 3) -> None:
    """Draw best, median and worst cases: image with outlined ground truth, anomaly map, and score.

    All maps share one colour scale, from the median of all normal maps' values to the highest value of any map shown.

    Args:
        cases: At least one.
        path: Image file to write; its folder is created.
        title: Above the figure.
        count: Of each kind.

    Raises:
        SSNError: the file cannot be written.
        ValueError: there are no cases.
    """
    if not cases:
        raise ValueError("no cases to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {kind: picked for kind, picked in pick_cases(cases, count).items() if picked}
    shown = [case for picked in rows.values() for case in picked]
    low, high = colour_range(cases, shown)
    columns = max(len(picked) for picked in rows.values())
    figure = Figure(figsize=(4.3 * columns + 1.1, 2.45 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2 * columns, squeeze=False)
    drawn = None
    for row, (kind, picked) in zip(axes, rows.items(), strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for case, image_axis, map_axis in zip(picked, row[::2], row[1::2], strict=False):
            _draw_image(image_axis, case)
            drawn = _draw_map(map_axis, case, low, high)
        row[0].set_ylabel(kind, fontsize=12, weight="bold")
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes.ravel().tolist(), fraction=0.02, pad=0.01, extend="min")
        bar.set_label("anomaly map (logit)", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise SSNError(f"cannot write figure {path}: {error}; give a writable folder and a .png name") from error


def colour_range(cases: Sequence[Case], shown: Sequence[Case]) -> tuple[float, float]:
    """Ends of the shared colour scale: what a normal surface usually has, and the highest value shown."""
    normal = [case.map_HW for case in cases if case.label == 0] or [case.map_HW for case in cases]
    low = float(np.median([np.median(map_HW) for map_HW in normal]))
    high = max(float(case.map_HW.max()) for case in shown)
    return (low, high) if high > low else (low, low + 1.0)


def _draw_image(axis: Axes, case: Case) -> None:
    image_HW3 = case.image_HW3.copy()
    height, width = image_HW3.shape[:2]
    if case.mask_HW is not None and case.mask_HW.any():
        edge = outline(_resize_mask(case.mask_HW, (height, width)), thickness=max(1, min(height, width) // 100))
        image_HW3[edge] = CONTOUR_RGB
    _show(axis, image_HW3, image_HW3.shape[:2])
    name = case.title or ("defective" if case.label else "normal")
    axis.set_title(name if len(name) <= 26 else f"…{name[-25:]}", fontsize=9)


def _draw_map(axis: Axes, case: Case, low: float, high: float) -> AxesImage:
    drawn = _show(axis, case.map_HW, case.image_HW3.shape[:2], cmap=COLOUR_MAP, vmin=low, vmax=high)
    axis.set_title(f"{'defective' if case.label else 'normal'}, score {case.score:+.2f}", fontsize=9)
    return drawn


def _show(axis: Axes, picture: np.ndarray, size: tuple[int, ...], **colours: Any) -> AxesImage:
    # At the image's extent whatever the array's size, in a square panel, so that image and map lie side by side alike.
    height, width = size
    drawn = axis.imshow(picture, extent=(0, width, height, 0), interpolation="bilinear", **colours)
    side = max(height, width)
    axis.set_xlim((width - side) / 2, (width + side) / 2)
    axis.set_ylim((height + side) / 2, (height - side) / 2)
    return drawn


def _normalise(map_HW: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    low, high = value_range
    return np.clip((map_HW - low) / (high - low), 0.0, 1.0)


def _resize(map_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if map_HW.shape == size:
        return map_HW
    return np.asarray(Image.fromarray(map_HW).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _resize_mask(mask_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if mask_HW.shape == size:
        return mask_HW.astype(bool)
    resized = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(resized) > 0
