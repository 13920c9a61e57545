"""The only error classes that leave this project on purpose."""

import difflib
import unicodedata
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


class PeerFailed(SclDefenseError):
    """Another process of the same run is in trouble, and says itself what it is. ``code``: the kind of trouble."""

    def __init__(self, code: int):
        super().__init__("another process of this run has failed; its message says why")
        self.code = code


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: control characters and the like become ``\\x1b`` and so on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def why(error: OSError | ValueError) -> str:
    """The reason in few words; a path with a zero character is a ``ValueError`` of Python's, not one of the system."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def has_controls(text: str) -> bool:
    """Whether a name holds control characters, escape sequences of terminals among them."""
    return not text.isprintable() and any(unicodedata.category(c) == "Cc" for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
