"""Old names that go on working for one minor version, and say so when they are used.

What is public is listed in ``docs/api.md``. Something of it that is renamed or goes away in 0.4.0 warns through all of
0.4.x and is gone in 0.5.0; a test fails when the version passes a ``since`` by two, so that nothing is forgotten.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

Called = TypeVar("Called", bound=Callable[..., Any])


class SclDefenseDeprecationWarning(FutureWarning):
    """Shown to everyone, unlike ``DeprecationWarning``: to who runs a command as well as to who wrote a plugin."""


def warn_deprecated(what: str, *, since: str, instead: str, stacklevel: int = 2) -> None:
    """Warn that ``what`` is deprecated since version ``since`` ("0.4"); ``instead``: what to write in its place.

    stacklevel: 2 names the line that called the caller of this function, as in :func:`warnings.warn`.
    """
    text = f"{what} is deprecated since {since} and goes away in {removed_in(since)}; write {instead}"
    warnings.warn(text, SclDefenseDeprecationWarning, stacklevel=stacklevel + 1)


def removed_in(since: str) -> str:
    """The next minor version after ``since``: ``"0.4"`` -> ``"0.5"``. Raises ``ValueError`` for another form."""
    major, dot, minor = since.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise ValueError(f"since={since!r} must be MAJOR.MINOR, like '0.4'")
    return f"{major}.{int(minor) + 1}"


def deprecated(*, since: str, instead: str) -> Callable[[Called], Called]:
    """Decorate a function or a class: it works as before, and every call warns on the caller's line."""
    removed_in(since)  # a wrong version is an error where it is written

    def mark(called: Called) -> Called:
        if isinstance(called, type):
            start = called.__init__  # type: ignore[misc]

            @functools.wraps(start)
            def init(self: Any, *arguments: Any, **keywords: Any) -> None:
                # A subclass of it is somebody's own class; only the old one is going.
                if type(self) is called:
                    warn_deprecated(f"{called.__module__}.{called.__qualname__}", since=since, instead=instead)
                start(self, *arguments, **keywords)

            called.__init__ = init  # type: ignore[misc]
            return called

        @functools.wraps(called)
        def call(*arguments: Any, **keywords: Any) -> Any:
            warn_deprecated(f"{called.__module__}.{called.__qualname__}", since=since, instead=instead)
            return called(*arguments, **keywords)

        return call  # type: ignore[return-value]

    return mark


def old_names(module: str, moved: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that have moved: ``{"old": ("package.module:new", since)}``.

    ::

        __getattr__ = old_names(__name__, {"adversarial_nce": ("scl_defense.losses:infonce", "0.4")})
    """
    for _, since in moved.values():
        removed_in(since)

    def attribute(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        target, since = moved[name]
        place, _, new = target.partition(":")
        warn_deprecated(f"{module}.{name}", since=since, instead=f"{place}.{new}")
        return getattr(import_module(place), new)

    return attribute
