"""One attack of a battery: run on chunks under guard, judged, and summed up as a row; and all of them together."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.draws import RowsOf
from scl_defense.guard import frozen
from scl_defense.runtime import Ranks, derive_seed, ranks, stream
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks import diagnostics, results
from scl_defense_benchmarks.battery import PlannedAttack
from scl_defense_benchmarks.examples import ExampleFile
from scl_defense_benchmarks.forward import decide, logits_of
from scl_defense_benchmarks.library_guard import seeded_globals, side_by_side, worker
from scl_defense_benchmarks.loans import Loan, Passes
from scl_defense_benchmarks.results import AttackRow, WorstCase
from scl_defense_benchmarks.state import State
from scl_defense_benchmarks.statistics import wilson
from scl_defense_benchmarks.twin import CHECKED, Choice, Twin, precision_of, rounds, twin_of
from scl_defense_benchmarks.verdicts import check_returned, judge

#: Called before an attack and after every chunk with the attack's label, images done, images in all.
Progress = Callable[[str, int, int], None]

# What is seeded together and kept together: so many rightly classified images, in their order. No option changes it.
CHUNK = 128


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
        return twin_of(self.network, self.images[:CHECKED])


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


# Per image and attack: everything that rows, worst cases and the per-image file are made of. Lists in a record.
_FLAGS = ("tried", "fooled", "moved", "guided", "outside_box", "outside_ball", "nonfinite", "rounded")


@dataclass
class Tally:
    """What is known of an attack, image by image, (N,) on the CPU.

    tried: there is a verdict. rounded: fools as an 8-bit image too. inside: (T, N) an example of it lies in the ball of
    that number and fools. predicted: the label of the example, -1 unless it fools. forwards: what the image paid, as
    far as that can be told (see :class:`scl_defense_benchmarks.loans.Passes`); backwards: of its chunk, shared equally.
    skipped: (N,) not attacked, because broken before.
    """

    tried: Tensor
    fooled: Tensor
    moved: Tensor
    guided: Tensor
    outside_box: Tensor
    outside_ball: Tensor
    nonfinite: Tensor
    rounded: Tensor
    inside: Tensor
    distance: Tensor
    predicted: Tensor
    forwards: Tensor
    backwards: Tensor
    skipped: Tensor
    traceable: bool = True
    wrote_input: bool = False
    changed_weights: bool = False
    fault: str = ""
    unfinished: str = ""
    seconds: float = 0.0

    @classmethod
    def empty(cls, n: int, balls: int) -> "Tally":
        flags = {name: torch.zeros(n, dtype=torch.bool) for name in (*_FLAGS, "skipped")}
        numbers = {name: torch.zeros(n, dtype=torch.float64) for name in ("distance", "forwards", "backwards")}
        return cls(
            **flags,
            **numbers,
            inside=torch.zeros(balls, n, dtype=torch.bool),
            predicted=torch.full((n,), -1),
        )

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one chunk's record (see :func:`_record`)."""
        places = torch.tensor(record["places"], dtype=torch.int64)
        for name in _FLAGS:
            getattr(self, name)[places] = _bits(record[name])
        for ball, text in enumerate(record["inside"]):
            self.inside[ball, places] = _bits(text)
        self.distance[places] = torch.tensor(record["distance"], dtype=torch.float64)
        self.predicted[places] = torch.tensor(record["predicted"], dtype=torch.int64)
        self.forwards[places] = torch.tensor(record["paid"], dtype=torch.float64)
        self.backwards[places] = record["backwards"] / max(len(places), 1)
        self.traceable &= record["traceable"]
        self.wrote_input |= record["wrote_input"]
        self.changed_weights |= record["changed_weights"]
        self.fault = self.fault or record["fault"]
        self.seconds += record["seconds"]


@dataclass(frozen=True)
class Attempt:
    """An attack's row and, image by image, what it is made of. number: its place in the battery."""

    row: AttackRow
    planned: PlannedAttack
    number: int
    tally: Tally
    moved: Tensor


def attempt(
    target: Target,
    planned: PlannedAttack,
    *,
    number: int = 0,
    balls: Sequence[ThreatModel] = (),
    seed: int,
    budget: Budget,
    state: State | None = None,
    spared: Tensor | None = None,
    smaller: Sequence["Attempt"] = (),
    examples: ExampleFile | None = None,
    progress: Progress | None = None,
) -> Attempt:
    """Run one attack on the rightly classified images and judge what it returns. Never raises for its faults.

    ``target.network`` must be in eval mode, and gradients switched off outside. number: the attack's place in the
    battery. Every chunk has its own seed, derived from ``seed`` and the chunk's and the restart's number: all attacks
    of a battery start alike, whatever ``budget.batch_size`` is. state: chunks found there are not attacked again.
    spared: (N,) bool: images not attacked, because an earlier attack of the cascade has broken them. smaller: the same
    attack's attempts in smaller balls, the smallest first: what they broke is broken here and not attacked again.
    balls: those of the worst cases, this attack's among them.
    """
    balls, state = tuple(balls) or (planned.threat,), state or State(None, {})
    planned = planned if target.repeatable else _patient(planned)
    n = len(target.correct)
    tally, correct = Tally.empty(n, len(balls)), target.correct.cpu()
    kept = examples is not None and examples.has(number)
    carried = torch.zeros(n, dtype=torch.bool)
    for one in smaller:
        new = one.tally.inside[balls.index(planned.threat)] & correct & ~carried
        tally.distance[new], tally.predicted[new] = one.tally.distance[new], one.tally.predicted[new]
        carried |= new
        if examples is not None:
            examples.copy(one.number, number, new.nonzero().squeeze(1))
    tally.skipped = carried if spared is None else (carried | spared) & correct
    chunks = correct.nonzero().squeeze(1).split(CHUNK)
    wanted = [chunk[~tally.skipped[chunk]] for chunk in chunks]
    total, done, spent, fresh, missing = sum(map(len, wanted)), 0, 0.0, 0, []
    everybody = ranks()
    saving = everybody.from_first(lambda: examples is not None)
    there = everybody.from_first(lambda: _found_before(state, number, wanted, saving, kept))
    for chunk, places in enumerate(wanted):
        if chunk in there:
            tally.add(state.get(number, chunk) or {})
            done += len(places)
        elif len(places):
            missing.append((chunk, places))
    if progress is not None:
        progress(planned.label, done, total)
    shared = target.repeatable and getattr(planned.attack, "parallel", False)
    workers = max(1, min(budget.workers, len(missing))) if shared else 1
    with _Crew(target, workers) as crew:
        for wave in _waves(missing, workers * everybody.world):
            if tally.fault:
                break
            # A chunk is never cut short: one that would not fit any more is not begun, nor the attack's rest.
            each = spent / fresh if fresh else 0.0
            if everybody.from_first(lambda rest=each * (total - done): budget.left() <= max(rest, 0.0)):  # type: ignore[misc]
                tally.unfinished = f"time limit: {done} of {total} images were attacked"
                break
            started = time.monotonic()
            mine = wave[everybody.rank :: everybody.world]
            found = crew.attack(planned, mine, number, balls, seed, budget) if mine else []
            found = _of_all(everybody, found, len(wave), saving, time.monotonic() - started)
            spent, fresh = spent + time.monotonic() - started, fresh + sum(len(places) for _, places in wave)
            for (chunk, places), (record, best) in zip(wave, found, strict=True):
                if examples is not None and "1" in record["tried"]:
                    tried = _bits(record["tried"])
                    examples.put(number, places[tried], best[tried.to(best.device)])
                record["saved"] = saving
                state.put(number, chunk, record)
                tally.add(record)
                done += len(places)
            if progress is not None:
                progress(planned.label, done, total)
    budget.batch_size = -everybody.most(-budget.batch_size)
    budget.halved = bool(everybody.most(int(budget.halved)))
    if tally.changed_weights:
        tally.fault = tally.fault or "it changed the network's weights (of its copy; nothing was judged on that)"
    found = summed_up(planned, target, tally, carried, number)
    ran_in = precision_of(planned, budget.precision, target.images.device)
    return dataclasses.replace(found, row=dataclasses.replace(found.row, precision=ran_in))


def _found_before(state: State, number: int, wanted: Sequence[Tensor], saving: bool, kept: bool) -> set[int]:
    """The chunks that need not be attacked again."""
    found = set()
    for chunk, places in enumerate(wanted):
        record = state.get(number, chunk)
        usable = record is not None and record["places"] == places.tolist()
        if usable and record is not None and (not saving or (kept and record["saved"])):
            found.add(chunk)
    return found


_Found = list[tuple[dict[str, Any], Tensor]]  # a chunk's record and its examples


def _of_all(everybody: Ranks, found: _Found, chunks: int, saving: bool, took: float) -> _Found:
    """What all processes found of a wave's chunks, which they took in turn; the examples only if they are saved."""
    if everybody.world == 1:
        return found
    own = [(record, best.cpu() if saving else best[:0].cpu()) for record, best in found]
    told = everybody.everyones((own, took))
    joined = [told[place % everybody.world][0][place // everybody.world] for place in range(chunks)]
    # Side by side they took less than one after the other: what is reported is the time that passed.
    passed, summed = max(took for _, took in told), sum(record["seconds"] for record, _ in joined)
    for record, _ in joined:
        record["seconds"] = round(record["seconds"] * min(1.0, passed / max(summed, 1e-9)), 6)
    return joined


def _patient(planned: PlannedAttack) -> PlannedAttack:
    """The attack without its early stop: of a network that draws, one wrong answer is no success."""
    if getattr(planned.attack, "early_stop", False) and dataclasses.is_dataclass(planned.attack):
        return dataclasses.replace(planned, attack=dataclasses.replace(planned.attack, early_stop=False))
    return planned


_Wave = Sequence[tuple[int, Tensor]]  # chunks by number, each with the places of its images


def _waves(missing: _Wave, workers: int) -> list[_Wave]:
    """Chunks that are attacked side by side; what is left over at the end is shared by fewer."""
    return [missing[start : start + workers] for start in range(0, len(missing), workers)]


class _Crew:
    """Workers with a loan each. With one of them nothing runs in another thread."""

    def __init__(self, target: Target, workers: int):
        self.target = target
        self.loans = [Loan(target.twin) for _ in range(workers)]

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *exception: object) -> None:
        for loan in self.loans:
            loan.close()

    def attack(
        self, planned: PlannedAttack, wave: _Wave, number: int, balls: Sequence[ThreatModel], seed: int, budget: Budget
    ) -> list[tuple[dict[str, Any], Tensor]]:
        """The record and the examples of every chunk of the wave, in its order."""

        def one(loan: Loan, chunk: int, places: Tensor, alone: bool) -> tuple[dict[str, Any], Tensor]:
            return _attack_chunk(self.target, planned, loan, places, chunk, balls, seed, budget, alone)

        if len(wave) == 1:
            return [one(self.loans[0], *wave[0], True)]
        threads = torch.get_num_threads()

        def on_worker(loan: Loan, chunk: int, places: Tensor) -> tuple[dict[str, Any], Tensor]:
            torch.set_num_threads(max(1, threads // len(wave)))
            with torch.no_grad(), worker():
                return one(loan, chunk, places, False)

        began = time.perf_counter()
        try:
            with side_by_side(), ThreadPoolExecutor(len(wave)) as pool:
                started = [pool.submit(on_worker, loan, *it) for loan, it in zip(self.loans, wave, strict=False)]
                found = [future.result() for future in started]
        finally:
            torch.set_num_threads(threads)
        # Side by side they took less than one after the other: what is reported is the time that passed.
        took, summed = time.perf_counter() - began, sum(record["seconds"] for record, _ in found)
        for record, _ in found:
            record["seconds"] = round(record["seconds"] * min(1.0, took / max(summed, 1e-9)), 6)
        return found


def _attack_chunk(
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
            tally.rounded[where] = (decide(logits_of(target.network, eight_bit)) != labels[where.to(device)]).cpu()
    tally.changed_weights = loan.changed()
    return _record(tally, places, passes), best


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


def _record(tally: Tally, places: Tensor, passes: Passes) -> dict[str, Any]:
    return {
        "places": places.tolist(),
        **{name: _text(getattr(tally, name)) for name in _FLAGS},
        "inside": [_text(one) for one in tally.inside],
        "distance": tally.distance.tolist(),
        "predicted": tally.predicted.tolist(),
        "forwards": passes.forwards,
        "paid": [float(f"{paid:.8g}") for paid in tally.forwards.tolist()],
        "backwards": passes.backwards,
        "traceable": passes.traceable,
        "wrote_input": tally.wrote_input,
        "changed_weights": tally.changed_weights,
        "fault": tally.fault,
        "seconds": round(tally.seconds, 6),
    }


def _text(flags: Tensor) -> str:
    return "".join("1" if flag else "0" for flag in flags.tolist())


def _bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)


def counted_in(planned: PlannedAttack, other: Attempt, target: Target, number: int) -> Attempt:
    """A minimal-norm attack in another ball: the same examples, counted at another radius, at no cost."""
    found = summed_up(planned, target, other.tally, torch.zeros(len(target.correct), dtype=torch.bool), number)
    note = found.row.note or f"the examples of {other.row.label}, counted at this radius"
    return dataclasses.replace(found, row=dataclasses.replace(found.row, seconds=0.0, note=note))


def summed_up(planned: PlannedAttack, target: Target, tally: Tally, carried: Tensor, number: int) -> Attempt:
    """The attempt of ``planned`` from what is known image by image. carried: (N,) broken by it in a smaller ball."""
    moved = tally.moved
    if planned.attack.access == "white-box" and tally.traceable and planned.threat.radius > 0:
        # A random start moves an image, but without a gradient nobody has looked for its weakness.
        moved = moved & (tally.guided | tally.fooled)
    return Attempt(_row(planned, target.correct.cpu(), tally, moved, carried), planned, number, tally, moved)


def _row(planned: PlannedAttack, correct: Tensor, tally: Tally, moved: Tensor, carried: Tensor) -> AttackRow:
    attack, threat, n = planned.attack, planned.threat, len(correct)
    tried, spared = tally.tried, tally.skipped & ~carried
    broken = tried & tally.fooled & (tally.distance <= threat.tolerance())
    outcomes = torch.where(correct, results.UNTRIED, results.MISCLASSIFIED)
    outcomes[tried] = torch.where(moved, results.ROBUST, results.UNMOVED)[tried]
    outcomes[spared], outcomes[broken | carried] = results.SPARED, results.BROKEN
    found = tried & tally.fooled
    shown = (tried | carried) & ~tally.nonfinite
    distances = [
        float(f"{distance:.6g}") if there else None
        for distance, there in zip(tally.distance.tolist(), shown.tolist(), strict=True)
    ]
    attacked = int(tried.sum()) if tally.unfinished else int((correct & ~tally.skipped).sum())
    unmoved, robust = int((outcomes == results.UNMOVED).sum()), int((outcomes == results.ROBUST).sum())
    status, note = "ok", ""
    if tally.fault:
        status, note = "failed", tally.fault
    elif tally.unfinished:
        status, note = "not run", tally.unfinished
    elif unmoved > diagnostics.DOUBTFUL * attacked:
        status = "invalid" if unmoved > diagnostics.INVALID * attacked else "doubtful"
        note = f"it made no real attempt on {unmoved} of {attacked} images"
    known = status in ("ok", "doubtful")
    calls = max(int(tried.sum()), 1)
    return AttackRow(
        label=planned.label,
        name=planned.name,
        library=str(getattr(attack, "library", type(attack).__module__)),
        access=str(attack.access),
        norm=threat.norm,
        eps=threat.eps,
        minimal=bool(attack.minimal),
        options=_plain(planned.options),
        status=status,
        note=note,
        attacked=attacked,
        broken=int((broken | carried).sum()),
        found=int(found.sum()),
        unmoved=unmoved,
        violations={
            "box": int(tally.outside_box.sum()),
            "ball": int(tally.outside_ball.sum()),
            "nonfinite": int(tally.nonfinite.sum()),
        },
        robust_accuracy=robust / n if known else None,
        interval=wilson(robust, n) if known else None,
        median_distance=float(tally.distance[found].median()) if bool(found.any()) else None,
        seconds=round(tally.seconds, 4),
        forwards=round(float(tally.forwards[tried].sum()) / calls, 2),
        backwards=round(float(tally.backwards[tried].sum()) / calls, 2),
        outcomes=tuple(outcomes.tolist()),
        distances=tuple(distances),
        restarts=getattr(planned, "restarts", 1),
        carried=int(carried.sum()),
        spared=int(spared.sum()),
        rounded=int((broken & tally.rounded).sum()) if bool(broken.any()) else None,
        made=int(broken.sum()),
        predictions=tuple(tally.predicted.tolist()),
        queries=tuple(float(f"{value:.6g}") for value in tally.forwards.tolist()),
    )


def worst_case(number: int, threat: ThreatModel, target: Target, attempts: Sequence[Attempt]) -> WorstCase:
    """All attempts together for the ball of that number, image by image (see :class:`WorstCase`)."""
    correct = target.correct.cpu()
    broken, moved = torch.zeros_like(correct), torch.zeros_like(correct)
    valid = []
    for one in attempts:
        broken |= one.tally.inside[number]  # also of an invalid or failed attack: an example that we checked is one
        if one.planned.threat == threat and one.row.robust_accuracy is not None and one.row.access != "control":
            valid.append(one.row.label)
            moved |= one.tally.tried & one.moved
    unbroken = correct & ~broken
    robust, n = unbroken & moved, len(correct)
    outcomes = torch.where(correct, results.UNMOVED, results.MISCLASSIFIED)
    outcomes[robust], outcomes[broken] = results.ROBUST, results.BROKEN
    count = int(robust.sum())
    return WorstCase(
        norm=threat.norm,
        eps=threat.eps,
        attacks=tuple(valid),
        broken=int(broken.sum()),
        unmoved=int((unbroken & ~moved).sum()),
        robust_accuracy=count / n if valid else None,
        interval=wilson(count, n) if valid else None,
        note="" if valid else "no valid attack in this ball (a control is none), so nothing is known",
        outcomes=tuple(outcomes.tolist()),
    )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON types."""
    keep = (str, int, float, bool, type(None))
    return {
        name: value if isinstance(value, keep) else list(value) if isinstance(value, (list, tuple)) else str(value)
        for name, value in options.items()
    }
