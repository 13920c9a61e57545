"""What Ray and SLURM have in common: jobs that are looked after from time to time."""

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from scl_defense_benchmarks.study.cells import Cell
from scl_defense_benchmarks.study.executors import Ended
from scl_defense_benchmarks.study.executors.task import PROGRESS, read_progress

LOOK = 0.5  # seconds between two looks at the cells' folders
COMEBACKS = 20  # how often a cluster may put a cell back into its queue: for time, for a better paying job, a dead node
LATE = 60.0  # seconds that a file may take to be seen here: network file systems remember that it was not there


class Handed:
    """A cell that a cluster has. handle: the cluster's own name for it. where: said while it has not begun."""

    def __init__(self, cell: Cell, folder: Path, handle: Any):
        self.cell, self.folder, self.handle = cell, folder, handle
        self.started = time.monotonic()
        self.said: Mapping[str, Any] | None = None
        self.begun, self.comebacks = False, 0


class Polled(ABC):
    """Executors that are asked. A subclass hands over, looks and cancels; progress is read from the cells' folders."""

    def __init__(self) -> None:
        self._jobs: list[Handed] = []
        self._found: deque[tuple[Handed, Ended | Mapping[str, Any]]] = deque()
        self._looked = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None  # nothing is held open

    @abstractmethod
    def hand_over(self, cell: Cell, folder: Path) -> Any:
        """Give the cell to the cluster; returns the cluster's handle of it."""

    @abstractmethod
    def look(self, jobs: Sequence[Handed]) -> Mapping[Handed, Ended | str]:
        """How jobs have ended, and of those that wait, what for. Those that run, and unknown ones, are left out."""

    @abstractmethod
    def cancel(self, jobs: Sequence[Handed]) -> None:
        """Stop these and wait until they are gone."""

    def start(self, cell: Cell, folder: Path) -> Handed:
        (folder / PROGRESS).unlink(missing_ok=True)  # what an earlier try said
        job = Handed(cell, folder, self.hand_over(cell, folder.resolve()))
        self._jobs.append(job)
        return job

    def next(self, seconds: float) -> tuple[Handed, Ended | Mapping[str, Any]] | None:
        until = time.monotonic() + seconds
        while not self._found:
            if time.monotonic() - self._looked >= LOOK:
                self._look()
                self._looked = time.monotonic()
            elif time.monotonic() >= until:
                return None
            else:
                time.sleep(min(0.1, seconds))
        return self._found.popleft()

    def _look(self) -> None:
        found = self.look(self._jobs)
        for job in list(self._jobs):
            state = found.get(job)
            if isinstance(state, Ended):
                self._jobs.remove(job)
                if state.reason is None:
                    seen(job.folder / "record.json")
                self._found.append((job, state))
                continue
            if isinstance(state, str) and job.begun and not self._came_back(job):
                continue
            said = {"phase": "queued", "why": state} if isinstance(state, str) else read_progress(job.folder)
            if said is not None and said != job.said:
                if said["phase"] != "queued" and not job.begun:
                    job.begun, job.started = True, time.monotonic()
                job.said = said
                self._found.append((job, said))

    def _came_back(self, job: Handed) -> bool:
        """A cell that had begun waits again; whether it may."""
        job.begun, job.comebacks = False, job.comebacks + 1
        (job.folder / PROGRESS).unlink(missing_ok=True)
        if job.comebacks <= COMEBACKS:
            return True
        self._jobs.remove(job)
        self.cancel([job])
        self._found.append((job, Ended(f"the cluster put it back into the queue {job.comebacks} times")))
        return False

    def stop(self, jobs: Sequence[Handed]) -> None:
        self._found.clear()
        self._jobs = [job for job in self._jobs if job not in jobs]
        self.cancel(jobs)


def seen(path: Path) -> bool:
    """Whether a file that a worker has written is there, waiting a while for this machine to see it."""
    until = time.monotonic() + LATE
    while not path.exists():
        if time.monotonic() > until:
            return False
        os.listdir(path.parent)  # makes a network file system ask again
        time.sleep(0.2)
    return True
