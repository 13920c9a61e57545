"""An attack on chunks of images: all its starts under guard, every example judged."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from scl_defense.draws import RowsOf, Several
from scl_defense.guard import frozen
from scl_defense.runtime import derive_seed, stream
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.battery import PlannedAttack
from scl_defense_benchmarks.forward import decide, logits_of
from scl_defense_benchmarks.library_guard import seeded_globals
from scl_defense_benchmarks.loans import Loan, Passes
from scl_defense_benchmarks.native import PGD
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


@dataclass
class _Chunk:
    """A chunk in work. number: its seeds are derived from it; passes: its own share of what was passed.

    won: broken within the ball; doubted: what fooled the bfloat16 twin did not fool the network.
    """

    number: int
    places: Tensor
    images: Tensor
    labels: Tensor
    tally: Tally
    best: Tensor
    won: Tensor
    doubted: Tensor
    passes: Passes

    @classmethod
    def of(cls, target: Target, number: int, places: Tensor, balls: int) -> "_Chunk":
        here, m = places.to(target.images.device), len(places)
        images, labels = target.images[here], target.labels[here]
        nothing, tally = torch.zeros(m, dtype=torch.bool), Tally.empty(m, balls)
        return cls(number, places, images, labels, tally, images.clone(), nothing, nothing.clone(), Passes())

    def counters(self, restart: int) -> tuple[int, ...]:
        """The same for every attack: the attack alone differs."""
        return (self.number, restart) if restart else (self.number,)


@dataclass
class _Asked:
    """What of a chunk is attacked in a round: its rows, and what came back of them, which is less where it failed."""

    chunk: _Chunk
    rows: Tensor
    returned: Tensor
    guided: Tensor


def attack_chunks(
    target: Target,
    planned: PlannedAttack,
    loan: Loan,
    chunks: Chunks,
    balls: Sequence[ThreatModel],
    seed: int,
    budget: Budget,
    alone: bool,
) -> list[Found]:
    """All starts of an attack on chunks: what came of each image, and what it cost, as plain JSON types; and the best
    examples. alone: nobody else uses the global random state meanwhile.

    Several chunks only for what :func:`scl_defense_benchmarks.native.takes_several` and a network that draws nothing:
    each chunk has its own draws, so that no number depends on which others are with it. None of those behind a fault.
    """
    work = [_Chunk.of(target, number, places, len(balls)) for number, places in chunks]
    for precision, restart, doubted_only in rounds(planned, budget.precision, target.images.device):
        if any(one.tally.fault for one in work):
            break
        asked = []
        for one in work:
            rows = (~one.won & one.doubted if doubted_only else ~one.won).nonzero().squeeze(1)
            if len(rows):
                asked.append(_Asked(one, rows, one.images[:0], one.images.new_zeros(0, dtype=torch.bool)))
        if not asked:
            continue
        twin = loan.twin(precision)
        if len(work) > 1:
            if not _called_together(planned, twin, loan.passes, asked, seed, restart, budget):
                # A fault is one chunk's, and which are attacked before it must not depend on who is with them.
                found: list[Found] = []
                for one_chunk in chunks:
                    found += attack_chunks(target, planned, loan, [one_chunk], balls, seed, budget, alone)
                    if found[-1][0]["fault"]:
                        break
                return found
        else:
            _called(planned, twin, loan.passes, asked[0], seed, restart, budget, alone)
        for one_asked in asked:
            one_asked.rows = one_asked.rows[: len(one_asked.returned)]
            if len(one_asked.rows):
                rough = twin if precision != "fp32" else None
                _judge(target, planned, one_asked, balls, seed, restart, alone, loan, rough)
    changed = loan.changed()
    for one in work:
        _round(target, one, seed, alone)
        one.tally.changed_weights = changed
    return [(record_of(one.tally, one.places, one.passes), one.best) for one in work]


def _judge(
    target: Target,
    planned: PlannedAttack,
    asked: _Asked,
    balls: Sequence[ThreatModel],
    seed: int,
    restart: int,
    alone: bool,
    loan: Loan,
    rough: Twin | None,
) -> None:
    """Our verdict on what came back. rough: the twin that it was made on, where that rounds more than the network."""
    chunk, rows, threat = asked.chunk, asked.rows, planned.threat
    tally, device = chunk.tally, chunk.images.device
    given, truth = chunk.images[rows.to(device)], chunk.labels[rows.to(device)]
    with _seeded(derive_seed(seed, "judge", *chunk.counters(restart)), alone):
        verdict = judge(target.network, given, truth, asked.returned, threat, minimal=bool(planned.attack.minimal))
        predicted = torch.where(verdict.fooled, verdict.predicted, -1).cpu()
        if rough is not None and not bool(verdict.fooled.all()):
            # What fools the twin alone has stopped the attack too early: once more in float32.
            spared = ~verdict.fooled
            claimed = decide(loan.unwatched(rough, verdict.examples[spared])) != truth[spared]
            chunk.doubted[rows[spared.cpu()]] |= claimed.cpu()
    fooled, distance = verdict.fooled.cpu(), verdict.distance.cpu().double()
    for name in ("moved", "outside_box", "outside_ball", "nonfinite"):
        getattr(tally, name)[rows] |= getattr(verdict, name).cpu()
    tally.guided[rows] |= asked.guided.cpu()
    for ball, one in enumerate(balls):  # also of an invalid attack: an example that we checked is one
        tally.inside[ball, rows] |= fooled & one.contains(given, verdict.examples).cpu()
    # Of several examples the last counts, unless an earlier one fools and this one does not, or not as near.
    had, near = tally.fooled[rows], tally.distance[rows]
    better = ~tally.tried[rows] | (fooled & ~had) | (fooled & had & (distance < near)) | (~fooled & ~had)
    taken = rows[better]
    tally.tried[rows] = True
    tally.fooled[taken], tally.distance[taken] = fooled[better], distance[better]
    tally.predicted[taken] = predicted[better]
    chunk.best[taken.to(device)] = verdict.examples[better.to(device)]
    chunk.won = tally.fooled & (tally.distance <= threat.tolerance())


def _round(target: Target, chunk: _Chunk, seed: int, alone: bool) -> None:
    """Whether what fools does so as an 8-bit image too."""
    if not bool(chunk.tally.fooled.any()):
        return
    where = chunk.tally.fooled.nonzero().squeeze(1)
    here = where.to(chunk.images.device)
    with _seeded(derive_seed(seed, "judge rounded", chunk.number), alone):
        eight_bit = chunk.best[here].mul(255).round().div(255)
        predicted = decide(logits_of(target.network, eight_bit, multiple=8))
    chunk.tally.rounded[where] = (predicted != chunk.labels[here]).cpu()


def _seeded(seed: int, alone: bool) -> AbstractContextManager[None]:
    """The global generators from ``seed``, where nobody else draws from them."""
    return seeded_globals(seed) if alone else nullcontext()


def _called(
    planned: PlannedAttack,
    network: nn.Module,
    passes: Passes,
    asked: _Asked,
    seed: int,
    restart: int,
    budget: Budget,
    alone: bool,
) -> None:
    """Ask the attack for a chunk's rows, ``budget.batch_size`` at a time. The chunk's tally is told a fault, the time,
    and whether it wrote its input.
    """
    chunk, counters = asked.chunk, asked.chunk.counters(restart)
    images, labels, tally, rows = chunk.images, chunk.labels, chunk.tally, asked.rows
    returned, guided, start = [asked.returned], [asked.guided], 0
    while start < len(rows):
        part = rows[start : start + budget.batch_size].to(images.device)
        given, truth = images[part], labels[part]  # indexing copies: the attack may not reach ours
        passes.begin(len(part), images.device)
        as_in_whole = RowsOf(start, start + len(part), len(rows)) if len(part) < len(rows) else nullcontext()
        began = time.perf_counter()
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
            if _smaller(error, len(part), budget):
                continue
            chunk.passes.add(passes)
            tally.fault = _fault(error)
            break
        finally:
            tally.seconds += time.perf_counter() - began
        chunk.passes.add(passes)
        tally.wrote_input |= not (torch.equal(given, images[part]) and torch.equal(truth, labels[part]))
        returned.append(made)
        guided.append(passes.witness)
        tally.forwards[rows[start : start + len(part)]] += passes.paid
        start += len(part)
    asked.returned, asked.guided = torch.cat(returned), torch.cat(guided)


def _called_together(
    planned: PlannedAttack,
    network: nn.Module,
    passes: Passes,
    asked: Sequence[_Asked],
    seed: int,
    restart: int,
    budget: Budget,
) -> bool:
    """The same of several chunks in one call: the attack itself passes ``budget.batch_size`` at a time. False, and
    nothing is told, where it failed.
    """
    attack, began, at = cast(PGD, planned.attack), time.perf_counter(), asked[0].chunk.images.device
    sizes = [len(one.rows) for one in asked]
    draws = [stream(seed, "attack", *one.chunk.counters(restart)) for one in asked]
    several = Several(list(zip(draws, sizes, strict=True)))
    passes.begin(sum(sizes), at)
    try:
        images = torch.cat([one.chunk.images[one.rows.to(at)] for one in asked])
        labels = torch.cat([one.chunk.labels[one.rows.to(at)] for one in asked])
        given, truth = images.clone(), labels.clone()
        with frozen(network), torch.enable_grad():
            made = attack.together(network, given, truth, planned.threat, several, budget.batch_size)
        made = check_returned(made, images)
        made.sum().item()
    except Exception:  # whatever it is, too little memory too: it is met again, and told, chunk by chunk
        return False
    seconds = time.perf_counter() - began
    wrote = not (torch.equal(given, images) and torch.equal(truth, labels))
    shares = (values.split(sizes) for values in (made, passes.witness, passes.paid, passes.repaid))
    for one, examples, guided, paid, repaid in zip(asked, *shares, strict=True):
        one.returned, one.guided, tally = examples, guided, one.chunk.tally
        tally.forwards[one.rows] += paid
        tally.wrote_input |= wrote
        tally.seconds += seconds * len(one.rows) / len(images)
        one.chunk.passes.add(Passes(round(float(paid.sum())), int(repaid.sum()), traceable=passes.traceable))
    return True


def _smaller(error: Exception, had: int, budget: Budget) -> bool:
    """Whether memory ran out, and fewer images at a time are worth trying: the budget is told."""
    if not _is_out_of_memory(error) or had <= 1:
        return False
    error.__traceback__ = None  # it holds the tensors that did not fit
    budget.batch_size, budget.halved = (had + 1) // 2, True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def _fault(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": .")


_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "STATUS_ALLOC_FAILED")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
