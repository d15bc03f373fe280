"""The exceptions that a command tells in a sentence, without a traceback."""


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


def in_words(error: BaseException) -> str:
    """An exception of others' code on one line, without its full stop; messages of JAX go on for a page."""
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"
