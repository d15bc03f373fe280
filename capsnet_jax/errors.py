"""The one exception for mistakes a user can make and mend."""


class UsageError(ValueError):
    """A wrong argument, file or data set; the message is one sentence saying what was got and what was expected.

    The console command prints the message without a traceback and exits with status 2.
    """
