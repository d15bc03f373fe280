"""The exceptions that a command tells in a sentence, without a traceback."""

import signal


class UsageError(ValueError):
    """A wrong argument, file or data set; the message is one sentence saying what was got and what was expected.

    The console command prints the message without a traceback and exits with status 2.
    """


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is not a number, or infinite.

    Attributes:
        seed: of the run.
        step: number of the first such step, from 1.
    """

    def __init__(self, what: str, seed: int, step: int, value: float):
        super().__init__(f"The {what} of step {step} is {value}, from seed {seed}; training stopped.")
        self.seed, self.step = seed, step


class StoppedBySignalError(Exception):
    """Training was asked by a signal to stop, and did.

    Attributes:
        signal: that asked.
        step: number of training steps done.
    """

    def __init__(self, number: signal.Signals, step: int):
        super().__init__(f"Stopped by {number.name} after step {step}.")
        self.signal, self.step = number, step


def in_words(error: BaseException) -> str:
    """An exception of others' code on one line, without its full stop; messages of JAX go on for a page."""
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"
