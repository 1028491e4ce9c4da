"""A trained model as a file for other runtimes: ONNX (ONNX Runtime, TensorRT) or OpenVINO.

The exported network takes images as they are after resizing and gives what ``Predictor`` gives, normalisation and
smoothing included: input ``image`` float32 [B, 3, h, w], RGB in 0..1, at the model's image size and any B; outputs
``anomaly_map`` float32 logits [B, h, w] and ``score`` float32 logits [B]. Its weights are folded, so that it does a
third of the arithmetic of the network as published.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ssn.config import Size
from ssn.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ssn.errors import SSNError
from ssn.inference import InferenceNetwork
from ssn.model import image_map
from ssn.predictor import Predictor

Format = Literal["onnx", "openvino"]

_SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}
_PACKAGES = {"onnx": ("onnx", "onnxscript"), "openvino": ("openvino",)}
_OUTPUTS = ("anomaly_map", "score")


class DeployedNetwork(nn.Module):
    """An inference network with normalisation before and smoothing behind it."""

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, network: InferenceNetwork, image_size: Size) -> None:
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.register_buffer("mean_311", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std_311", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """``anomaly_map`` and ``score`` of ``image``; see the module."""
        map_BHW, score_B = self.network((image - self.mean_311) / self.std_311)
        return image_map(map_BHW, self.image_size), score_B


def export(model_dir: Path, file: Path, *, format: Format) -> Path:
    """Write a trained model for another runtime.

    Args:
        model_dir: As ``train`` and the registry's ``bundle`` have it.
        file: What to write; a missing suffix is added. OpenVINO puts the weights beside it, in ``<name>.bin``.
        format: The runtime's.

    Returns:
        The file that the runtime loads.

    Raises:
        SSNError: ``model_dir`` is no model, the runtime's packages are missing, or the file cannot be written.
    """
    missing = [name for name in _PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise SSNError(f"exporting to {format} needs {' and '.join(missing)}; install them, or ssn-tuning[export]")
    file = file if file.suffix == _SUFFIX[format] else file.with_name(file.name + _SUFFIX[format])
    predictor = Predictor.from_directory(model_dir)
    size = predictor.config.data.image_size
    network = DeployedNetwork(predictor.network, size).eval()
    example = torch.rand(2, 3, *size)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about themselves
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # whole or not at all: written beside its place, then moved there
            with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as scratch:
                written = Path(scratch, file.name)
                _write_onnx(program, written) if format == "onnx" else _write_openvino(program, written)
                for part in sorted(Path(scratch).iterdir()):
                    part.replace(file.parent / part.name)
        except OSError as error:
            raise SSNError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["image"], output_names=list(_OUTPUTS), external_data=False
    )
    assert exported is not None
    exported.save(file, external_data=False)


def _write_openvino(program: torch.export.ExportedProgram, file: Path) -> None:
    import openvino

    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({"image"})
    for output, name in zip(model.outputs, _OUTPUTS, strict=True):
        output.get_tensor().set_names({name})
    # half-precision weights, the default, would change scores in the third digit
    openvino.save_model(model, file, compress_to_fp16=False)
