"""Exported models in the runtimes that they are exported for; either side's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

Outputs = list[Any]
"""Arrays: map and score."""


def open_openvino(
    file: Path, images_BCHW: Tensor, outputs: Sequence[str], *, threads: int, precision: str | None
) -> tuple[Callable[[], Outputs], str]:
    """Compile an OpenVINO model for these images.

    Args:
        file: ``.xml``.
        images_BCHW: What the result scores.
        outputs: Names of map and score.
        threads: Of a request.
        precision: OpenVINO's ``INFERENCE_PRECISION_HINT``; None: its default, bf16 on processors with units for it.

    Returns:
        A function that scores the images, and the precision that OpenVINO chose.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    model.reshape(list(images_BCHW.shape))  # exported for batches of any size; a fixed one is faster
    hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision is not None:
        hints["INFERENCE_PRECISION_HINT"] = precision
    compiled = core.compile_model(model, "CPU", hints)
    request, images = compiled.create_infer_request(), images_BCHW.numpy()

    def score() -> Outputs:
        found = request.infer([images], share_inputs=True, share_outputs=True)
        return [found[name] for name in outputs]

    return score, str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())


def open_onnx(file: Path, images_BCHW: Tensor, outputs: Sequence[str], *, threads: int) -> Callable[[], Outputs]:
    """:func:`open_openvino` for an ONNX model and ONNX Runtime, in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # its threads would go on spinning into the next side's turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images_BCHW.numpy()}
    return lambda: session.run(outputs, feed)
