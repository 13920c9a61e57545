"""What both loggers share: the numbers of a record, the file that names the tracker's run, and a tracker that fails."""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from scl_defense import UserError


def imported(name: str) -> ModuleType:
    """The tracker's package. Raises :class:`UserError` where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"logger '{name}' is not usable here ({' '.join(str(error).split())}); "
            f"pip install 'scl-defense-tracking[{name}]'"
        ) from None


def opened(name: str, call: Callable[[], Any]) -> Any:
    """What ``call`` returns; whatever goes wrong is one line."""
    try:
        return call()
    except Exception as error:  # each tracker, and each of its servers, has its own
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"logger '{name}' cannot open its record: {type(error).__name__}: {text}; mend that, or leave it out"
        ) from None


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, without the epoch."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "epoch" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings under names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def recalled(path: Path) -> dict[str, Any]:
    """What an earlier run of this folder kept, or nothing: also where a kill came in the middle."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def keep(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(dict(content)) + "\n", encoding="utf-8")
    os.replace(part, path)


class Guarded:
    """A writer whose tracker may fail in the middle of a night: said once, then left alone. Training goes on."""

    def __init__(self, name: str, send: Callable[[int, dict[str, float]], None], finish: Callable[[], None]):
        self._name, self._send, self._finish, self._down = name, send, finish, False

    def log(self, record: Mapping[str, Any]) -> None:
        self._attempt(lambda: self._send(record["epoch"], numbers(record)))

    def close(self) -> None:
        self._attempt(self._finish)

    def _attempt(self, call: Callable[[], None]) -> None:
        if self._down:
            return
        try:
            call()
        except Exception as error:
            self._down = True
            text = " ".join(str(error).split())[:300]
            warnings.warn(
                f"logger '{self._name}' failed and is left alone for the rest of this run: "
                f"{type(error).__name__}: {text}",
                stacklevel=4,
            )
