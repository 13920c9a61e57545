"""Attacks that are made of one function, a network that is plain to see through, and how to run them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scl_defense_benchmarks import results
from scl_defense_benchmarks.battery import Plan, PlannedAttack
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.statistics import wilson
from torch import nn

from scl_defense.threat import ThreatModel

LINF, L2 = ThreatModel("linf", "0.1"), ThreatModel("l2", "0.5")
COUNT = 40


class Brightness(nn.Module):
    """Class 1 where the first pixel is above 0.5: what fools it, and at which distance, is plain to see."""

    def forward(self, images):
        score = 10 * (images[:, 0, 0, 0] - 0.5)
        return torch.stack([-score, score], dim=1)


@dataclasses.dataclass(frozen=True)
class Planted:
    """An attack made of one function of (classifier, images, labels, threat, rng)."""

    make: Callable[..., Any]
    minimal: bool = False
    access: str = "white-box"
    norms: frozenset[str] = frozenset({"linf", "l2"})
    looks: bool = True  # a white-box attack takes a gradient, as its access says

    def __call__(self, classifier, images, labels, threat, rng):
        if self.looks and self.access == "white-box":
            with torch.enable_grad():
                F.cross_entropy(classifier(images.clone().requires_grad_()), labels).backward()
        return self.make(classifier, images, labels, threat, rng)


def first_pixel(images, change):
    moved = images.clone()
    moved[:, 0, 0, 0] += change
    return moved


def shift(size):
    """Move the first pixel by ``size`` towards the other class."""
    return lambda classifier, images, labels, threat, rng: first_pixel(images, (1 - 2 * labels) * size)


HONEST = Planted(shift(0.1))


def run(images, labels, *attacks, threat=LINF, network=None, **options):
    planned = [
        PlannedAttack(f"attack{place}", "planted", attack, own)
        for place, (attack, own) in enumerate(item if isinstance(item, tuple) else (item, threat) for item in attacks)
    ]
    options = {"seed": 0, "batch_size": 16} | options
    return evaluate(network or Brightness(), images, labels, Plan(threat, tuple(planned)), **options)


def flags_of(result):
    return {flag.id: flag.severity for flag in result.flags}


def fake(name, broken, *, library="torchattacks", access="white-box", options=None, minimal=False, n=40):
    """A row of 40 images, all right and attacked, with these broken."""
    outcomes = [results.BROKEN if place in broken else results.ROBUST for place in range(n)]
    return results.AttackRow(
        label=f"{library}:{name}",
        name=name,
        library=library,
        access=access,
        norm="linf",
        eps="0.1",
        minimal=minimal,
        options={"steps": 20, "rel_step": 0.25} if options is None else options,
        status="ok",
        note="",
        attacked=n,
        broken=outcomes.count(results.BROKEN),
        found=outcomes.count(results.BROKEN),
        unmoved=0,
        violations={"box": 0, "ball": 0, "nonfinite": 0},
        robust_accuracy=1 - outcomes.count(results.BROKEN) / n,
        interval=wilson(n - outcomes.count(results.BROKEN), n),
        median_distance=0.1,
        seconds=1.0,
        forwards=1.0,
        backwards=1.0,
        outcomes=tuple(outcomes),
        distances=(0.1,) * n,
    )
