"""Signals to stop: the first is recorded, the second interrupts, and the handlers are restored."""

import os
import signal
import threading

import pytest

from capsnet_jax.runs.session import STOP_SIGNALS, stop_signals


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGHUP)],
)
def test_the_first_signal_is_recorded_and_the_second_interrupts(first, second):
    if signal.getsignal(first) is signal.SIG_IGN:
        pytest.skip("The tests run under nohup.")
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_signals() as received:
        assert received == []
        os.kill(os.getpid(), first)
        assert received == [first]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert received == [first]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_threads_other_than_the_main_one_have_no_handlers():
    seen = []

    def enter() -> None:
        with stop_signals() as received:
            seen.append(list(received))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_a_signal_that_the_process_ignores_stays_ignored():
    """As `nohup` does with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
