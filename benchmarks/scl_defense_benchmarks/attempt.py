"""One attack of a battery: run on batches under guard, judged, and summed up as a row; and all of them together."""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.guard import frozen
from scl_defense.runtime import derive_seed, stream
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks import diagnostics, results
from scl_defense_benchmarks.battery import PlannedAttack
from scl_defense_benchmarks.library_guard import seeded_globals
from scl_defense_benchmarks.results import AttackRow, WorstCase
from scl_defense_benchmarks.statistics import wilson
from scl_defense_benchmarks.verdicts import Verdict, check_returned, judge

#: Called after every batch with the attack's label, images done, images in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """What is attacked. images: (N, C, H, W) in [0, 1]; labels, correct: (N,), correct: rightly classified unharmed."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Attempt:
    """An attack's row and what the worst case needs of it.

    judged: (M,) places of the images for which there is a verdict (all that were right, unless it failed half-way).
    """

    row: AttackRow
    threat: ThreatModel
    judged: Tensor
    verdict: Verdict | None
    wrote_input: bool


@dataclass
class _Run:
    """What came back from an attack's batches, and what they cost."""

    returned: list[Tensor] = dataclasses.field(default_factory=list)
    fault: str = ""
    wrote_input: bool = False
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    guided: list[Tensor] = dataclasses.field(default_factory=list)  # (N,) bool a batch: a usable gradient was seen
    witness: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    traceable: bool = True  # every backward pass so far had as many rows as the batch


def attempt(
    target: Target, planned: PlannedAttack, *, seed: int, batch_size: int, progress: Progress | None = None
) -> Attempt:
    """Run one attack on every rightly classified image and judge what it returns. Never raises for its faults.

    ``target.network`` must be in eval mode, and gradients switched off outside. Every batch has its own seed, derived
    from ``seed`` and the batch's number: all attacks of a battery start alike.
    """
    places = target.correct.nonzero().squeeze(1)
    run = _run(target, places, planned, seed, batch_size, progress)
    verdict, judged = None, places[: sum(map(len, run.returned))]
    if len(judged):
        verdict = judge(
            target.network,
            target.images[judged],
            target.labels[judged],
            torch.cat(run.returned),
            planned.threat,
            minimal=bool(planned.attack.minimal),
        )
        if planned.attack.access == "white-box" and run.traceable and planned.threat.radius > 0:
            # A random start moves an image, but without a gradient nobody has looked for its weakness.
            tried = verdict.moved & (torch.cat(run.guided) | verdict.fooled)
            verdict = dataclasses.replace(verdict, moved=tried)
    row = _row(planned, target.correct, judged, verdict, run)
    return Attempt(row, planned.threat, judged, verdict, run.wrote_input)


def _run(
    target: Target, places: Tensor, planned: PlannedAttack, seed: int, batch_size: int, progress: Progress | None
) -> _Run:
    images, labels = target.images, target.labels
    run, done = _Run(), 0
    # The judged network is never in an attack's hands: hooks, modules and weights that it leaves behind are its own.
    network = copy.deepcopy(target.network)
    with _watch_passes(network, run):
        for number, batch in enumerate(places.split(batch_size) if len(places) else ()):
            given, given_labels = images[batch], labels[batch]  # indexing copies: the attack may not reach ours
            run.witness = torch.zeros(len(batch), dtype=torch.bool, device=images.device)
            rng = stream(seed, "attack", number)  # the same for every attack: what differs is the attack alone
            started = time.perf_counter()
            try:
                global_seed = derive_seed(seed, "globals of attack", number)
                with frozen(network), seeded_globals(global_seed), torch.enable_grad():
                    returned = planned.attack(network, given, given_labels, planned.threat, rng)
                returned = check_returned(returned, images[batch])
                returned.sum().item()  # waits for the device, so that the time is the attack's
            except Exception as error:  # the battery goes on: a failed attack is a row
                run.fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": .")
                break
            finally:
                run.seconds += time.perf_counter() - started
            run.wrote_input |= not (torch.equal(given, images[batch]) and torch.equal(given_labels, labels[batch]))
            run.returned.append(returned)
            run.guided.append(run.witness)
            done += len(batch)
            if progress is not None:
                progress(planned.label, done, len(places))
    if not _same_weights(network, target.network):
        run.fault = run.fault or "it changed the network's weights (of its copy; nothing was judged on that)"
    return run


def _row(planned: PlannedAttack, correct: Tensor, judged: Tensor, verdict: Verdict | None, run: _Run) -> AttackRow:
    attack, threat, n, attacked = planned.attack, planned.threat, len(correct), int(correct.sum())
    outcomes = torch.where(correct, results.UNTRIED, results.MISCLASSIFIED)
    distances: list[float | None] = [None] * n
    found, median, violations = 0, None, {"box": 0, "ball": 0, "nonfinite": 0}
    if verdict is not None:
        broken = verdict.fooled & (verdict.distance <= threat.tolerance())
        outcome = torch.where(verdict.moved, results.ROBUST, results.UNMOVED)
        outcomes[judged] = torch.where(broken, results.BROKEN, outcome)
        for place, distance, nonfinite in zip(
            judged.tolist(), verdict.distance.tolist(), verdict.nonfinite.tolist(), strict=True
        ):
            distances[place] = None if nonfinite else float(f"{distance:.6g}")
        found = int(verdict.fooled.sum())
        median = float(verdict.distance[verdict.fooled].median()) if found else None
        violations = {
            "box": int(verdict.outside_box.sum()),
            "ball": int(verdict.outside_ball.sum()),
            "nonfinite": int(verdict.nonfinite.sum()),
        }
    unmoved, lost = int((outcomes == results.UNMOVED).sum()), int((outcomes == results.BROKEN).sum())
    robust = int((outcomes == results.ROBUST).sum())
    status, note = "ok", ""
    if run.fault:
        status, note = "failed", run.fault
    elif unmoved > diagnostics.DOUBTFUL * attacked:
        status = "invalid" if unmoved > diagnostics.INVALID * attacked else "doubtful"
        note = f"it made no real attempt on {unmoved} of {attacked} images"
    known = status in ("ok", "doubtful")
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
        broken=lost,
        found=found,
        unmoved=unmoved,
        violations=violations,
        robust_accuracy=robust / n if known else None,
        interval=wilson(robust, n) if known else None,
        median_distance=median,
        seconds=round(run.seconds, 4),
        forwards=round(run.forwards / max(attacked, 1), 2),
        backwards=round(run.backwards / max(attacked, 1), 2),
        outcomes=tuple(outcomes.tolist()),
        distances=tuple(distances),
    )


def worst_case(threat: ThreatModel, target: Target, attempts: Sequence[Attempt]) -> WorstCase:
    """All attempts together for one ball, image by image (see :class:`scl_defense_benchmarks.results.WorstCase`)."""
    correct = target.correct
    broken, moved = torch.zeros_like(correct), torch.zeros_like(correct)
    valid = []
    for one in attempts:
        if one.verdict is not None:  # also of an invalid or failed attack: an example that we checked is one
            inside = threat.contains(target.images[one.judged], one.verdict.examples)
            broken[one.judged] |= one.verdict.fooled & inside
        here = one.threat.norm == threat.norm and one.threat.radius == threat.radius
        if here and one.row.robust_accuracy is not None and one.row.access != "control":
            valid.append(one.row.label)
            if one.verdict is not None:
                moved[one.judged] |= one.verdict.moved
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


class _Witnessed(torch.autograd.Function):
    """The identity; on the way back it shows the gradient to a witness."""

    @staticmethod
    def forward(context: Any, images: Tensor, witness: Callable[[Tensor], None]) -> Tensor:
        context.witness = witness
        return images.view_as(images)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        context.witness(gradient)
        return gradient, None


@contextmanager
def _watch_passes(network: nn.Module, run: _Run) -> Iterator[None]:
    """Count images passed forward and backward, and note which images ever got a finite gradient that is not zero."""

    def on_backward(gradient: Tensor) -> None:
        run.backwards += len(gradient)
        flat = gradient.flatten(1)
        if len(flat) == len(run.witness):
            run.witness |= flat.isfinite().all(1) & (flat != 0).any(1)
        else:
            run.traceable = False

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        images = inputs[0] if inputs else None
        if isinstance(images, Tensor) and images.requires_grad and torch.is_grad_enabled():
            return (_Witnessed.apply(images, on_backward), *inputs[1:])
        return None

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 0:
            run.forwards += len(output)

    handles = [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same_weights(network: nn.Module, original: nn.Module) -> bool:
    mine, theirs = dict(network.named_parameters()), dict(original.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON types."""
    keep = (str, int, float, bool, type(None))
    return {
        name: value if isinstance(value, keep) else list(value) if isinstance(value, (list, tuple)) else str(value)
        for name, value in options.items()
    }
