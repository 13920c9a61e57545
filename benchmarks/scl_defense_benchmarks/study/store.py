"""A study's folder: cells that are done, changed or half-written, the results file, and the lock."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scl_defense.errors import UserError
from scl_defense_benchmarks.study.cells import Cell, changed


class Store:
    """``DIR/cells/<cell>/`` and what is made of them. Everything is written whole or not at all."""

    def __init__(self, out: str | Path):
        self.out = Path(out)

    def folder(self, cell: Cell) -> Path:
        return self.out / "cells" / cell.id

    # -- one study at a time

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises :class:`UserError` naming the holder when another study has the folder."""
        try:
            (self.out / "cells").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.out / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            holder = self.out / ".holder"
            who = holder.read_text().strip() if holder.exists() else "another process"
            raise UserError(f"study '{self.out}' is in use by {who}; wait for it or stop it") from None
        except OSError as error:
            raise UserError(f"cannot write in '{self.out}': {error.strerror}; choose another --out") from None
        from scl_defense.checkpoint import sweep

        try:
            for folder in (self.out, *(self.out / "cells").glob("*/")):
                sweep(folder)
            (self.out / ".holder").write_text(f"process {os.getpid()}\n")
            yield
        finally:
            (self.out / ".holder").unlink(missing_ok=True)
            lock.release()

    # -- cells

    def written(self, cell: Cell) -> dict[str, Any] | None:
        """``cell.json`` of an earlier start, or ``None``."""
        return _read(self.folder(cell) / "cell.json")

    def difference(self, cell: Cell) -> str | None:
        """How the recipe differs from the one that the folder was made with, or ``None``."""
        written = self.written(cell)
        return None if written is None else changed(written["recipe"], cell.recipe)

    def check(self, cells: Sequence[Cell], redo: bool) -> None:
        """A changed recipe stops the study before anything runs; with ``redo`` those folders are moved aside."""
        different = [(cell, what) for cell in cells if (what := self.difference(cell))]
        if different and not redo:
            cell, what = different[0]
            more = f" (and {len(different) - 1} more cells)" if len(different) > 1 else ""
            raise UserError(
                f"cell '{cell.id}' in '{self.out}' was made with another recipe: {what}{more}; "
                "choose another --out, or do such cells again with --redo"
            )
        for cell, _ in different:
            self.move_aside(cell)

    def move_aside(self, cell: Cell) -> Path:
        replaced = self.out / "replaced"
        replaced.mkdir(exist_ok=True)
        number = next(number for number in range(1, 10**6) if not (replaced / f"{cell.id}-{number}").exists())
        return Path(shutil.move(self.folder(cell), replaced / f"{cell.id}-{number}"))

    def prepare(self, cell: Cell, settings: dict[str, Any]) -> Path:
        """Write ``cell.json``: the recipe as it was first written, and what holds for this start."""
        from scl_defense.checkpoint import atomic_write_bytes

        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        written = self.written(cell)
        content = {
            "names": {
                "cell": cell.id, "method": cell.method, "arm": cell.arm, "data": cell.data, "model": cell.model,
                "context": cell.context, "seed": cell.seed,
            },
            "recipe": cell.recipe if written is None else written["recipe"],
            "sha256": cell.sha256 if written is None else written["sha256"],
            "settings": {**cell.settings, **settings},
        }  # fmt: skip
        atomic_write_bytes(folder / "cell.json", (json.dumps(content, indent=1) + "\n").encode())
        (folder / "failure.json").unlink(missing_ok=True)
        return folder

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell left behind, or ``None``."""
        return _read(self.folder(cell) / "record.json")

    def failure(self, cell: Cell) -> str | None:
        found = _read(self.folder(cell) / "failure.json")
        return None if found is None else found["reason"]

    def fail(self, cell: Cell, reason: str) -> None:
        from scl_defense.checkpoint import atomic_write_bytes

        atomic_write_bytes(self.folder(cell) / "failure.json", json.dumps({"reason": reason}).encode())

    # -- results

    def write_results(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """``results.jsonl`` and ``times.jsonl`` from the records of all finished cells, in the order of the grid."""
        from scl_defense.checkpoint import atomic_write_bytes

        records = [record for cell in cells if (record := self.record(cell)) is not None]
        for part, name in (("line", "results.jsonl"), ("times", "times.jsonl")):
            text = "".join(json.dumps(record[part], allow_nan=False) + "\n" for record in records)
            atomic_write_bytes(self.out / name, text.encode())
        return [record["line"] for record in records]

    def read_results(self) -> list[dict[str, Any]]:
        """The lines of ``results.jsonl``. Raises :class:`UserError` when there is none, or a line is none."""
        path = self.out / "results.jsonl"
        try:
            return [json.loads(line) for line in path.read_text().splitlines()]
        except OSError as error:
            raise UserError(f"there are no results in '{self.out}': {error.strerror}; run the study first") from None
        except ValueError as error:
            raise UserError(f"'{path}' is damaged ({error}); run the study again, finished cells are kept") from None

    def read_about(self) -> dict[str, Any]:
        """``study.json``: the command of the run and its threads a cell; empty when there was none."""
        return _read(self.out / "study.json") or {}

    def write_about(self, content: dict[str, Any]) -> None:
        from scl_defense.checkpoint import atomic_write_bytes

        atomic_write_bytes(self.out / "study.json", (json.dumps(content, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"'{path}' is damaged; move its folder away and start the study again") from None
