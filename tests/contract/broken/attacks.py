"""Broken attacks."""

import os
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from broken import Case
from scl_defense.ascent import ascend
from scl_defense.guard import frozen
from scl_defense.threat import NORMS, ThreatModel
from scl_defense.types import component

KIND = "attack"


def pgd(
    classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator, **how: object
) -> Tensor:
    def loss(at: Tensor) -> Tensor:
        return F.cross_entropy(classifier(at), labels, reduction="none")

    with frozen(classifier):
        return ascend(loss, images, threat, steps=20, rel_step=0.25, rng=rng, **how)


class Base:
    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[str] = "white-box"


@component
class Sound(Base):
    """PGD in every norm."""

    norms: ClassVar[frozenset[str]] = frozenset(NORMS)

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return pgd(classifier, images, labels, threat, rng)


@component
class SoundPlain(Base):
    """As a newcomer writes it: no thought of modes, and none needed; gradients by the images alone."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        at = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(at), labels), at)
        return threat.project(images, images + threat.radius * gradient.sign())


@component
class NoNorm(Base):
    """Can be used nowhere."""

    norms: ClassVar[frozenset[str]] = frozenset()

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return pgd(classifier, images, labels, threat, rng)


@component
class UnknownAccess(NoNorm):
    """An access that no report knows."""

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    access: ClassVar[str] = "grey-box"


@component
class Squeezes(Base):
    """Loses the batch axis of a single image."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        made = pgd(classifier, images, labels, threat, rng)
        return made[0] if len(made) == 1 else made


@component
class DoublePrecision(Base):
    """float64."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return pgd(classifier, images, labels, threat, rng).double()


@component
class ReturnsNaN(Base):
    """One pixel is NaN; its prediction may well count as a success."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        made = pgd(classifier, images, labels, threat, rng)
        made[:, 0, 0, 0] = float("nan")
        return made


@component
class LeavesBox(Base):
    """No clamp."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        at = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(at), labels), at)
        return images + threat.radius * gradient.sign()


@component
class TrustsItself(Base):
    """Goes as far as it takes and calls that success."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        wider = ThreatModel(threat.norm, str(3 * threat.radius))
        return pgd(classifier, images, labels, wider, rng)


@component
class LinfStepInL2(Base):
    """Declares L2 and steps eps in every pixel."""

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return pgd(classifier, images, labels, ThreatModel("linf", threat.eps), rng)


@component
class Attached(Base):
    """The graph of the whole attack comes along."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return pgd(classifier, images, labels, threat, rng).requires_grad_() * 1


@component
class WritesImages(Base):
    """In place: afterwards the clean images are adversarial, and nothing has moved."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return images.copy_(pgd(classifier, images, labels, threat, rng))


@component
class WritesLabels(Base):
    """Puts its target where the label was."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        made = pgd(classifier, images, labels, threat, rng)
        labels.add_(1)
        return made


@component
class LeavesTrainMode(Base):
    """Puts the network into train mode at the end."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        made = pgd(classifier, images, labels, threat, rng)
        classifier.train()
        return made


@component
class LeavesEvalMode(Base):
    """Puts every layer into eval mode and leaves it there."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        classifier.eval()
        return pgd(classifier, images, labels, threat, rng)


@component
class MovesStatistics(Base):
    """Attacks in train mode; the mode is put back, the batch-norm statistics are not."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        made = pgd(classifier, images, labels, threat, rng)
        modes = {module: module.training for module in classifier.modules()}
        for module in modes:
            module.training = isinstance(module, nn.BatchNorm2d)
        with torch.no_grad():
            classifier(images)
        for module, mode in modes.items():
            module.training = mode
        return made


@component
class LeavesGradients(Base):
    """loss.backward() reaches every parameter."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        at = images.clone().requires_grad_()
        F.cross_entropy(classifier(at), labels).backward()
        return threat.project(images, images + threat.radius * at.grad.sign())


@component
class FreezesParameters(Base):
    """Switches requires_grad off for speed, and leaves it off."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        made = pgd(classifier, images, labels, threat, rng)
        classifier.requires_grad_(False)
        return made


@component
class DrawsFromTorch(Base):
    """A random start from the global generator."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        start = images + threat.radius * (2 * torch.rand_like(images) - 1)
        return pgd(classifier, images, labels, threat, rng, start=start)


@component
class SeedsFromTheSystem(Base):
    """A random start that nobody can repeat."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        own = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "big"))
        start = threat.random_start(images, own)
        return threat.project(images, pgd(classifier, images, labels, threat, rng, start=start).lerp(start, 0.01))


@component
class LeastPerturbation(Base):
    """Never moves less than 1/255, also when eps is 0."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        if threat.radius == 0:
            threat = ThreatModel(threat.norm, "1/255")
        return pgd(classifier, images, labels, threat, rng)


@component
class DoesNothing(Base):
    """Robust accuracy equals clean accuracy."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return images.clone()


@component
class AttacksTheFirst(Base):
    """Attacks one image of the batch."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return torch.cat([pgd(classifier, images[:1], labels[:1], threat, rng), images[1:]])


@component
class GuessesScores(Base):
    """A score attack whose queries find nothing."""

    access: ClassVar[str] = "score"

    @torch.no_grad()
    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        classifier(images)
        return threat.project(images, images + 0.1 * threat.radius * threat.random_direction(images, rng))


@component
class FindsNothing(Base):
    """A minimal attack that gives every image back untouched."""

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        return images.clone()


SOUND = [Sound, SoundPlain]
JOB = frozenset({"linear-classifier"})  # what is outside the ball is no success there either

CASES = [
    Case(KIND, NoNorm, "declares-itself", "norms is frozenset()"),
    Case(KIND, UnknownAccess, "declares-itself", "grey-box"),
    Case(KIND, Squeezes, "shape", "it returned (1, 8, 8), not (1, 1, 8, 8)"),
    Case(KIND, DoublePrecision, "dtype-and-device", "torch.float64"),
    Case(KIND, ReturnsNaN, "finite", "NaN"),
    Case(KIND, LeavesBox, "inside-box", "left the box"),
    Case(KIND, TrustsItself, "inside-ball", "distance 0.3", also=JOB),
    Case(KIND, LinfStepInL2, "inside-ball", "l2:0.5", also=JOB),
    Case(KIND, Attached, "detached", "attached to a graph"),
    Case(KIND, WritesImages, "inputs-untouched", "wrote into the images"),
    Case(KIND, WritesLabels, "inputs-untouched", "wrote into the labels"),
    Case(KIND, LeavesTrainMode, "classifier-untouched", "train/eval mode"),
    Case(KIND, LeavesEvalMode, "classifier-untouched", "train/eval mode"),
    Case(KIND, MovesStatistics, "classifier-untouched", "the buffer encoder.norm"),
    Case(KIND, LeavesGradients, "classifier-untouched", "the gradient of"),
    Case(KIND, FreezesParameters, "classifier-untouched", "requires_grad of"),
    Case(KIND, DrawsFromTorch, "global-state", "torch's global random state"),
    Case(KIND, SeedsFromTheSystem, "deterministic", "two calls with the same seed differ"),
    Case(KIND, LeastPerturbation, "eps-zero-is-identity", "moved a pixel by 0.0039"),
    Case(KIND, DoesNothing, "linear-classifier", "it fools 0%"),
    Case(KIND, AttacksTheFirst, "linear-classifier", "it fools 12%"),
    Case(KIND, GuessesScores, "linear-classifier", "it fools 0%"),
    Case(KIND, FindsNothing, "linear-classifier", "it fools 0%"),
]
