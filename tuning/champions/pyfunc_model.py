"""The registered model, as MLflow's models-from-code file: raw images in, scores and anomaly maps out.

MLflow copies this file into the model and runs it where the model is loaded, with ``ssn`` beside it; nothing of the
platform (Ray, Optuna) is needed there. Loading runs the last line, so nothing else may import this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext


class AnomalyModel(PythonModel):
    """A trained SuperSimpleNet with its backbone.

    ``mlflow.pyfunc.load_model(uri, model_config={"device": "cuda"})`` chooses another device than the CPU.
    """

    def load_context(self, context: PythonModelContext) -> None:
        from ssn.predictor import Predictor

        device = (context.model_config or {}).get("device", "cpu")
        self.predictor = Predictor.from_directory(Path(context.artifacts["bundle"]), device=device)

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Score images.

        Args:
            context: Unused; the model is loaded already.
            model_input: ``[N, H, W, 3]`` uint8 RGB of any size, as decoded from a file.
            params: None.

        Returns:
            ``score`` ``[N]`` float32, the image's logit: higher is more anomalous; ``anomaly_map`` ``[N, h, w]``
            float32 logits at the size the model works at.
        """
        found = list(self.predictor.predict(list(model_input)))
        return {
            "score": np.array([p.score for p in found], dtype=np.float32),
            "anomaly_map": np.stack([np.asarray(p.map_HW, dtype=np.float32) for p in found])
            if found
            else np.zeros((0, 0, 0), dtype=np.float32),
        }


mlflow.models.set_model(AnomalyModel())
