"""How long a configuration's network takes for one image, measured where a trial runs.

What is measured is the network of ``ssn.predictor.Predictor``, all weights folded, in float32, on one preprocessed
image: backbone and heads, without decoding, resizing and drawing. The heads are untrained; only shapes matter here. A
few runs warm up, the median of the others counts, because a shared machine's interruptions only ever lengthen a run.
It remains a measurement: on a busy machine, or one of another kind, it is another number. A sweep therefore measures a
shape once and uses that number for all its trials.
"""

from __future__ import annotations

import statistics
import time

import torch

from ssn.backbone import Backbone
from ssn.config import Config
from ssn.model import SuperSimpleNet
from ssn.predictor import Predictor

WARM_UP_RUNS = 3
MIN_RUNS = 5
MAX_RUNS = 30
LIMIT_S = 3.0
"""No further run starts after this long, beyond :data:`MIN_RUNS`."""


def measure_latency_ms(config: Config, backbone: Backbone, *, device: str) -> float:
    """Median time of one image through a configuration's network, in milliseconds.

    Args:
        config: Its model and image size count.
        backbone: What ``config.model`` names.
        device: Where to run; torch's present number of threads is used.
    """
    predictor = Predictor(SuperSimpleNet(backbone.channels, config.model), backbone, config, device=device)
    x_BChw = torch.zeros(1, 3, *config.data.image_size)
    for _ in range(WARM_UP_RUNS):
        predictor.score_raw(x_BChw)
    durations_s: list[float] = []
    while len(durations_s) < MIN_RUNS or (len(durations_s) < MAX_RUNS and sum(durations_s) < LIMIT_S):
        _wait(device)
        started_s = time.perf_counter()
        predictor.score_raw(x_BChw)
        _wait(device)
        durations_s.append(time.perf_counter() - started_s)
    return 1000 * statistics.median(durations_s)


def _wait(device: str) -> None:
    """Until the device has done what it was given; a GPU works on while the caller goes on."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
