"""What a library is handed in place of the bare network, and what surrounds its Carlini-Wagner attack.

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

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense.guard import frozen
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.forward import check_logits, decide, logits_of

WALL = 1e-2
L2 = ThreatModel("l2", "0")  # for its distance only
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

    def forward(self, images: Tensor) -> Tensor:
        return check_logits(self.network(images.float()), len(images))


class _UnitGradient(torch.autograd.Function):
    """The identity; on the way back each image's gradient is divided by its largest entry."""

    @staticmethod
    def forward(context: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        largest = gradient.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
        return torch.where(largest > 0, gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny), gradient)


class UnitGradient(LibraryNetwork):
    """For attacks that step along the gradient's direction: its length is taken out.

    Both libraries divide an L2 gradient by its length plus a floor (1e-10 and 1e-7), and the loss is a mean over the
    batch: with small gradients (large logits, large batches) the step shrinks and the attack looks weak.
    """

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(_UnitGradient.apply(images.float()))


class PositiveLogits(LibraryNetwork):
    """Logits ``z - min(z) + 1``: all at least 1, same softmax, same margins, same decision."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits - logits.amin(1, keepdim=True) + 1


def off_the_walls(images: Tensor) -> Tensor:
    """``images`` with every pixel at least 0.01 from 0 and 1: where a tanh-space attack may start."""
    return images.clamp(WALL, 1 - WALL)


def into_box(images: Tensor, examples: Tensor) -> Tensor:
    """``examples`` with every pixel outside [0, 1] brought to its wall; all other pixels stay bit for bit."""
    return torch.where((examples < 0) | (examples > 1), BOX.project(images, examples), examples)


@torch.no_grad()
def smallest_success(classifier: nn.Module, images: Tensor, labels: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """Per image the candidate nearest in L2 that ``classifier`` gets wrong; the image itself where none is.

    Candidates, each (N, C, H, W), were made from :func:`off_the_walls` of the images. Each one is tried as it is, and
    with its perturbation carried over to the image: a pixel that the attack left alone is then exactly where it was.
    A failure comes back as the untouched image and never 0.01 beside it: it must be seen as one that moved nothing.
    """
    if len(images) == 0:
        return images.clone()
    best, nearest = images.clone(), torch.full((len(images),), torch.inf, device=images.device)
    start = off_the_walls(images)
    for candidate in candidates:
        shifted = images + (candidate - start)
        for example in (into_box(images, candidate), into_box(images, shifted)):
            with frozen(classifier):
                fooled = decide(logits_of(classifier, example)) != labels
            distance = L2.distance(images, example).to(nearest)
            better = fooled & (distance < nearest)
            nearest = torch.where(better, distance, nearest)
            best = torch.where(better.view(-1, 1, 1, 1), example, best)
    return best
