"""From normalised images to map and score, with all weights folded: what ``Predictor`` runs and ``export`` writes.

Shape suffixes: B images, C channels, H/W the map's size, h/w an image's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ssn.backbone import Backbone, fold_batch_norms
from ssn.config import Size
from ssn.model import SuperSimpleNet

Precision = Literal["fp32", "bf16"]
"""``bf16``: backbone and the heads' large products in bfloat16, for processors with units for it."""

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


class InferenceNetwork(nn.Module):
    """Backbone and heads for images of one size, without gradients.

    Args:
        backbone: The one that ``net`` was trained on; it is copied.
        net: Trained heads.
        image_size: Height and width of every image, in pixels.
        precision: Of the large products; scores differ by what ``tests/tolerances.py`` allows.
        device: Where it runs.
    """

    def __init__(
        self,
        backbone: Backbone,
        net: SuperSimpleNet,
        image_size: Size,
        *,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.dtype = _DTYPE[precision]
        self.backbone = fold_batch_norms(backbone).to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net = net.to(device).eval().requires_grad_(False)
        with torch.no_grad():
            maps = self._features(torch.zeros(1, 3, *image_size, device=device))
            self.folded = net.fold(maps).to(self.dtype)

    def forward(self, x_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Map logits [B, H, W] at map size and score logits [B], float32, of normalised images [B, 3, h, w]."""
        return self.net.score(self._features(x_BChw), self.folded)

    def _features(self, x_BChw: Tensor) -> list[Tensor]:
        x_BChw = x_BChw.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return [m.permute(0, 2, 3, 1).contiguous() for m in self.backbone(x_BChw)]


class CudaGraphs:
    """A network on a GPU whose kernels are launched together, as one CUDA graph for each batch size.

    A small batch leaves a GPU waiting for launches; a graph is one. The first batch of a size is slow: it is recorded.

    Args:
        network: On the GPU that images come to.
    """

    _WARM_UP = 3
    """Runs before recording, in which libraries choose their kernels and allocate workspaces (as PyTorch advises)."""

    def __init__(self, network: InferenceNetwork) -> None:
        self.network = network
        self._recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]] = {}

    def __call__(self, x_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`InferenceNetwork.forward`."""
        if x_BChw.shape not in self._recorded:
            self._recorded[x_BChw.shape] = self._record(x_BChw)
        graph, static_BChw, (map_BHW, score_B) = self._recorded[x_BChw.shape]
        static_BChw.copy_(x_BChw)
        graph.replay()
        return map_BHW.clone(), score_B.clone()  # the next replay writes to the same memory

    def _record(self, x_BChw: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]:
        static_BChw = x_BChw.clone()
        stream = torch.cuda.Stream(x_BChw.device)
        stream.wait_stream(torch.cuda.current_stream(x_BChw.device))
        with torch.cuda.stream(stream):
            for _ in range(self._WARM_UP):
                self.network(static_BChw)
        torch.cuda.current_stream(x_BChw.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.network(static_BChw)
        return graph, static_BChw, outputs
