"""What this distribution adds. Imported by every scl-defense command, so nothing heavy is imported here."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scl_defense import hookimpl

if TYPE_CHECKING:
    from scl_defense.checkpoint import LoadedClassifier


@hookimpl
def load_checkpoint(path: Path, options: dict[str, Any]) -> "LoadedClassifier | None":
    name = str(path)
    if not name.startswith("robustbench:"):
        return None
    from scl_defense_robustbench.zoo import load

    return load(name, options)
