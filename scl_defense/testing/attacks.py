"""The contract of attacks: what an evaluation relies on. (Whether an image is misclassified it finds out itself.)"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.runtime import stream
from scl_defense.testing import _worlds as worlds
from scl_defense.testing._common import (
    COMPONENT_CHECKS,
    Check,
    CheckResult,
    Fault,
    applies_if,
    changes,
    examine,
    expect,
    expect_unmoved,
    global_state_watched,
    network_state,
    same,
    seed_globals,
    settings_kept,
    several,
)
from scl_defense.threat import ALL_NORMS, NORMS, ThreatModel

ACCESS = ("white-box", "score", "decision", "control")
DEPTH = 0.1  # L2 distance of every image from the plane in check_linear_classifier


def check_attack(component: Any, name: str | None = None) -> list[CheckResult]:
    """Run the contract test on an attack: an instance, or a class (with its default options)."""
    return examine(component, name, ATTACK_CHECKS, Trials)


@dataclass(frozen=True)
class Trial:
    """One call: where, from which images (as they were before), and what came back."""

    where: str
    threat: ThreatModel
    images: Tensor
    output: Any
    mutated: list[str]
    disturbed: list[str]
    moved: list[str]

    @property
    def flat(self) -> Tensor:
        """The output as float32; what is not finite is another check's and put back to the image."""
        out = self.output.detach().to(self.images)
        return torch.where(out.isfinite(), out, self.images)


class Trials:
    """Calls of one attack on small networks."""

    def __init__(self, attack: Any, name: str):
        self.component, self.name = attack, name

    @property
    def threats(self) -> list[ThreatModel]:
        norms = getattr(self.component, "norms", NORMS)
        return [threat for threat in worlds.ATTACKED if threat.norm in norms] or list(worlds.ATTACKED[:1])

    @property
    def minimal(self) -> bool:
        return bool(getattr(self.component, "minimal", False))

    def call(
        self,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        global_seed: int = 0,
        classifier: nn.Module | None = None,
    ) -> Trial:
        if classifier is None:  # handed over as an evaluation does: in eval mode
            classifier = worlds.lived_in_network(worlds.shape_of(images)).eval()
        given = {"the images": images, "the labels": labels}
        before, state = {name: value.clone() for name, value in given.items()}, network_state(classifier)
        seed_globals(global_seed)  # so that drawing from them is one failure, not all
        with settings_kept(), global_state_watched() as moved:
            output = self.component(classifier, images, labels, threat, stream(0, "attack"))
        where = f"{threat}, {len(images)} images {'x'.join(map(str, images.shape[1:]))}"
        disturbed = changes(state, network_state(classifier))
        return Trial(where, threat, before["the images"], output, changes(before, given), disturbed, moved)

    @cached_property
    def grid(self) -> list[Trial]:
        """Every norm, shape and batch size once."""
        return [
            self.call(*worlds.pictures(count, shape), threat)
            for threat in self.threats
            for shape in worlds.SHAPES
            for count in (1, 7)
        ]

    @property
    def tensors(self) -> list[Trial]:
        found = [trial for trial in self.grid if isinstance(trial.output, Tensor)]
        applies_if(found)
        return found

    @property
    def shaped(self) -> list[Trial]:
        found = [trial for trial in self.tensors if trial.output.shape == trial.images.shape]
        applies_if(found)
        return found

    @cached_property
    def repeatable(self) -> bool:
        return all(
            same(*(self.call(*worlds.pictures(5, worlds.GREY), threat).output for _ in range(2)))
            for threat in self.threats
        )


def check_declares_itself(trials: Trials) -> None:
    """``norms``, ``minimal`` and ``access`` say where it can be used and what its result means."""
    attack = trials.component
    norms, minimal, access = (getattr(attack, name, None) for name in ("norms", "minimal", "access"))
    legal = isinstance(norms, (set, frozenset)) and norms and norms <= set(ALL_NORMS)
    expect(legal, f"norms is {norms!r}; it must be a frozenset out of {', '.join(ALL_NORMS)}")
    expect(isinstance(minimal, bool), f"minimal is {minimal!r}; it must be True or False")
    expect(access in ACCESS, f"access is {access!r}; it must be one of {', '.join(ACCESS)}")


def check_shape(trials: Trials) -> None:
    """What comes back has the shape of the images, for a single image too."""
    for trial in trials.grid:
        got = tuple(trial.output.shape) if isinstance(trial.output, Tensor) else type(trial.output).__name__
        expect(got == tuple(trial.images.shape), f"it returned {got}, not {tuple(trial.images.shape)} ({trial.where})")


def check_dtype_and_device(trials: Trials) -> None:
    """What comes back has the images' dtype and lies on their device."""
    for trial in trials.tensors:
        out, images = trial.output, trial.images
        matches = out.dtype == images.dtype and out.device == images.device
        expect(matches, f"it returned {out.dtype} on {out.device}, not {images.dtype} on {images.device}")


def check_finite(trials: Trials) -> None:
    """No NaN, no infinity."""
    for trial in trials.tensors:
        expect(bool(trial.output.isfinite().all()), f"it returned NaN or infinite images ({trial.where})")


def check_inside_box(trials: Trials) -> None:
    """Every pixel lies in [0, 1]: what is outside is no image, and success out there is none."""
    for trial in trials.shaped:
        expect(bool(trial.flat.min() >= 0 and trial.flat.max() <= 1), f"it left the box [0, 1] ({trial.where})")


def check_inside_ball(trials: Trials) -> None:
    """An attack that is not minimal stays inside the threat ball: success outside does not count."""
    applies_if(not trials.minimal)
    for trial in trials.shaped:
        furthest = float(trial.threat.distance(trial.images, trial.flat).max())
        expect(furthest <= trial.threat.tolerance(), f"it left the ball: distance {furthest:.6g} ({trial.where})")


def check_detached(trials: Trials) -> None:
    """What comes back carries no graph: it would keep a whole attack in memory."""
    for trial in trials.tensors:
        expect(not trial.output.requires_grad, f"the output is attached to a graph; return it detached ({trial.where})")


def check_inputs_untouched(trials: Trials) -> None:
    """Images and labels are not written to: the evaluation compares with them, and the next attack starts from them."""
    for trial in trials.grid:
        if trial.mutated:
            raise Fault(f"it wrote into {several(trial.mutated)} ({trial.where})")


def check_classifier_untouched(trials: Trials) -> None:
    """Weights, gradients, requires_grad, buffers and every layer's train/eval mode are as before: the next attack must
    meet the same network. Also with layers in different modes, as foreign networks come.
    """
    images, labels = worlds.pictures(5, worlds.GREY)
    mixed = worlds.lived_in_network(worlds.GREY)
    for trial in [*trials.grid, trials.call(images, labels, trials.threats[0], classifier=mixed)]:
        if trial.disturbed:
            raise Fault(f"it changed {several(trial.disturbed)} ({trial.where})")


def check_global_state(trials: Trials) -> None:
    """Randomness comes from ``rng`` alone: global generators are neither moved nor read; torch's settings stay."""
    for trial in trials.grid:
        expect_unmoved(trial.moved)
    threat = trials.threats[0]
    first, again = (trials.call(*worlds.pictures(5, worlds.GREY), threat, global_seed=seed) for seed in (1, 2))
    applies_if(trials.repeatable)
    expect(same(first.output, again.output), "its output depends on a global random state; draw from rng")


def check_deterministic(trials: Trials) -> None:
    """The same images, network and seed give the same bits: a result can be repeated."""
    expect(trials.repeatable, "two calls with the same seed differ; draw from rng and keep no state")


def check_eps_zero_is_identity(trials: Trials) -> None:
    """With eps = 0 an attack that is not minimal gives the images back."""
    applies_if(not trials.minimal)
    images, labels = worlds.pictures(5, worlds.GREY)
    for threat in trials.threats:
        trial = trials.call(images.clone(), labels.clone(), ThreatModel(threat.norm, "0"))
        if isinstance(trial.output, Tensor) and trial.output.shape == images.shape:
            furthest = float((trial.flat - trial.images).abs().max())
            expect(furthest <= 1e-6, f"with {trial.threat} it moved a pixel by {furthest:.6g}")


def check_linear_classifier(trials: Trials) -> None:
    """It does its job where the answer is known. On a linear classifier of two classes every image falls at a radius
    with a closed form: at 1.5 times that radius a white-box attack must fool it on every image, at 3 times a score or
    decision attack on more than half. Controls are exempt.
    """
    access = getattr(trials.component, "access", "white-box")
    applies_if(access != "control")
    network, images, labels = worlds.two_class_problem(8, DEPTH)
    weight = worlds.slopes(network)[1] - worlds.slopes(network)[0]
    needed = getattr(trials.component, "min_classes", 2)
    victim = worlds.IdleClasses(network, needed).eval() if needed > 2 else network
    factor, wanted = (1.5, 1.0) if access == "white-box" else (3.0, 0.5)
    for threat in trials.threats:
        radius = worlds.smallest_radius(threat.norm, weight, images, labels, DEPTH)
        eps = str(math.ceil(factor * radius)) if threat.norm == "l0" else f"{factor * radius:.6f}"
        budget = ThreatModel(threat.norm, eps)
        trial = trials.call(images.clone(), labels.clone(), budget, classifier=victim)
        applies_if(isinstance(trial.output, Tensor) and trial.output.shape == images.shape)
        fooled = (worlds.margins(network, trial.flat, labels) > 0) & budget.contains(images, trial.flat)
        share = float(fooled.float().mean())
        enough = share >= wanted if access == "white-box" else share > wanted
        fault = (
            f"on a linear classifier every image falls at {threat.norm}:{radius:.4g}; at {budget} it fools {share:.0%}"
        )
        expect(enough, fault)


ATTACK_CHECKS: tuple[Check, ...] = (
    *COMPONENT_CHECKS,
    check_declares_itself,
    check_shape,
    check_dtype_and_device,
    check_finite,
    check_inside_box,
    check_inside_ball,
    check_detached,
    check_inputs_untouched,
    check_classifier_untouched,
    check_global_state,
    check_deterministic,
    check_eps_zero_is_identity,
    check_linear_classifier,
)
