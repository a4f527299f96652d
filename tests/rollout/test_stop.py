"""Stop requests: they interrupt waits for samples and nothing else."""

import signal
import threading

import pytest

from megatron_rl.rollout.stop import StopRequested, StopSignal


def test_a_signal_interrupts_a_wait():
    stop, before = StopSignal(), signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, stop.request)
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGUSR2])
    try:
        timer.start()
        with pytest.raises(StopRequested):
            stop.wait(lambda: threading.Event().wait(30))
    finally:
        signal.signal(signal.SIGUSR2, before)
        timer.join()
    assert stop.requested


def test_a_request_outside_a_wait_prevents_the_next_one():
    stop = StopSignal()
    assert stop.wait(lambda: 7) == 7
    stop.request()
    assert stop.requested
    with pytest.raises(StopRequested):
        stop.wait(lambda: 7)
