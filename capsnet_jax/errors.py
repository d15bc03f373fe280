"""Exceptions that the command prints as one sentence, without a traceback."""

import signal
from numbers import Integral


class UsageError(ValueError):
    """Error that the user can fix: a wrong argument, file or data set.

    The message is one sentence that says what was given and what is expected. The command `capsnet` prints it without a
    traceback, and exits with status 2.

    Examples:
        >>> from capsnet_jax import UsageError, load_dataset
        >>> try:
        ...     load_dataset("./photos")
        ... except UsageError as error:
        ...     print(error)
        The data set ./photos does not exist; expected a folder of images or an .npz file.
    """


class NonFiniteLossError(ArithmeticError):
    """Error for a loss or gradient that is infinite or NaN.

    Args:
        what: "loss" or "gradient".
        seed: seed of the run.
        step: number of the first such training step, from 1.
        value: the loss or the gradient norm.
    """

    def __init__(self, what: str, seed: int, step: int, value: float):
        super().__init__(f"The {what} of step {step} is {value}, from seed {seed}; training stopped.")
        self.seed, self.step = seed, step


class StoppedBySignalError(Exception):
    """Training was stopped by a signal, after it saved a checkpoint.

    Args:
        number: the signal.
        step: number of training steps done.
    """

    def __init__(self, number: signal.Signals, step: int):
        super().__init__(f"Stopped by {number.name} after step {step}.")
        self.signal, self.step = number, step


def check_sizes(**sizes: int) -> None:
    """Check that sizes are whole numbers of at least 1.

    Raises:
        UsageError: one is not; the message has its name.
    """
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise UsageError(f"{name} is {size!r}; expected a whole number of at least 1.")


def in_words(error: BaseException) -> str:
    """Format an exception of any kind on one line, without a final period. Messages of JAX can be pages long."""
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"
