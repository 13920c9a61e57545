"""The smallest radius at which PGD breaks an image: a whole curve of accuracy against eps from one search."""

from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from scl_defense.ascent import filled_up
from scl_defense.errors import UserError
from scl_defense.guard import frozen
from scl_defense.threat import NORMS, ThreatModel, parse_eps
from scl_defense.types import Field, component
from scl_defense_benchmarks.fields import RandomStart, RelStep, Restarts, Steps
from scl_defense_benchmarks.forward import margin
from scl_defense_benchmarks.native import LOSSES
from scl_defense_benchmarks.twin import Twin

POINTS = 8  # radii between 0 and the ball's, where none are named

# A margin below this share of the largest logit may be another one on the judged network: sums in another order.
_SLACK = 1e-4


def evenly(eps: str, points: int) -> tuple[str, ...]:
    """``("1/255", ..., "8/255")`` for ``8/255`` and 8: so many radii up to ``eps``, exact, evenly spaced."""
    top, slash, bottom = eps.partition("/")
    written = []
    for place in range(1, points + 1):
        value = parse_eps(eps) * Fraction(place, points)
        part = parse_eps(top) * Fraction(place, points)
        whole = slash and part.denominator == 1  # 2/255 stays 2/255, and is not shortened like 3/255 to 1/85
        written.append(eps if place == points else f"{part}/{bottom}" if whole else _decimal(value))
    return tuple(written)


def _decimal(value: Fraction) -> str:
    text = f"{float(value):.10g}"
    return text if Fraction(text) == value else str(value)


@component
class PGDMin:
    """Projected gradient ascent (Madry et al. 2018) in the ball of the smallest radius that still breaks the image.

    Every image begins in the largest ball. Once broken it goes on in the ball below the smallest one that its example,
    pulled towards the image, still breaks; from there ``steps`` steps are made anew. An image that survives them is
    robust up to that radius. So each pays for one failed attack, and successes cost a few steps: a curve of any number
    of radii for little more than PGD costs in one ball. In the largest ball it is the same attack as ``native:pgd``.
    """

    steps: Steps = 20
    rel_step: RelStep = 0.25
    random_start: RandomStart = True
    loss: Annotated[Literal["ce", "margin"], Field(description="loss to be maximised")] = "ce"
    restarts: Restarts = 1
    radii: Annotated[
        tuple[str, ...],
        Field(max_length=1000, description="radii to be tried; default: those of the curve, else eighths of eps"),
    ] = ()
    refine: Annotated[
        int, Field(ge=0, le=30, description="halvings of what lies between two radii, a forward pass each")
    ] = 3

    norms: ClassVar[frozenset[str]] = frozenset(NORMS)
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "native"
    family: ClassVar[str] = "pgd-min"
    parallel: ClassVar[bool] = True
    measures_exactly: ClassVar[bool] = True  # in bfloat16 it takes gradients alone

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest example found of each image, else the last
        point in the largest ball; shaped as ``images``.
        """
        balls = sorted(
            (ThreatModel(threat.norm, eps) for eps in self.radii or evenly(threat.eps, POINTS)),
            key=lambda ball: ball.radius,
        )
        if balls[0].radius == 0:
            raise UserError("pgd-min: a radius of 0 has nothing to be tried in; leave it out")
        if not len(images):
            return images.clone()
        search = _Search(self, classifier, images.detach(), labels.long(), balls)
        with frozen(classifier):
            for _ in range(self.restarts):
                search.descend(rng)
            search.refine()
        if isinstance(classifier, Twin):
            classifier.rows = None
        return search.best


@dataclass
class _Search:
    """What is known image by image: best: (N, C, H, W), its nearest example, or where the search is. found: (N,) the
    place of the smallest ball that holds one, as many as there are where none does.
    """

    attack: PGDMin
    classifier: nn.Module
    images: Tensor
    labels: Tensor
    balls: list[ThreatModel]

    def __post_init__(self) -> None:
        self.best = self.images.clone()
        self.rough = isinstance(self.classifier, Twin) and self.classifier.precision != "fp32"
        self.found, self.failed = torch.full_like(self.labels, len(self.balls)), self.best
        self.radii = torch.tensor([ball.radius for ball in self.balls], dtype=torch.float64, device=self.images.device)

    def descend(self, rng: torch.Generator) -> None:
        """One start of every image in the ball below its ``found``, and on to smaller ones as long as it is broken."""
        attack, largest = self.attack, self.balls[-1]
        points = largest.random_start(self.images, rng) if attack.random_start else self.images.clone()
        # Drawn at every start, used when a gradient is zero: what an image draws does not depend on the others.
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        smaller = (self.found < len(self.balls)) & (self.found > 0)
        share = (self.radii[(self.found - 1).clamp(min=0)] / largest.radius).to(points).view(-1, 1, 1, 1)
        points = torch.where(smaller.view(-1, 1, 1, 1), self.images + (points - self.images) * share, points)
        made = torch.zeros_like(self.found)  # steps in the present ball
        slopes, active, turn = torch.zeros_like(points), self.found > 0, 0
        while bool(active.any()):
            last = active & (made == attack.steps)  # the point after the last step counts too
            going = (active & ~last).nonzero().squeeze(1)
            broken = torch.zeros_like(active)
            if bool(last.any()):
                rows = last.nonzero().squeeze(1)
                broken[rows] = self._fools(points[rows], rows)
                active = active & (~last | broken)
            if len(going):
                slopes[going], seems = self._gradient(points[going], going)
                broken[going[seems]] = self._fools(points[going[seems]], going[seems]) if self.rough else True
                on = going[~broken[going]]
                points[on] = self._step(points[on], slopes[on], on, seed + turn)
                made[on] += 1
            if bool(broken.any()):
                rows = broken.nonzero().squeeze(1)
                self.best[rows], self.found[rows] = points[rows], self.found[rows] - 1
                self._shrink(rows)
                rows = rows[self.found[rows] > 0]
                points[rows] = self._within(self.best[rows], rows, self.radii[self.found[rows] - 1])
                made[rows] = 0
                rows = rows[~last[rows]]  # the gradient that was paid for at the example serves for one step more
                points[rows] = self._step(points[rows], slopes[rows], rows, seed + turn)
                active = active & (self.found > 0)
            turn += 1
        never = self.found == len(self.balls)
        self.best[never], self.failed = points[never], points

    def refine(self) -> None:
        """Between the smallest ball that holds an example and the one below: halvings, without a gradient.

        The way is that of the attack that failed below, if it leads to an example, else that of the example.
        """
        rows = (self.found < len(self.balls)).nonzero().squeeze(1)
        if not len(rows) or not self.attack.refine:
            return
        further = rows[self.found[rows] > 0]
        if len(further):
            images, level = self.images[further], self.found[further]
            share = (self.radii[level] / self.radii[level - 1]).to(images).view(-1, 1, 1, 1)
            there = self._within(images + (self.failed[further] - images) * share, further, self.radii[level])
            fools = self._fools(there, further)
            self.best[further[fools]] = there[fools]
        low = torch.where(self.found[rows] > 0, self.radii[(self.found[rows] - 1).clamp(min=0)], 0)
        high = self.radii[self.found[rows]]
        for _ in range(self.attack.refine):
            middle = (low + high) / 2
            nearer = self._within(self.best[rows], rows, middle)
            fools = self._fools(nearer, rows)
            self.best[rows[fools]] = nearer[fools]
            low, high = torch.where(fools, low, middle), torch.where(fools, middle, high)

    def _shrink(self, rows: Tensor) -> None:
        """Pull the examples of ``rows`` into the smallest ball in which they still fool: bisection over the balls."""
        low = torch.full_like(rows, -1)
        while len(rows := rows[(open_ := self.found[rows] - low > 1)]):
            low = low[open_]
            middle = (self.found[rows] + low) // 2
            nearer = self._within(self.best[rows], rows, self.radii[middle])
            fools = self._fools(nearer, rows)
            self.best[rows[fools]], self.found[rows[fools]] = nearer[fools], middle[fools]
            low = torch.where(fools, low, middle)

    def _within(self, points: Tensor, rows: Tensor, radii: Tensor) -> Tensor:
        return self.balls[-1].project(self.images[rows], points, radii)

    def _step(self, points: Tensor, gradient: Tensor, rows: Tensor, seed: int) -> Tensor:
        threat, radii = self.balls[-1], self.radii[(self.found[rows] - 1)]
        flat = torch.nan_to_num(gradient.flatten(1), nan=0.0)  # not a number is no direction
        direction = threat.steepest(flat.view_as(points), points)
        stuck = flat.abs().amax(1) == 0
        if bool(stuck.any()):
            drawn = threat.random_direction(self.images, torch.Generator(points.device).manual_seed(seed))[rows]
            direction = torch.where(stuck.view(-1, 1, 1, 1), drawn, direction)
        length = (radii * self.attack.rel_step).to(points).view(-1, 1, 1, 1)
        return self._within(points + length * direction, rows, radii)

    def _gradient(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the loss at ``points``, in the twin's precision; and which of them fool as far as that can tell."""
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._ask(points, rows)
            (gradient,) = torch.autograd.grad(LOSSES[self.attack.loss](logits, self.labels[rows]).sum(), points)
        return gradient, self._wrong(logits.detach(), rows)

    @torch.no_grad()
    def _fools(self, points: Tensor, rows: Tensor) -> Tensor:
        """In float32, whatever gradients are in: a distance is no place for rounding."""
        if not len(rows):
            return torch.zeros_like(rows, dtype=torch.bool)
        with self.classifier.exactly() if isinstance(self.classifier, Twin) else nullcontext():
            return self._wrong(self._ask(points, rows), rows)

    def _wrong(self, logits: Tensor, rows: Tensor) -> Tensor:
        return margin(logits, self.labels[rows]) > _SLACK * logits.abs().amax(1)

    def _ask(self, points: Tensor, rows: Tensor) -> Tensor:
        """Logits of ``points``, passed in one of few sizes (see :func:`scl_defense.ascent.filled_up`)."""
        passed = filled_up(torch.arange(len(rows), device=rows.device))
        if isinstance(self.classifier, Twin):
            self.classifier.rows = rows[passed]
        return self.classifier(points[passed])[: len(rows)]
