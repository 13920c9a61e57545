"""Chunks side by side: workers with a loan each, and how many chunks a worker takes at a time."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import cast

import torch

from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.battery import PlannedAttack
from scl_defense_benchmarks.chunks import Budget, Chunks, Found, Target, attack_chunks
from scl_defense_benchmarks.library_guard import side_by_side, worker
from scl_defense_benchmarks.loans import Loan
from scl_defense_benchmarks.native import PGD, takes_several

#: Lots a worker that may be done before an earlier one is.
_AHEAD = 2
#: Chunks that are attacked together at most; where what a lot finds would be long in coming, fewer: by the steps of all
#: starts, the bytes of images, the network's parameters. Of no clock: a lot's passes may round as a chunk's do not.
LOT, LOT_STEPS, LOT_BYTES, LOT_PARAMETERS = 8, 240, 1 << 26, 1_000_000


def portions(missing: Chunks, workers: int, world: int) -> list[Chunks]:
    """What is begun together. Of several processes a chunk for every worker of each: then they tell each other. Of one
    all that keeps every worker busy; the few that are left over share the cores.
    """
    whole = len(missing) - len(missing) % workers if world == 1 else workers * world
    ends = [whole, len(missing)] if world == 1 else [*range(whole, len(missing), whole), len(missing)]
    return [missing[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


def lots(planned: PlannedAttack, target: Target, chunks: Chunks, beside: int, budget: Budget) -> list[Chunks]:
    """What a worker takes at a time, as many chunks for each of them: one, but for an attack that takes several (see
    :func:`scl_defense_benchmarks.native.takes_several`), of a small network that draws nothing, without a deadline.
    """
    size, attack = 1, cast(PGD, planned.attack)
    small = sum(parameter.numel() for parameter in target.network.parameters()) <= LOT_PARAMETERS
    if takes_several(attack) and target.repeatable and small and budget.deadline is None:
        steps = attack.steps * (1 + getattr(planned, "restarts", 1)) // 2  # a restart gets what is left
        weight = max((len(places) for _, places in chunks), default=0) * target.images[:1].nbytes
        most = max(min(LOT, LOT_STEPS // max(steps, 1), LOT_BYTES // max(weight, 1)), 1)
        turns = max(-(-len(chunks) // (beside * most)), 1)
        size = max(-(-len(chunks) // (beside * turns)), 1)
    return [chunks[start : start + size] for start in range(0, len(chunks), size)]


class Crew:
    """Workers with a loan each. With one of them nothing runs in another thread."""

    def __init__(self, target: Target, workers: int):
        self.target = target
        self.loans = [Loan(target.twin) for _ in range(workers)]

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *exception: object) -> None:
        for loan in self.loans:
            loan.close()

    def attack(
        self,
        planned: PlannedAttack,
        chunks: Chunks,
        balls: Sequence[ThreatModel],
        seed: int,
        budget: Budget,
        fits: Callable[[], bool] = lambda: True,
    ) -> Generator[Found | None]:
        """What came of every chunk, in their order, as soon as it is known; a worker that is free takes the next ones.

        fits: asked before a chunk is begun; ``None`` instead of a chunk that was not, and of all behind it.
        """
        beside = max(min(len(self.loans), len(chunks)), 1)
        for loan in self.loans:
            loan.withdrawn.clear()
        waiting = deque(lots(planned, self.target, chunks, beside, budget))

        def one(loan: Loan, lot: Chunks, alone: bool) -> list[Found]:
            return attack_chunks(self.target, planned, loan, lot, balls, seed, budget, alone)

        if beside == 1:
            for lot in waiting:
                yield from one(self.loans[0], lot, True) if fits() else [None for _ in lot]
            return
        threads, free, over = torch.get_num_threads(), SimpleQueue[Loan](), Event()
        for loan in self.loans[:beside]:
            free.put(loan)

        def on_worker(lot: Chunks) -> list[Found | None]:
            if over.is_set() or not fits():
                over.set()
                return [None for _ in lot]
            torch.set_num_threads(max(1, threads // beside))
            loan = free.get()
            try:
                with torch.no_grad(), worker():
                    found = one(loan, lot, False)
            finally:
                free.put(loan)
            for record, _ in found:
                # Side by side they take less than one after the other: what is reported is the time that passes.
                record["seconds"] = round(record["seconds"] / beside, 6)
            return [*found]

        started = deque[Future[list[Found | None]]]()
        try:
            with side_by_side(), ThreadPoolExecutor(beside) as pool:
                try:
                    while waiting or started:
                        while waiting and len(started) < _AHEAD * beside:
                            started.append(pool.submit(on_worker, waiting.popleft()))
                        yield from started.popleft().result()
                finally:
                    over.set()  # who does not ask for the rest does not wait for it
                    for loan in self.loans:
                        loan.withdrawn.set()
        finally:
            torch.set_num_threads(threads)
