"""How a sweep is told to stop."""

from __future__ import annotations

import os
import pickle
import signal

import pytest

from tuning.execution.interrupt import StopFlag, stop_tune_in_order, terminate_as_interrupt


def test_a_copy_of_the_flag_has_not_been_told() -> None:
    flag = StopFlag()
    flag.set()
    assert flag
    assert not pickle.loads(pickle.dumps(flag))


def test_sigterm_is_an_interrupt_and_no_longer_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with terminate_as_interrupt(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_tune_and_the_second_insists(number: int) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    flag, asked = StopFlag(), []
    with stop_tune_in_order(flag):
        signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))  # as Tune does when it starts
        os.kill(os.getpid(), number)
        assert flag
        assert asked == [signal.SIGUSR1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_signal_before_tune_listens_is_an_interrupt() -> None:
    with stop_tune_in_order(StopFlag()), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
