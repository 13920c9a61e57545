"""One attack of a battery: run on chunks by one process or several, and summed up as a row."""

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from scl_defense.runtime import Ranks, ranks
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.battery import PlannedAttack
from scl_defense_benchmarks.chunks import Budget, Chunks, Found, Target
from scl_defense_benchmarks.counting import Attempt, summed_up
from scl_defense_benchmarks.crew import Crew, portions
from scl_defense_benchmarks.examples import ExampleFile
from scl_defense_benchmarks.state import State
from scl_defense_benchmarks.tally import Tally, bits
from scl_defense_benchmarks.twin import precision_of

#: Called before an attack and after every chunk with the attack's label, images done, images in all.
Progress = Callable[[str, int, int], None]

# What is seeded together and kept together: so many rightly classified images, in their order. No option changes it.
CHUNK = 128


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
    total, done, fresh, missing = sum(map(len, wanted)), 0, 0, []
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
    began = time.monotonic()

    def fits() -> bool:
        """A chunk is never cut short: one that would not fit any more is not begun, nor the attack's rest."""
        each = (time.monotonic() - began) / fresh if fresh else 0.0
        return budget.left() > max(each * (total - done), 0.0)

    with Crew(target, workers) as crew:
        for portion in portions(missing, workers, everybody.world):
            if tally.fault or tally.unfinished:
                break
            if everybody.world == 1:
                found = crew.attack(planned, portion, balls, seed, budget, fits)
            else:
                found = _of_all(everybody, crew, planned, portion, balls, seed, budget, fits, saving)
            with closing(found):
                for (chunk, places), made in zip(portion, found, strict=False):
                    if made is None:
                        tally.unfinished = f"time limit: {done} of {total} images were attacked"
                        break
                    record, best = made
                    if examples is not None and "1" in record["tried"]:
                        tried = bits(record["tried"])
                        examples.put(number, places[tried], best[tried.to(best.device)])
                    record["saved"] = saving
                    state.put(number, chunk, record)
                    tally.add(record)
                    done, fresh = done + len(places), fresh + len(places)
                    if progress is not None:
                        progress(planned.label, done, total)
                    if tally.fault:
                        break
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


def _of_all(
    everybody: Ranks,
    crew: Crew,
    planned: PlannedAttack,
    portion: Chunks,
    balls: Sequence[ThreatModel],
    seed: int,
    budget: Budget,
    fits: Callable[[], bool],
    saving: bool,
) -> Generator[Found | None]:
    """What all processes found of a portion's chunks, which they take in turn; the examples only if they are saved."""
    if not everybody.from_first(fits):
        yield None
        return
    began = time.monotonic()
    own = [one for one in crew.attack(planned, portion[everybody.rank :: everybody.world], balls, seed, budget) if one]
    own = [(record, best.cpu() if saving else best[:0].cpu()) for record, best in own]
    told = everybody.everyones((own, time.monotonic() - began))
    joined = [told[place % everybody.world][0][place // everybody.world] for place in range(len(portion))]
    # Side by side they took less than one after the other: what is reported is the time that passed.
    passed, summed = max(took for _, took in told), sum(record["seconds"] for record, _ in joined)
    for record, _ in joined:
        record["seconds"] = round(record["seconds"] * min(1.0, passed / max(summed, 1e-9)), 6)
    yield from joined


def _patient(planned: PlannedAttack) -> PlannedAttack:
    """The attack without its early stop: of a network that draws, one wrong answer is no success."""
    if getattr(planned.attack, "early_stop", False) and dataclasses.is_dataclass(planned.attack):
        return dataclasses.replace(planned, attack=dataclasses.replace(planned.attack, early_stop=False))
    return planned
