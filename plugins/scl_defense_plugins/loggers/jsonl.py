"""Training records as JSON lines."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scl_defense.types import component

NAME = "metrics.jsonl"


class _Writer:
    def __init__(self, path: Path):
        self._path = path

    def log(self, record: Mapping[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as stream:  # opened per record: an epoch takes far longer
            stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Nothing is held open."""


@component
class JsonLines:
    """Appends one record an epoch to ``metrics.jsonl``; on resume, records from the first new epoch on are dropped."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> _Writer:
        path = run_dir / NAME
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _epoch(line) < epoch]
            part = path.with_name(f".{NAME}.part")
            part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(part, path)
        return _Writer(path)


def _epoch(line: str) -> float:
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a half-written last line of a killed run
