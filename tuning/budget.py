"""What a sweep may spend, and what that comes to: trials, time, GPU hours."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ssn.errors import SSNError

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = r"\s*(\d+(?:\.\d+)?)\s*([smhd])"


@dataclass(frozen=True)
class Budget:
    """Limits over all categories together; None: without."""

    max_trials: int | None = None
    """No more trials than these are started."""
    time_budget: str | None = None
    """Of the search, as it was written."""
    max_gpu_hours: float | None = None
    """Of the search's trials: the GPUs that each holds, times how long it holds them."""

    @property
    def time_s(self) -> float | None:
        """The time budget in seconds."""
        return None if self.time_budget is None else parse_duration_s(self.time_budget, "search.time_budget")


@dataclass(frozen=True)
class Spent:
    """What a sweep has spent so far, all its drivers together."""

    time_s: float = 0.0
    """Of the time budget."""
    trials_s: float = 0.0
    """How long trials held their places, every attempt counted, summed."""


def parse_duration_s(text: str, key: str) -> float:
    """Seconds of ``2h``, ``90m``, ``1h 30m``, ``1.5d`` or ``45s``.

    Raises:
        SSNError: it is something else, or no time at all; the message names ``key``.
    """
    parts = re.findall(_PART, text)
    total_s = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if not re.fullmatch(f"(?:{_PART})+\\s*", text) or total_s == 0:
        raise SSNError(f"{key} is {text!r}, but must be a time with its unit, such as 2h, 90m or 1h30m")
    return total_s


def share_trials(categories: int, each: int, max_trials: int | None) -> list[int]:
    """Trials of every category where each is to have ``each`` and all together at most ``max_trials``.

    The category with the fewest is served first, so that shares differ by one at most.
    """
    total = categories * each if max_trials is None else min(categories * each, max_trials)
    return [min(each, total // categories + (index < total % categories)) for index in range(categories)]
