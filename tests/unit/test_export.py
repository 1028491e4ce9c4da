"""Exported models give what the predictor gives, in the runtimes they are for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ssn.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, preprocess
from ssn.errors import SSNError
from ssn.export import Format, export
from ssn.predictor import Predictor
from tests.raw_folders import draw_image
from tests.tolerances import FOLDED_ATOL

Run = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]


def onnxruntime(file: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda image: session.run(["anomaly_map", "score"], {"image": image})


def openvino(file: Path) -> Run:
    import openvino

    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: [model({"image": image})[name] for name in ("anomaly_map", "score")]


@pytest.mark.integration
@pytest.mark.parametrize(("format", "suffix", "load"), [("onnx", ".onnx", onnxruntime), ("openvino", ".xml", openvino)])
def test_a_runtime_gives_what_the_predictor_gives(
    format: Format, suffix: str, load: Callable[[Path], Run], tiny_model: Path, tmp_path: Path
) -> None:
    file = export(tiny_model, tmp_path / "deployed" / "widget", format=format)
    assert file == tmp_path / "deployed" / f"widget{suffix}"
    assert all(path.stem == "widget" for path in file.parent.iterdir())
    run = load(file)
    predictor = Predictor.from_directory(tiny_model)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    for count in (1, 3):  # any number of images, the example's or not
        images = [draw_image(seed, 40, 60) for seed in range(count)]
        x_BCHW = torch.stack([preprocess(image, (32, 48), antialias=False) * std + mean for image in images])
        maps, scores = run(x_BCHW.numpy())
        for found_map, found_score, expected in zip(maps, scores, predictor.predict(images), strict=True):
            atol = FOLDED_ATOL * max(1.0, float(np.abs(expected.map_HW).max()))
            np.testing.assert_allclose(found_map, expected.map_HW, rtol=0, atol=atol)
            assert float(found_score) == pytest.approx(expected.score, abs=atol)


def test_missing_packages_are_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SSNError, match=r"needs onnx and onnxscript; install them, or ssn-tuning\[export\]"):
        export(tiny_model, tmp_path / "x", format="onnx")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "file").touch()
    with pytest.raises(SSNError, match=r"cannot write .*file/widget\.xml"):
        export(tiny_model, tmp_path / "file" / "widget", format="openvino")
