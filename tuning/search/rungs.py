"""At which epochs trials are compared: successive halving's rungs, which follow each trial's own number of epochs."""

from __future__ import annotations

from dataclasses import dataclass

from ssn.errors import SSNError


@dataclass(frozen=True)
class Rungs:
    """One rule for trials of any length; only those of equal length meet, because the schedule depends on it."""

    grace_epochs: int | None = None
    """Epochs that every trial gets; None: its epochs / eta squared, at least 1, so that there are two rungs."""
    eta: int = 3
    """Of the trials that reach a rung, about one in ``eta`` goes on."""

    def grace(self, max_epochs: int) -> int:
        """Epochs that a trial of ``max_epochs`` gets before it may be stopped."""
        return max(1, max_epochs // self.eta**2) if self.grace_epochs is None else self.grace_epochs

    def epochs(self, max_epochs: int) -> tuple[int, ...]:
        """Epochs before the last at which a trial of ``max_epochs`` may be stopped.

        Raises:
            SSNError: a value is out of range.
        """
        return rung_epochs(max_epochs, self.grace(max_epochs), self.eta)


def rung_epochs(max_epochs: int, grace: int, eta: int) -> tuple[int, ...]:
    """Epochs before the last at which a trial may be stopped: grace, grace*eta, grace*eta^2, ...

    Trials report an objective at these epochs and at ``max_epochs``, which is not one of them.

    Args:
        max_epochs: The full budget.
        grace: Epochs that every trial gets.
        eta: Of the trials that reach a rung, about one in ``eta`` goes on.

    Raises:
        SSNError: a value is out of range.
    """
    if max_epochs < 1:
        raise SSNError(f"max_epochs is {max_epochs}, but must be at least 1")
    if grace < 1:
        raise SSNError(f"the scheduler's grace is {grace} epochs, but must be at least 1")
    if eta < 2:
        raise SSNError(f"the scheduler's eta is {eta}, but must be at least 2")
    rungs: list[int] = []
    epoch = grace
    while epoch < max_epochs:
        rungs.append(epoch)
        epoch *= eta
    return tuple(rungs)
