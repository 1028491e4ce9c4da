"""Ending a sweep early and cleanly: Ctrl-C and the SIGTERM of ``ray job stop`` or a batch scheduler do the same.

Tune has a way to stop in good order, but only for SIGINT, which Ray blocks in the processes that it starts, a submitted
job's driver among them.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Whether the sweep was told to stop; a copy, as Tune's snapshots make them, has not been told."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Tell it."""
        self._event.set()

    def __reduce__(self) -> tuple[type[StopFlag], tuple[()]]:
        return StopFlag, ()


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, so that ``finally`` clauses run.

    ``ray.init`` sets a handler of its own, so enter this after it. Does nothing outside the main thread, where Python
    handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_tune_in_order(flag: StopFlag) -> Iterator[None]:
    """While Tune runs, let the first SIGINT or SIGTERM set ``flag`` and stop Tune after its present step.

    The second one raises KeyboardInterrupt. Needs ``TUNE_DISABLE_SIGINT_HANDLER=1``: Tune's own handler would take the
    place of this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if flag or signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:  # Tune does not listen yet
            raise KeyboardInterrupt
        flag.set()
        # the signal that Tune listens to whatever its settings; its handler lets the present step end
        signal.raise_signal(signal.SIGUSR1)

    before_user = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    logger, quiet = logging.getLogger("ray.tune.tune"), _is_no_advice_on_restoring
    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGUSR1, before_user)


def _is_no_advice_on_restoring(record: logging.LogRecord) -> bool:
    """Tune tells how to press Ctrl-C again and how to restore itself; the sweep has its own words for both."""
    return not record.getMessage().startswith(("Stop signal received", "Experiment has been interrupted"))
