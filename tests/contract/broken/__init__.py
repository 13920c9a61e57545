"""Deliberately broken components, each with the one check that must catch it, and sound ones that none may catch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A broken component. ``says``: part of the message; ``also``: other checks that cannot but fail with it."""

    kind: str
    component: Any
    check: str
    says: str
    also: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        component = self.component if isinstance(self.component, type) else type(self.component)
        return f"{self.kind}-{component.__name__}"


def cases() -> list[Case]:
    from broken import attacks, components, datasets, generators, loggers, meddlers, models, trainers

    modules = (components, generators, meddlers, trainers, attacks, models, datasets, loggers)
    return [case for module in modules for case in module.CASES]


def sound() -> list[tuple[str, Any]]:
    """(kind, component): what the broken ones are broken versions of."""
    from broken import attacks, datasets, generators, loggers, models, trainers

    modules = (generators, trainers, attacks, models, datasets, loggers)
    return [(module.KIND, component) for module in modules for component in module.SOUND]
