"""Every extension point of scl-defense, on one page.

A plugin is a module with functions of these names, each marked ``@scl_defense.hookimpl``. It is found through the
entry-point group ``scl_defense`` of an installed distribution, or given as one file: ``--plugin FILE.py``.
"""

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import click

    from scl_defense.checkpoint import LoadedClassifier

PROJECT = "scl_defense"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """What every ``register_*`` hook is handed.

    ``name``: lower case, digits, dashes (a colon groups names: ``art:pgd``). ``target``: a component class, or
    ``"module:Class"`` so that listing imports nothing. ``summary``: one line. A mistake raises on the caller's line.
    """

    def __call__(self, name: str, target: "type | str", *, summary: str) -> None: ...


@hookspec
def register_generators(register: Register) -> None:
    """Called once at loading; every answer counts. Targets follow :class:`scl_defense.types.Generator`."""


@hookspec
def register_trainers(register: Register) -> None:
    """Called once at loading; every answer counts. Targets follow :class:`scl_defense.types.Trainer`."""


@hookspec
def register_attacks(register: Register) -> None:
    """Called once at loading; every answer counts. Targets follow :class:`scl_defense.types.Attack`."""


@hookspec
def register_models(register: Register) -> None:
    """Called once at loading; every answer counts. Targets follow :class:`scl_defense.types.Model`."""


@hookspec
def register_datasets(register: Register) -> None:
    """Called once at loading; every answer counts. Targets follow :class:`scl_defense.types.Dataset`."""


@hookspec
def register_loggers(register: Register) -> None:
    """Called once at loading; every answer counts. Targets follow :class:`scl_defense.types.Logger`."""


@hookspec
def register_commands(cli: "click.Group") -> None:
    """Called when the command line is used; every answer counts. Add commands with ``cli.add_command``."""


@hookspec(firstresult=True)
def load_checkpoint(path: "Path", options: dict[str, Any]) -> "LoadedClassifier | None":
    """Read a file that is not a checkpoint of this project. The first answer that is not ``None`` wins.

    ``options`` holds what the user said beside the path (``model``, ``mean``, ``std``, ...). Return ``None`` for a
    file of another kind; raise :class:`scl_defense.UserError` for a file of this kind that cannot be read.
    """
