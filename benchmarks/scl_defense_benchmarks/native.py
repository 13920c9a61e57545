"""Our own attacks: the common ascent loop on the classifier's loss, and the noise control."""

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.ascent import ascend
from scl_defense.draws import Draws
from scl_defense.guard import frozen
from scl_defense.threat import ALL_NORMS, NORMS, ThreatModel
from scl_defense.types import Field, component
from scl_defense_benchmarks.fields import EarlyStop, RandomStart, RelStep, Steps
from scl_defense_benchmarks.forward import clearly_wrong, margin
from scl_defense_benchmarks.twin import Twin


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


#: Losses to climb: (N, K) logits and (N,) labels -> (N,).
LOSSES = {"ce": _cross_entropy, "margin": margin}


@component
class FGSM:
    """Fast gradient sign method: x + eps sign(grad CE) (Goodfellow, Shlens & Szegedy 2015)."""

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "native"
    family: ClassVar[str] = "fgsm"
    parallel: ClassVar[bool] = True

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the Linf ball, shaped as ``images``."""
        return PGD(steps=1, rel_step=1.0, random_start=False, early_stop=False)(classifier, images, labels, threat, rng)


@component
class PGD:
    """Projected gradient ascent (Madry et al. 2018) in Linf, L2 or L1, on cross-entropy or the margin between logits.

    The margin's gradient does not vanish where the softmax is saturated, the cross-entropy's does.
    """

    steps: Steps = 20
    rel_step: RelStep = 0.25
    random_start: RandomStart = True
    loss: Annotated[Literal["ce", "margin"], Field(description="loss to be maximised")] = "ce"
    early_stop: EarlyStop = True

    norms: ClassVar[frozenset[str]] = frozenset(NORMS)
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "native"
    family: ClassVar[str] = "pgd"
    parallel: ClassVar[bool] = True  # draws from rng alone

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        return self.together(classifier, images, labels, threat, rng, len(images))

    def together(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: Draws, at_once: int
    ) -> Tensor:
        """The same on chunks that follow each other, each with its generator in ``rng``; ``at_once`` images are
        passed at a time, but for those that fill a batch up. What comes of an image is what its chunk alone would give.
        """
        loss, labels = LOSSES[self.loss], labels.long()
        twin = classifier if isinstance(classifier, Twin) else None

        def objective(adversarial: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            if twin is not None:
                twin.rows = rows
            logits, truth = classifier(adversarial), labels[rows]
            wrong = logits.detach().argmax(1) != truth
            if twin is not None and twin.precision != "fp32":  # wrong by its rounding alone is not wrong yet
                wrong &= clearly_wrong(logits.detach(), truth, twin.precision)
            return loss(logits, truth), wrong

        with frozen(classifier):
            found = ascend(
                objective if self.early_stop else lambda adversarial: loss(classifier(adversarial), labels),
                images,
                threat,
                steps=self.steps,
                rel_step=self.rel_step,
                start="uniform" if self.random_start else "zero",
                stopping=self.early_stop,
                at_once=at_once,
                rng=rng,
            )
        if twin is not None:
            twin.rows = None
        return found


_OWN = PGD.__call__, PGD.together


def takes_several(attack: Any) -> bool:
    """Whether :meth:`PGD.together` may be given several chunks in place of calls of the attack, one by one: as images
    fall, what is left of them fills a batch. Of our own class alone: a subclass, or what stands around one, may have
    something of its own to do when it is called.
    """
    kind = type(attack)
    return issubclass(kind, PGD) and (kind.__call__, kind.together) == _OWN and bool(attack.early_stop)


@component
class Noise:
    """Control: the worst of several random points, uniform in the ball and at its corners in turn.

    Worst is the largest margin. An attack that is not better than this has found nothing by its gradient.
    """

    draws: Annotated[int, Field(ge=1, le=100_000, description="random points an image, half of them corners")] = 10

    norms: ClassVar[frozenset[str]] = frozenset(ALL_NORMS)
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["control"]] = "control"
    library: ClassVar[str] = "native"
    family: ClassVar[str] = "noise"
    parallel: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        worst, highest = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
        with frozen(classifier):
            for draw in range(self.draws if len(images) else 0):
                point = (threat.random_corner if draw % 2 else threat.random_start)(images, rng)
                value = margin(classifier(point), labels.long()).to(highest)
                higher = value > highest
                highest = torch.where(higher, value, highest)
                worst = torch.where(higher.view(-1, 1, 1, 1), point, worst)
        return worst
