"""The only error classes that leave this project on purpose."""

import difflib
from collections.abc import Iterable


class SclDefenseError(Exception):
    """Something failed while running; the command line ends with ``exit_code``."""

    exit_code = 1


class UserError(SclDefenseError):
    """Wrong usage or input. One line: what was wrong, the limit, the remedy."""

    exit_code = 2


class ComponentError(SclDefenseError):
    """A generator, trainer, attack, model, data set or logger broke its contract; the message names it."""


class Interrupted(SclDefenseError):
    """Stopped by a signal after saving; ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
