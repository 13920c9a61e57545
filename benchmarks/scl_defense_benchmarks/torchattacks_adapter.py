"""Attacks of torchattacks (Kim 2020). The only file that imports it. 3.3.0 and 3.5.1 give the same results."""

from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

import torch
import torchattacks
from torch import Tensor, nn

from scl_defense.threat import ThreatModel
from scl_defense.types import Field, component
from scl_defense_benchmarks.fields import RandomStart, RelStep, Steps
from scl_defense_benchmarks.library_guard import library_call
from scl_defense_benchmarks.shims import LibraryNetwork, PositiveLogits, UnitGradient, off_the_walls, smallest_success


def _call(
    build: Callable[[nn.Module], torchattacks.attack.Attack],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    rng: torch.Generator,
    shim: type[LibraryNetwork] = UnitGradient,
) -> Tensor:
    # The device context: CW of 3.3.0 makes a one-hot table on the default device and indexes it with the labels.
    with library_call(classifier, rng=rng), images.device:
        attack = build(shim(classifier, images.device))
        return attack(images.contiguous(), labels.long()).detach()


@component
class FGSM:
    """Fast gradient sign method: x + eps sign(grad CE) (Goodfellow, Shlens & Szegedy 2015)."""

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "fgsm"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the Linf ball, shaped as ``images``."""
        if threat.radius == 0 or len(images) == 0:
            return images.clone()
        return _call(lambda net: torchattacks.FGSM(net, eps=threat.radius), classifier, images, labels, rng)


@component
class PGD:
    """Projected gradient descent on cross-entropy (Madry et al. 2018): PGD for Linf, PGDL2 for L2.

    The L2 version starts at a uniform *length* in a random direction, so nearer to the image than uniform in the ball.
    """

    steps: Steps = 20
    rel_step: RelStep = 0.25
    random_start: RandomStart = True

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "pgd"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        if threat.radius == 0 or len(images) == 0:  # PGDL2 divides the radius by the distance and returns NaN
            return images.clone()
        attack = torchattacks.PGD if threat.norm == "linf" else torchattacks.PGDL2
        settings = {
            "eps": threat.radius,
            "alpha": self.rel_step * threat.radius,
            "steps": self.steps,
            "random_start": self.random_start,
        }
        return _call(lambda net: attack(net, **settings), classifier, images, labels, rng)


@component
class CW:
    """Carlini & Wagner's L2 attack (2017, eq. on p. 9): min ||d||_2^2 + c max(z_y - max_{j != y} z_j, 0).

    The library has no search over c: each ``c`` is run and the smallest success per image is kept. It stops early when
    the *batch's* summed cost rises, so the distances depend a little on which images share a batch.
    """

    c: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...],
        Field(min_length=1, description="weights of the margin against the distance, each one tried"),
    ] = (1.0, 10.0, 100.0)
    steps: Steps = 200
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="learning rate of Adam, in tanh space")] = 0.01

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "cw"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success, or the image where there is none.

        ``threat`` bounds nothing here: the distance is measured by the evaluation.
        """
        start = off_the_walls(images)

        def candidates() -> Iterator[Tensor]:
            for c in self.c if len(images) else ():
                settings = {"c": c, "kappa": 0, "steps": self.steps, "lr": self.lr}
                yield _call(
                    lambda net, settings=settings: torchattacks.CW(net, **settings),
                    classifier,
                    start,
                    labels,
                    rng,
                    shim=PositiveLogits,
                )

        return smallest_success(classifier, images, labels, candidates())
