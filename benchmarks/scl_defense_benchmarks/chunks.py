"""An attack on chunks of images: all its starts under guard, every example judged; and several chunks side by side."""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.draws import RowsOf
from scl_defense.guard import frozen
from scl_defense.runtime import derive_seed, stream
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.battery import PlannedAttack
from scl_defense_benchmarks.forward import decide, logits_of
from scl_defense_benchmarks.library_guard import seeded_globals, side_by_side, worker
from scl_defense_benchmarks.loans import Loan, Passes
from scl_defense_benchmarks.tally import Tally, record_of
from scl_defense_benchmarks.twin import CHECKED, Choice, Twin, rounds, twin_of
from scl_defense_benchmarks.verdicts import check_returned, judge


@dataclass(frozen=True)
class Target:
    """What is attacked. images: (N, C, H, W) in [0, 1]; labels, correct: (N,), correct: rightly classified unharmed.
    repeatable: a forward pass draws nothing, so that chunks may be attacked side by side.
    """

    network: nn.Module
    images: Tensor
    labels: Tensor
    correct: Tensor
    repeatable: bool = False

    @cached_property
    def twin(self) -> Twin:
        """What every attack works on a copy of (see :class:`scl_defense_benchmarks.loans.Loan`): checked once."""
        return twin_of(self.network, self.images[:CHECKED], steady=self.repeatable)


@dataclass
class Budget:
    """What is left to spend. batch_size: images at a time, halved when memory runs out; deadline: monotonic seconds.
    precision: what attacks may run in (see :func:`scl_defense_benchmarks.twin.rounds`). workers: chunks side by side.
    """

    batch_size: int
    deadline: float | None = None
    halved: bool = False
    precision: Choice = "fp32"
    workers: int = 1

    def left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()


#: Chunks by number, each with the places of its images.
Chunks = Sequence[tuple[int, Tensor]]
#: A chunk's record and its examples.
Found = tuple[dict[str, Any], Tensor]
_AHEAD = 2  # chunks a worker that may be done before an earlier one is


def portions(missing: Chunks, workers: int, world: int) -> list[Chunks]:
    """What is begun together. Of several processes a chunk for every worker of each: then they tell each other. Of one
    all that keeps every worker busy; the few that are left over share the cores.
    """
    whole = len(missing) - len(missing) % workers if world == 1 else workers * world
    ends = [whole, len(missing)] if world == 1 else [*range(whole, len(missing), whole), len(missing)]
    return [missing[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


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
        """What came of every chunk, in their order, as soon as it is known; a worker that is free takes the next one.

        fits: asked before a chunk is begun; ``None`` instead of a chunk that was not, and of all behind it.
        """

        def one(loan: Loan, chunk: int, places: Tensor, alone: bool) -> Found:
            return attack_chunk(self.target, planned, loan, places, chunk, balls, seed, budget, alone)

        beside = min(len(self.loans), len(chunks))
        if beside <= 1:
            for chunk, places in chunks:
                yield one(self.loans[0], chunk, places, True) if fits() else None
            return
        threads, free, over = torch.get_num_threads(), SimpleQueue[Loan](), Event()
        for loan in self.loans[:beside]:
            free.put(loan)

        def on_worker(chunk: int, places: Tensor) -> Found | None:
            if over.is_set() or not fits():
                over.set()
                return None
            torch.set_num_threads(max(1, threads // beside))
            loan = free.get()
            try:
                with torch.no_grad(), worker():
                    record, best = one(loan, chunk, places, False)
            finally:
                free.put(loan)
            # Side by side they take less than one after the other: what is reported is the time that passes.
            record["seconds"] = round(record["seconds"] / beside, 6)
            return record, best

        waiting, started = list(chunks), deque[Future[Found | None]]()
        try:
            with side_by_side(), ThreadPoolExecutor(beside) as pool:
                try:
                    while waiting or started:
                        while waiting and len(started) < _AHEAD * beside:
                            started.append(pool.submit(on_worker, *waiting.pop(0)))
                        yield started.popleft().result()
                finally:
                    over.set()  # who does not ask for the rest does not wait for it
        finally:
            torch.set_num_threads(threads)


def attack_chunk(
    target: Target,
    planned: PlannedAttack,
    loan: Loan,
    places: Tensor,
    chunk: int,
    balls: Sequence[ThreatModel],
    seed: int,
    budget: Budget,
    alone: bool,
) -> tuple[dict[str, Any], Tensor]:
    """All starts of an attack on one chunk: what came of each image, and what it cost, as plain JSON types; and the
    best examples. alone: nobody else uses the global random state meanwhile.
    """
    device, threat, minimal = target.images.device, planned.threat, bool(planned.attack.minimal)
    images, labels = target.images[places.to(device)], target.labels[places.to(device)]
    tally, m = Tally.empty(len(places), len(balls)), len(places)
    best, passes = images.clone(), loan.passes
    passes.forwards = passes.backwards = 0
    passes.traceable = True
    won, doubted = torch.zeros(m, dtype=torch.bool), torch.zeros(m, dtype=torch.bool)
    for precision, restart, doubted_only in rounds(planned, budget.precision, device):
        rows = (~won & doubted if doubted_only else ~won).nonzero().squeeze(1)
        if tally.fault:
            break
        if not len(rows):
            continue
        twin = loan.twin(precision)
        counters = (chunk, restart) if restart else (chunk,)  # the same for every attack: the attack alone differs
        returned, guided = _called(planned, twin, passes, images, labels, rows, seed, counters, budget, tally, alone)
        rows = rows[: len(returned)]
        if not len(rows):
            break
        given, truth = images[rows.to(device)], labels[rows.to(device)]
        with _seeded(derive_seed(seed, "judge", *counters), alone):
            verdict = judge(target.network, given, truth, returned, threat, minimal=minimal)
            predicted = torch.where(verdict.fooled, verdict.predicted, -1).cpu()
            if precision != "fp32" and not bool(verdict.fooled.all()):
                # What fools the twin alone has stopped the attack too early: once more in float32.
                spared = ~verdict.fooled
                claimed = decide(loan.unwatched(twin, verdict.examples[spared])) != truth[spared]
                doubted[rows[spared.cpu()]] |= claimed.cpu()
        fooled, distance = verdict.fooled.cpu(), verdict.distance.cpu().double()
        for name in ("moved", "outside_box", "outside_ball", "nonfinite"):
            getattr(tally, name)[rows] |= getattr(verdict, name).cpu()
        tally.guided[rows] |= guided.cpu()
        for ball, one in enumerate(balls):  # also of an invalid attack: an example that we checked is one
            tally.inside[ball, rows] |= fooled & one.contains(given, verdict.examples).cpu()
        # Of several examples the last counts, unless an earlier one fools and this one does not, or not as near.
        had, near = tally.fooled[rows], tally.distance[rows]
        better = ~tally.tried[rows] | (fooled & ~had) | (fooled & had & (distance < near)) | (~fooled & ~had)
        taken = rows[better]
        tally.tried[rows] = True
        tally.fooled[taken], tally.distance[taken] = fooled[better], distance[better]
        tally.predicted[taken] = predicted[better]
        best[taken.to(device)] = verdict.examples[better.to(device)]
        won = tally.fooled & (tally.distance <= threat.tolerance())
    if bool(tally.fooled.any()):
        where = tally.fooled.nonzero().squeeze(1)
        with _seeded(derive_seed(seed, "judge rounded", chunk), alone):
            eight_bit = best[where.to(device)].mul(255).round().div(255)
            tally.rounded[where] = (
                decide(logits_of(target.network, eight_bit, multiple=8)) != labels[where.to(device)]
            ).cpu()
    tally.changed_weights = loan.changed()
    return record_of(tally, places, passes), best


def _seeded(seed: int, alone: bool) -> AbstractContextManager[None]:
    """The global generators from ``seed``, where nobody else draws from them."""
    return seeded_globals(seed) if alone else nullcontext()


def _called(
    planned: PlannedAttack,
    network: nn.Module,
    passes: Passes,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    seed: int,
    counters: tuple[int, ...],
    budget: Budget,
    tally: Tally,
    alone: bool,
) -> tuple[Tensor, Tensor]:
    """What the attack returns for ``rows``, ``budget.batch_size`` at a time, and which had a usable gradient.

    Shorter than ``rows`` where it failed; ``tally`` is told the fault, the time, and whether it wrote its input.
    """
    returned, guided, start = [images[:0]], [images.new_zeros(0, dtype=torch.bool)], 0
    while start < len(rows):
        part = rows[start : start + budget.batch_size].to(images.device)
        given, truth = images[part], labels[part]  # indexing copies: the attack may not reach ours
        passes.witness = torch.zeros(len(part), dtype=torch.bool, device=images.device)
        passes.paid = torch.zeros(len(part), dtype=torch.float64)
        before, began = (passes.forwards, passes.backwards, passes.traceable), time.perf_counter()
        as_in_whole = RowsOf(start, start + len(part), len(rows)) if len(part) < len(rows) else nullcontext()
        try:
            with (
                frozen(network),
                _seeded(derive_seed(seed, "globals of attack", *counters), alone),
                torch.enable_grad(),
                as_in_whole,
            ):
                made = planned.attack(network, given, truth, planned.threat, stream(seed, "attack", *counters))
            made = check_returned(made, images[part])
            made.sum().item()  # waits for the device, so that the time is the attack's
        except Exception as error:  # the battery goes on: a failed attack is a row
            if _is_out_of_memory(error) and len(part) > 1:
                error.__traceback__ = None  # it holds the tensors that did not fit
                budget.batch_size, budget.halved = (len(part) + 1) // 2, True
                passes.forwards, passes.backwards, passes.traceable = before
                if images.is_cuda:
                    torch.cuda.empty_cache()
                continue
            tally.fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": .")
            break
        finally:
            tally.seconds += time.perf_counter() - began
        tally.wrote_input |= not (torch.equal(given, images[part]) and torch.equal(truth, labels[part]))
        returned.append(made)
        guided.append(passes.witness)
        tally.forwards[rows[start : start + len(part)]] += passes.paid
        start += len(part)
    return torch.cat(returned), torch.cat(guided)


_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "STATUS_ALLOC_FAILED")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
