"""Cells side by side, on whatever executor: watched; a failed one is reported and the others go on."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scl_defense.runtime import StopRequest
from scl_defense_benchmarks.study.cells import Cell
from scl_defense_benchmarks.study.executors import TRIES, Ended, Executor

Event = Callable[[Mapping[str, Any]], None]


def run_cells(
    cells: Sequence[tuple[Cell, Callable[[], Path]]],
    *,
    executor: Executor,
    jobs: int,
    stop: StopRequest,
    on_done: Callable[[Cell, str | None], str | None],
    on_event: Event,
) -> None:
    """Run cells, at most ``jobs`` handed over at a time, in order. Each comes with what prepares its folder.

    on_done: told of every cell that ended, with the reason when it failed; returns the reason that counts. A
    cell whose worker was lost is tried again, :data:`TRIES` times in all. Returns early when a stop is asked for: the
    cells then save and end, and are not reported as failed.
    """
    waiting, running, tries = list(cells), {}, Counter[str]()
    try:
        while (waiting and not stop) or running:
            while waiting and not stop and len(running) < jobs:
                cell, prepare = waiting.pop(0)
                job = executor.start(cell, prepare())
                running[job] = prepare
                tries[cell.id] += 1
                on_event({"event": "start", "cell": cell.id})
            found = executor.next(0.2)
            if found is None:
                on_event({"event": "tick"})
            else:
                job, said = found
                if not isinstance(said, Ended):
                    on_event({**said, "event": "progress", "cell": job.cell.id})
                else:
                    prepare = running.pop(job)
                    if said.reason is not None and stop:
                        pass  # it was stopped, and has saved
                    elif said.lost and tries[job.cell.id] < TRIES:
                        _lost(job, said, tries[job.cell.id], on_event)
                        waiting.insert(0, (job.cell, prepare))
                    else:
                        _ended(job, said, tries[job.cell.id], on_done, on_event)
            if stop and running:
                break
    finally:  # a stop, or an error of the study itself: no cell is left behind
        if running:
            executor.stop(list(running))


def _lost(job: Any, said: Ended, tried: int, on_event: Event) -> None:
    with open(job.folder / "log.txt", "a") as log:
        log.write(f"note: {said.reason}, try {tried} of {TRIES}; the cell goes on from what it saved\n")
    on_event({"event": "lost", "cell": job.cell.id, "reason": said.reason, "tried": tried, "tries": TRIES})


def _ended(
    job: Any, said: Ended, tried: int, on_done: Callable[[Cell, str | None], str | None], on_event: Event
) -> None:
    reason = f"{said.reason}, {tried} tries" if said.lost else said.reason
    reason = on_done(job.cell, reason)
    seconds = time.monotonic() - job.started
    on_event({"event": "done" if reason is None else "failed", "cell": job.cell.id, "reason": reason,
              "seconds": seconds, "log": str(job.folder / "log.txt")})  # fmt: skip
