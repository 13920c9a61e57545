"""Names and provenance of components: who registered what, and from where. Imports nothing heavy."""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from scl_defense.containment import Uncontained, contained
from scl_defense.errors import ComponentError, UserError, has_controls, nearest

OURS = "scl-defense"  # the distribution of this project: not watched while it is imported
KINDS = ("generator", "trainer", "attack", "model", "dataset", "logger")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*(:[a-z0-9][a-z0-9.-]*)*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Owner:
    """Where a registration came from: a distribution and its version, or one file and its fingerprint."""

    name: str
    version: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered component; nothing of it is imported before :meth:`load`."""

    kind: str
    name: str
    target: type | str
    summary: str
    owner: Owner

    @property
    def qualified(self) -> str:
        return f"{self.owner.name}:{self.name}"

    def load(self) -> type:
        """The component class. Raises :class:`ComponentError` naming the owner when it cannot be imported."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            if module not in sys.modules and self.owner.name != OURS:
                with contained(self.owner.name) as own:
                    own.add(module)
                    import_module(module)
            found: type = getattr(import_module(module), attribute)
        except Uncontained:
            raise
        except Exception as error:
            raise ComponentError(
                f"{self.kind} '{self.name}' of {self.owner} cannot be imported from {self.target}: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        return found


class Registry:
    """The components of one kind, by name.

    Two owners of one name: the bare name is an error that names both; ``distribution:name`` always works.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, list[Entry]] = {}

    def add(self, name: str, target: type | str, *, summary: str, owner: Owner) -> None:
        """Raises ``TypeError`` or ``ValueError`` on the plugin author's own line."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{self.kind} name {name!r} must be lower case letters, digits, dots and dashes")
        if not (inspect.isclass(target) or (isinstance(target, str) and _TARGET.fullmatch(target))):
            raise TypeError(f"target of {self.kind} '{name}' must be a class or 'module:Class', not {target!r}")
        if not isinstance(summary, str) or not summary.strip() or has_controls(summary):
            raise ValueError(f"summary of {self.kind} '{name}' must be one non-empty line")
        same = self._entries.setdefault(name, [])
        if any(entry.owner.name == owner.name for entry in same):
            raise ValueError(f"{self.kind} '{name}' is registered twice by {owner}")
        same.append(Entry(self.kind, name, target, summary.strip(), owner))

    def __iter__(self) -> Iterator[Entry]:
        for name in sorted(self._entries):
            yield from self._entries[name]

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return sorted(self._entries)

    def conflicts(self) -> dict[str, list[Entry]]:
        return {name: entries for name, entries in self._entries.items() if len(entries) > 1}

    def entry(self, name: str) -> Entry:
        """Raises :class:`UserError` with the nearest right name, or naming both owners of an ambiguous one."""
        owner, _, bare = name.partition(":")
        qualified = [entry for entry in self._entries.get(bare, []) if entry.owner.name == owner]
        found = self._entries.get(name, []) + qualified
        if not found:
            raise UserError(
                f"there is no {self.kind} named '{name}'{nearest(name, self._entries)} "
                f"(see: scl-defense plugins list {self.kind}s)"
            )
        if len(found) > 1:
            owners = " and ".join(str(entry.owner) for entry in found)
            choices = " or ".join(f"'{entry.qualified}'" for entry in found)
            raise UserError(f"{self.kind} '{name}' is registered by {owners}; write {choices}")
        return found[0]

    def get(self, name: str) -> Any:
        """The component class of this name (imports it)."""
        return self.entry(name).load()
