"""Attempts counted: the row of an attack, and the worst case of several, from what is known image by image."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scl_defense.threat import ThreatModel
from scl_defense_benchmarks import diagnostics, results
from scl_defense_benchmarks.battery import PlannedAttack
from scl_defense_benchmarks.chunks import Target
from scl_defense_benchmarks.results import AttackRow, WorstCase
from scl_defense_benchmarks.statistics import wilson
from scl_defense_benchmarks.tally import Tally


@dataclass(frozen=True)
class Attempt:
    """An attack's row and, image by image, what it is made of. number: its place in the battery."""

    row: AttackRow
    planned: PlannedAttack
    number: int
    tally: Tally
    moved: Tensor


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
