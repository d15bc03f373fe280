"""Signals to stop: the first one is remembered, the second one interrupts, and all is as before in the end."""

import os
import signal
import threading

import pytest

from capsnet_jax.runs.session import StopSignals


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT)])
def test_the_first_signal_is_remembered_and_the_second_interrupts(first, second):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), first)
        assert signals.received is first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert signals.received is first
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_other_threads_than_the_main_one_have_no_handlers():
    seen = []

    def enter() -> None:
        with StopSignals() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]
