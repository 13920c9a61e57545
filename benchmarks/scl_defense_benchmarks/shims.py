"""What a library is handed in place of the bare network, and what surrounds its searches for the nearest example.

Two faults make Carlini-Wagner (CW) report robustness that is not there:

- torchattacks masks the own class by multiplying its logit with zero. Where all other logits are negative, that zero
  wins the maximum and the loss is flat: with all logits shifted by -100 nothing is ever found.
  :class:`PositiveLogits` shifts them above zero, which no softmax, margin or decision notices.
- Both libraries optimise ``atanh(2x - 1)``. A pixel of exactly 0 or 1 sits where the slope of tanh is zero and never
  moves: on black-and-white images nothing is ever found. :func:`off_the_walls` starts 0.01 inside the box, and
  :func:`smallest_success` carries the perturbation over to the image itself. The margin matters: with 200 Adam steps
  of 0.01 a pixel starting 1e-4 from its wall gets no further than 0.0055. Found on black-and-white digits (8x8, a
  standard CNN, the adapters' defaults) with margins 1e-6, 1e-4, 1e-3 and 1e-2: torchattacks 0, 58, 100 and 100 %, ART
  8, 21, 95 and 100 %; and the larger margin finds the smaller median distance on grey digits too.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.ascent import filled_up
from scl_defense.draws import Unheard
from scl_defense.guard import frozen
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.forward import check_logits, clearly_wrong, decide, logits_of
from scl_defense_benchmarks.twin import Twin

WALL = 1e-2
BOX = ThreatModel("linf", "1")  # its ball holds the whole box, so its projection is the box's


class LibraryNetwork(nn.Module):
    """The network as a library sees it: float32 in (some convert to float64), one tensor of logits out.

    It is no ``nn.Sequential`` (ART would call the layers one by one), and its first parameter is an empty one on
    ``device`` (torchattacks asks the first parameter where to work, and there may be none).
    """

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.where = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.network = network
        self.unheard = Unheard()

    def forward(self, images: Tensor) -> Tensor:
        return check_logits(self.unheard(self.network, images.float()), len(images))


class _UnitGradient(torch.autograd.Function):
    """The identity; on the way back each image's gradient is divided by its largest entry."""

    @staticmethod
    def forward(context: Any, images: Tensor, witness: Callable[[Tensor], None]) -> Tensor:
        context.witness = witness
        return images.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = gradient.flatten(1).abs().amax(1)
        context.witness((largest > 0) & largest.isfinite())
        largest = largest.view(-1, 1, 1, 1)
        unit = torch.where(largest > 0, gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny), gradient)
        return unit, None


class UnitGradient(LibraryNetwork):
    """For attacks that step along the gradient's direction: its length is taken out.

    Both libraries divide an L2 gradient by its length plus a floor (1e-10 and 1e-7), and the loss is a mean over the
    batch: with small gradients (large logits, large batches) the step shrinks and the attack looks weak.

    seen: (N,) which images of the batch have had a finite gradient that is not zero since :meth:`watch`.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__(network, device)
        self.seen = torch.zeros(0, dtype=torch.bool)

    def watch(self, count: int) -> None:
        """Forget what was seen; the next batches have ``count`` images."""
        self.seen = torch.zeros(count, dtype=torch.bool, device=self.where.device)

    def _saw(self, usable: Tensor) -> None:
        if len(usable) == len(self.seen):
            self.seen |= usable

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(_UnitGradient.apply(images.float(), self._saw))


class AllWrong(Exception):
    """Every image of the call has been wrong: there is nothing left to pass, and the library's loop may end."""


class StopsWhereWrong(UnitGradient):
    """For attacks that keep a wrong iterate, as Auto-PGD does: an image that was wrong once is passed no more.

    In its place stand logits that are right and have no gradient, so that what the attack has kept of it stays. What is
    left is filled up as in :func:`scl_defense.ascent.ascend`. Wrong by rounding alone is not wrong yet. Where all are
    wrong, the next pass raises :class:`AllWrong`; ``kept`` (N, C, H, W) has what each was wrong as.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__(network, device)
        self.around = network.rows if isinstance(network, Twin) else None
        self.labels: Tensor | None = None
        self.classes = 0

    def stop(self, labels: Tensor | None, places: Tensor) -> None:
        """Of the next batches: their labels (``None``: nothing is left out), and their places in the attack's call."""
        self.watch(len(places))
        self.labels, self.wrong = labels, torch.zeros_like(places, dtype=torch.bool)
        self.kept: Tensor | None = None
        self.places = places if self.around is None else self.around[places]

    def release(self) -> None:
        """Whoever passes the network next passes all that it says."""
        self.labels = None
        self._tell(self.around)

    def _tell(self, rows: Tensor | None) -> None:
        if isinstance(self.network, Twin):
            self.network.rows = rows

    def forward(self, images: Tensor) -> Tensor:
        if self.labels is None:
            return super().forward(images)
        left = (~self.wrong).nonzero().squeeze(1)
        if len(left) == 0:
            raise AllWrong
        right = F.one_hot(self.labels, max(self.classes, 1)).float() if len(left) < len(images) else None
        rows = filled_up(left)

        def saw(usable: Tensor) -> None:
            self.seen[left] |= usable[: len(left)]

        self._tell(self.places[rows])
        points = images if right is None and len(rows) == len(images) else images[rows]
        logits = LibraryNetwork.forward(self, _UnitGradient.apply(points.float(), saw))[: len(left)]
        self.classes = logits.shape[1]
        precision = getattr(self.network, "precision", "fp32")
        new = clearly_wrong(logits.detach(), self.labels[left], precision)
        if self.kept is None:
            self.kept = images.detach().clone()
        self.kept[left[new]] = images.detach()[left[new]]
        self.wrong[left] |= new
        return logits if right is None else right.index_copy(0, left, logits)


class UnitSpread(LibraryNetwork):
    """Logits over their spread, largest minus smallest: for attacks that solve z_j - z_y = 0 by its slope.

    Every linearised boundary stays where it is. FAB takes slopes below 1e-8 a pixel for zero and adds 1e-12 to their
    length: without this it finds nothing on small logits.
    """

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
        return logits / spread.clamp(min=torch.finfo(logits.dtype).tiny)


class OwnLogits(LibraryNetwork):
    """A copy of the logits: Square writes into what it is given, which may be the network's own."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).clone()


class PositiveLogits(LibraryNetwork):
    """Logits ``z - min(z) + 1``: all at least 1, same softmax, same margins, same decision."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits - logits.amin(1, keepdim=True) + 1


class Softened(LibraryNetwork):
    """Probabilities that are not saturated: softmax of the logits over a temperature of at least 1.

    It is fixed by the first batch seen, so that no spread of logits there exceeds 10: a score attack that asks whether
    a probability of exactly 1 has fallen never hears yes. Used with one image at a time; no decision changes.
    """

    temperature: float | None = None

    def forward(self, images: Tensor) -> Tensor:
        return self.softened(images).softmax(1)

    def softened(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if self.temperature is None:
            spread = (logits.detach().amax(1) - logits.detach().amin(1)).amax()
            self.temperature = max(1.0, float(spread) / 10)
        return logits / self.temperature


class SoftLogits(Softened):
    """The same before the softmax, for attacks that take it themselves."""

    def forward(self, images: Tensor) -> Tensor:
        return self.softened(images)


def off_the_walls(images: Tensor) -> Tensor:
    """``images`` with every pixel at least 0.01 from 0 and 1: where a tanh-space attack may start."""
    return images.clamp(WALL, 1 - WALL)


def into_box(images: Tensor, examples: Tensor) -> Tensor:
    """``examples`` with every pixel outside [0, 1] brought to its wall; all other pixels stay bit for bit."""
    return torch.where((examples < 0) | (examples > 1), BOX.project(images, examples), examples)


def finite_or(images: Tensor, examples: Tensor) -> Tensor:
    """``examples``, and the image itself where one is not finite."""
    return torch.where(examples.flatten(1).isfinite().all(1).view(-1, 1, 1, 1), examples, images)


@torch.no_grad()
def nearest_wrong(
    classifier: nn.Module, images: Tensor, labels: Tensor, examples: Iterable[Tensor], norm: str
) -> tuple[Tensor, Tensor]:
    """Per image the nearest of its ``examples``, each (N, C, H, W), that ``classifier`` gets wrong.

    Examples are brought into the box first. Returns them, the image itself where none is wrong, and (N,) whether one
    is.
    """
    ball = ThreatModel(norm, "0")  # for its distance only
    best, nearest = images.clone(), torch.full((len(images),), torch.inf, device=images.device)
    for raw in examples if len(images) else ():
        example = into_box(images, raw)
        with frozen(classifier):
            fooled = decide(logits_of(classifier, example)) != labels
        distance = ball.distance(images, example).to(nearest)
        better = fooled & (distance < nearest)
        nearest = torch.where(better, distance, nearest)
        best = torch.where(better.view(-1, 1, 1, 1), example, best)
    return best, nearest.isfinite()


@torch.no_grad()
def pulled_back(
    classifier: nn.Module, images: Tensor, labels: Tensor, examples: Tensor, *, halvings: int = 12
) -> Tensor:
    """Examples that are wrong, moved towards their images by bisection as far as they stay wrong; others unchanged."""
    low, high = torch.zeros(len(images), device=images.device), torch.ones(len(images), device=images.device)
    column = (-1, 1, 1, 1)
    for _ in range(halvings if len(images) else 0):
        middle = (low + high) / 2
        with frozen(classifier):
            point = into_box(images, images + middle.view(column) * (examples - images))
            wrong = decide(logits_of(classifier, point)) != labels
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    return torch.where((high < 1).view(column), images + high.view(column) * (examples - images), examples)


@torch.no_grad()
def pushed_out(
    classifier: nn.Module, images: Tensor, labels: Tensor, examples: Tensor, *, share: float = 1e-3
) -> Tensor:
    """Examples moved on by ``share`` of their way from the image where they are wrong there; others unchanged.

    A search along the boundary ends on it to the last bit: right or wrong by the batch that it is judged in.
    """
    further = into_box(images, images + (1 + share) * (examples - images))
    with frozen(classifier):
        wrong = decide(logits_of(classifier, further)) != labels
    return torch.where(wrong.view(-1, 1, 1, 1), further, examples)


@torch.no_grad()
def random_wrong(
    classifier: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator, *, draws: int = 100
) -> tuple[Tensor, Tensor]:
    """Per image a random image of another label, pulled back to the boundary, and (N,) whether there is one.

    Uniform noise, and in turn flat images and noise at the walls: where a decision attack may start.
    """
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    start = images.clone()
    for draw in range(draws if len(images) else 0):
        noise = torch.rand(images.shape, generator=rng, device=rng.device).to(images)
        noise = (noise, (noise < 0.5).to(images), noise[:, :1, :1, :1].expand_as(images))[draw % 3]
        with frozen(classifier):
            wrong = decide(logits_of(classifier, noise)) != labels
        new = wrong & ~found
        start, found = torch.where(new.view(-1, 1, 1, 1), noise, start), found | new
        if found.all():
            break
    return pulled_back(classifier, images, labels, start), found


def smallest_success(classifier: nn.Module, images: Tensor, labels: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """Per image the candidate nearest in L2 that ``classifier`` gets wrong; the image itself where none is.

    Candidates, each (N, C, H, W), were made from :func:`off_the_walls` of the images. Each one is tried as it is, and
    with its perturbation carried over to the image: a pixel that the attack left alone is then exactly where it was.
    A failure comes back as the untouched image and never 0.01 beside it: it must be seen as one that moved nothing.
    """
    start = off_the_walls(images)

    def both() -> Iterator[Tensor]:
        for candidate in candidates:
            yield candidate
            yield images + (candidate - start)

    return nearest_wrong(classifier, images, labels, both(), "l2")[0]
