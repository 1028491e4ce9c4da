"""Experiment tracking: a small protocol, MLflow behind it, and an in-memory one for tests.

``tuning.tracking.callback`` is imported by its own name, because it alone needs Ray.
"""

from tuning.tracking.environment import environment_tags
from tuning.tracking.memory import MemoryTracker
from tuning.tracking.mlflow_tracker import MLflowTracker
from tuning.tracking.outbox import Outbox
from tuning.tracking.protocol import RunRecord, RunStatus, Sweep, Tracker, TrialInfo, TrialState

__all__ = [
    "MLflowTracker",
    "MemoryTracker",
    "Outbox",
    "RunRecord",
    "RunStatus",
    "Sweep",
    "Tracker",
    "TrialInfo",
    "TrialState",
    "environment_tags",
]
