"""The one error that a person who runs a script is meant to read."""


class UserError(Exception):
    """Input that cannot be worked with; the message is one line: what is wrong and what to do about it.

    The scripts print it as `error: <message>` and leave with exit code 2, without a traceback.
    """


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
