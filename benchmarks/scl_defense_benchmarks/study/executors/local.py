"""Cells as processes of this machine, each held by a rope."""

import json
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from scl_defense_benchmarks.study.cells import Cell
from scl_defense_benchmarks.study.executors import Ended
from scl_defense_benchmarks.study.executors.task import PATIENCE, begin, reason


class Running:
    """One cell's process. Its stdin is the rope that the cell holds on to: closing it, or dying, stops the cell."""

    def __init__(self, cell: Cell, folder: Path, threads: int, events: "queue.SimpleQueue[tuple[Running, Any]]"):
        self.cell, self.folder, self.started = cell, folder, time.monotonic()
        self.process, self._log_start = begin(folder, threads)
        self._events = events
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                self._events.put((self, json.loads(line)))
            except ValueError:  # a part of a line: the process was killed
                continue
        self.process.wait()
        self._events.put((self, None))

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def reason(self) -> str | None:
        return reason(self.process.returncode, self.folder, self._log_start)


class Local:
    """The executor of a single machine; a cell that is killed has failed: nothing else can be lost here."""

    def __init__(self, threads: int):
        self._threads = threads
        self._events: queue.SimpleQueue[tuple[Running, Any]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, cell: Cell, folder: Path) -> Running:
        return Running(cell, folder, self._threads, self._events)

    def next(self, seconds: float) -> tuple[Running, Ended | Mapping[str, Any]] | None:
        try:
            job, said = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        return job, Ended(job.reason()) if said is None else said

    def stop(self, jobs: Sequence[Running]) -> None:
        for one in jobs:
            one.let_go()
        until = time.monotonic() + PATIENCE
        for one in jobs:
            try:
                one.process.wait(max(0.1, until - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: what was saved is saved
                one.process.kill()
                one.process.wait()
