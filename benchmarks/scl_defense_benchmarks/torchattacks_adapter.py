"""Attacks of torchattacks (Kim 2020). The only file that imports it. 3.3.0 and 3.5.1 give the same results.

What the library does otherwise than its attacks' names say, and what is done about it here:

- 10 steps where the papers take 100, and Square's schedule rescaled: the papers' numbers are passed.
- APGD, APGD-T, FAB and Square hand a failure back as the clean image, which looks like no attempt: the best iterate
  comes back instead, and the clean image only where no gradient was ever seen.
- They reseed the global generators with a fixed ``seed``, the same for every batch: the seed is drawn from ``rng``.
- APGD-T under L2 takes the step length of the batch's *first* image for all images: each has its own.
- FAB keeps the first class that succeeds inside eps: the nearest example over all classes is kept.
- A slope that vanishes (DeepFool) or is not a number (FAB) turns the iterate into NaN, and with it what FAB had
  found: they stay where they were.
- DeepFool stops *on* the decision boundary, where the label is still right: a last overshoot follows.
- Square under L2 fails unless images are square and their side is one of those its first pattern fits: others are
  padded, and what it draws in the padding is lost.
- OnePixel and Pixle ask whether a softmax probability has fallen, which one of exactly 1 never does: it is softened.
- TIFGSM smooths three channels and no other number; DIFGSM and TIFGSM resize to squares; Pixle mixes up the sides of
  other images: they are refused images that they cannot work on. Pixle knows three channels: a grey image gets them.
- What is ``parallel`` draws from torch alone, in its own thread, and seeds nothing by itself.
- EADL1 and EADEN return images outside [0, 1] and AutoAttack is another sequence: neither is used.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from scl_defense.draws import image_by_image
from scl_defense.errors import UserError
from scl_defense.guard import frozen
from scl_defense.threat import ThreatModel
from scl_defense.types import Field, component
from scl_defense_benchmarks.boundary import nearest_found
from scl_defense_benchmarks.fields import EarlyStop, Limit, Queries, RandomStart, RelStep, Restarts, Steps, Targets
from scl_defense_benchmarks.forward import logits_of
from scl_defense_benchmarks.library_guard import library_call
from scl_defense_benchmarks.patches import Patches
from scl_defense_benchmarks.shims import (
    AllWrong,
    LibraryNetwork,
    OwnLogits,
    PositiveLogits,
    SoftLogits,
    StopsWhereWrong,
    UnitGradient,
    UnitSpread,
    finite_or,
    into_box,
    nearest_wrong,
    off_the_walls,
    pulled_back,
    smallest_success,
)
from scl_defense_benchmarks.squares import best_found
from scl_defense_benchmarks.twin import Twin

_NORMS = {"linf": "Linf", "l2": "L2"}


def _call(
    build: Callable[[nn.Module], torchattacks.attack.Attack],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    rng: torch.Generator,
    shim: type[LibraryNetwork] = UnitGradient,
) -> Tensor:
    # CW of 3.3.0 makes a one-hot table on the default device and indexes it with the labels. Where that is the images'
    # own device nothing is said: the context is asked about every operation, a tenth of a small network's time.
    here = nullcontext() if images.device == torch.get_default_device() else images.device
    with library_call(classifier, rng=rng), here:
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
    parallel: ClassVar[bool] = True

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
    parallel: ClassVar[bool] = True

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

    The library has no search over c: each ``c`` is run, the smallest success per image is kept and pulled back to the
    boundary by bisection. The library stops early when the *batch's* summed cost rises, so the distances depend a
    little on which images share a batch.
    """

    c: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...],
        Field(min_length=1, description="weights of the margin against the distance, each one tried"),
    ] = (1.0, 10.0, 100.0)
    steps: Steps = 200
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="learning rate of Adam, in tanh space")] = 0.02

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "cw"
    parallel: ClassVar[bool] = True

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

        found = smallest_success(classifier, images, labels, candidates())
        nearer = pulled_back(classifier, images, labels, found)
        return nearest_wrong(classifier, images, labels, [found, nearer], "l2")[0]


@component
class MIFGSM:
    """Momentum iterative FGSM (Dong et al. 2018, alg. 1): the sign of a running sum of gradients of L1 length 1."""

    steps: Steps = 10
    rel_step: RelStep = 0.25
    decay: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False, description="what is kept of the sum")] = 1.0

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "mifgsm"
    parallel: ClassVar[bool] = True

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the Linf ball, shaped as ``images``."""
        if threat.radius == 0 or len(images) == 0:
            return images.clone()
        alpha = self.rel_step * threat.radius
        settings = {"eps": threat.radius, "alpha": alpha, "steps": self.steps, "decay": self.decay}
        made = _call(lambda net: torchattacks.MIFGSM(net, **settings), classifier, images, labels, rng)
        return finite_or(images, made)  # the library divides a gradient of zero by its length


@component
class DeepFool:
    """DeepFool (Moosavi-Dezfooli et al. 2016, alg. 2): steps onto the nearest linearised boundary, smallest L2.

    The library cuts at the box inside its loop and then converges *to* the boundary, where rounding decides the label:
    the perturbation is tried times 1.001 and times 1.02 (the paper's overshoot), and the nearest that is wrong is
    kept. It goes image by image, with one backward pass a class and step: slow with many classes.
    """

    steps: Steps = 50

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "deepfool"
    parallel: ClassVar[bool] = True

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success, else the last iterate.

        ``threat`` bounds nothing here: the distance is measured by the evaluation.
        """
        if len(images) == 0:
            return images.clone()
        made = _call(lambda net: _DeepFool(net, steps=self.steps), classifier, images, labels, rng, shim=UnitSpread)
        pushed = [images + factor * (made - images) for factor in (1.001, 1.02)]
        best, found = nearest_wrong(classifier, images, labels, pushed, "l2")
        return torch.where(found.view(-1, 1, 1, 1), best, into_box(images, pushed[-1]))


class _DeepFool(torchattacks.DeepFool):
    """An image that a step leaves where it is, or throws away, is finished."""

    def _forward_indiv(self, image: Tensor, label: Tensor) -> tuple[bool, Tensor, Tensor]:
        stop, predicted, moved = super()._forward_indiv(image, label)
        if not moved.isfinite().all():
            return True, predicted, image.detach()
        return stop or torch.equal(moved, image), predicted, moved


@component
class SparseFool:
    """SparseFool (Modas, Moosavi-Dezfooli & Frossard 2019, alg. 2): few coordinates across a linearised boundary.

    Each step finds a point behind the boundary with DeepFool and reaches its tangent plane coordinate by coordinate.
    It goes image by image: slow.
    """

    steps: Steps = 20
    spread: Annotated[float, Field(gt=0, allow_inf_nan=False, description="how far behind the boundary, lambda")] = 3.0
    limit: Limit = 1000

    norms: ClassVar[frozenset[str]] = frozenset({"l0"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "sparsefool"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the success, else the last iterate.

        ``threat`` bounds nothing here: the pixels are counted by the evaluation.
        """
        if len(images) == 0:
            return images.clone()

        def build(net: nn.Module) -> torchattacks.SparseFool:
            attack = torchattacks.SparseFool(net, steps=self.steps, lam=self.spread)
            attack.deepfool = _DeepFool(net)
            return attack

        return finite_or(images, _call(build, classifier, images, labels, rng, shim=UnitSpread))


@component
class OnePixel:
    """One-pixel attack (Su, Vargas & Sakurai 2019): differential evolution over places and colours of pixels.

    As many pixels as the L0 ball allows. Image by image.
    """

    steps: Annotated[int, Field(ge=1, le=10_000, description="generations")] = 50
    population: Annotated[int, Field(ge=4, le=100_000, description="candidates a generation, about")] = 100
    limit: Limit = 200

    norms: ClassVar[frozenset[str]] = frozenset({"l0"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["score"]] = "score"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "onepixel"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the best candidate, shaped as ``images``."""
        pixels = min(int(threat.radius), images.shape[2] * images.shape[3])
        if pixels == 0 or len(images) == 0:
            return images.clone()
        settings = {"pixels": pixels, "steps": self.steps, "popsize": self.population}
        return _one_by_one(lambda net: torchattacks.OnePixel(net, **settings), classifier, images, labels, rng)


@component
class Pixle:
    """Pixle (Pomponi, Scardapane & Uncini 2022): small patches whose pixels are copied to other places.

    The pixels changed add up over the restarts and are bounded by nothing: they are counted. Square images of one or
    three channels only.
    """

    restarts: Annotated[int, Field(ge=1, le=100_000, description="patches moved, one after the other")] = 100
    steps: Annotated[int, Field(ge=1, le=100_000, description="patches tried for each")] = 10
    patch: Annotated[int, Field(ge=1, le=100, description="largest side of a patch in pixels")] = 3
    limit: Limit = 1000

    norms: ClassVar[frozenset[str]] = frozenset({"l0"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["score"]] = "score"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "pixle"
    square_images: ClassVar[bool] = True
    channels: ClassVar[frozenset[int]] = frozenset({1, 3})

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, H) in [0, 1]; labels: (N,). Returns the first success, else the last point.

        ``threat`` bounds nothing here: the pixels are counted by the evaluation.
        """
        if len(images) == 0:
            return images.clone()
        channels, height, width = images.shape[1:]
        if height != width or channels not in self.channels:
            raise UserError(
                f"attack 'pixle' needs square images of 1 or 3 channels, not {tuple(images.shape[1:])}; leave it out"
            )
        sides = (1, min(self.patch, images.shape[2]))
        settings = {
            "x_dimensions": sides,
            "y_dimensions": sides,
            "restarts": self.restarts,
            "max_iterations": self.steps,
        }
        network = classifier if channels == 3 else _Grey(classifier)
        coloured = images.expand(-1, 3, -1, -1)
        made = _one_by_one(lambda net: torchattacks.Pixle(net, **settings), network, coloured, labels, rng)
        return made[:, :channels].contiguous()


class _Grey(nn.Module):
    """The network of grey images, for images of three equal channels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images[:, :1])


def _one_by_one(
    build: Callable[[nn.Module], torchattacks.attack.Attack],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    rng: torch.Generator,
) -> Tensor:
    """A score attack on one image after the other, each with probabilities softened for it, and draws of its own."""

    def call(image: Tensor, label: Tensor, own: torch.Generator) -> Tensor:
        return _call(build, classifier, image, label, own, shim=SoftLogits)

    return image_by_image(call, images, labels, rng)


#: Attacks whose examples carry over to other networks: name -> what builds them from a network and its settings.
TRANSFERABLE: dict[str, type[torchattacks.attack.Attack]] = {
    "mifgsm": torchattacks.MIFGSM,
    "difgsm": torchattacks.DIFGSM,
    "tifgsm": torchattacks.TIFGSM,
    "vmifgsm": torchattacks.VMIFGSM,
}


def can_transfer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether that one works on images (C, H, W)."""
    channels, height, width = shape
    return name not in ("difgsm", "tifgsm") or (height == width and (name == "difgsm" or channels == 3))


def transferable(
    name: str,
    surrogate: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    rng: torch.Generator,
    *,
    steps: int,
    rel_step: float,
) -> Tensor:
    """Examples of :data:`TRANSFERABLE` in the Linf ball, made on ``surrogate`` with momentum 1."""
    settings = {"eps": threat.radius, "alpha": rel_step * threat.radius, "steps": steps, "decay": 1.0}
    made = _call(lambda net: TRANSFERABLE[name](net, **settings), surrogate, images, labels, rng)
    return finite_or(images, made)


@component
class APGDCE:
    """Auto-PGD on cross-entropy (Croce & Hein 2020, alg. 1): the step length halves where the loss stops rising."""

    steps: Steps = 100
    restarts: Restarts = 1
    early_stop: EarlyStop = True

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "apgd"
    parallel: ClassVar[bool] = True

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        settings = {"loss": "ce", "steps": self.steps, "restarts": self.restarts}
        return _apgd(classifier, images, labels, threat, rng, early_stop=self.early_stop, **settings)


@component
class EOT:
    """Auto-PGD on cross-entropy, each gradient the mean over ``draws`` passes (Athalye et al. 2018, section 4.3).

    For networks whose output is random: one pass shows one of many networks. On others it is apgd-ce, ``draws`` times
    as expensive.
    """

    steps: Steps = 100
    draws: Annotated[int, Field(ge=1, le=10_000, description="gradients averaged at every step")] = 20
    restarts: Restarts = 1

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "eot"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        settings = {"loss": "ce", "steps": self.steps, "restarts": self.restarts, "draws": self.draws}
        return _apgd(classifier, images, labels, threat, rng, **settings)


@component
class APGDDLR:
    """Auto-PGD on the difference of logits ratio (Croce & Hein 2020, eq. 6): the margin over z_(1) - z_(3).

    No scale of the logits saturates it, as one saturates cross-entropy. It needs three classes.
    """

    steps: Steps = 100
    restarts: Restarts = 1
    early_stop: EarlyStop = True

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "apgd"
    parallel: ClassVar[bool] = True
    min_classes: ClassVar[int] = 3

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        check_classes(self, "apgd-dlr", classifier, images)
        settings = {"loss": "dlr", "steps": self.steps, "restarts": self.restarts}
        return _apgd(classifier, images, labels, threat, rng, early_stop=self.early_stop, **settings)


@component
class APGDT:
    """Auto-PGD on the targeted difference of logits ratio (Croce & Hein 2020, eq. 7), class after class.

    It aims at the ``targets`` likeliest other classes in turn, each time with the images that are not broken yet. It
    needs four classes.
    """

    steps: Steps = 100
    targets: Targets = 9
    early_stop: EarlyStop = True

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "apgd"
    parallel: ClassVar[bool] = True
    min_classes: ClassVar[int] = 4

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        check_classes(self, "apgd-t", classifier, images)
        settings = {"loss": "dlr", "steps": self.steps, "targets": self.targets}
        return _apgd(classifier, images, labels, threat, rng, early_stop=self.early_stop, **settings)


def class_count(classifier: nn.Module, images: Tensor) -> int:
    """How many logits ``classifier`` gives for the first of ``images``."""
    with frozen(classifier):
        return logits_of(classifier, images[:1], multiple=8).shape[1]


def check_classes(attack: Any, name: str, classifier: nn.Module, images: Tensor) -> None:
    """Raise :class:`UserError` when the network has fewer classes than the attack's loss is defined for."""
    if len(images) and (classes := class_count(classifier, images)) < attack.min_classes:
        raise UserError(
            f"attack '{name}' needs {attack.min_classes} classes, the network has {classes}; use apgd-ce or autoattack"
        )


def margin_apgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    rng: torch.Generator,
    *,
    steps: int,
    early_stop: bool = True,
) -> Tensor:
    """Auto-PGD on the plain margin: what is left of the DLR loss with two classes."""
    return _apgd(classifier, images, labels, threat, rng, loss="margin", steps=steps, early_stop=early_stop)


def _apgd(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    rng: torch.Generator,
    *,
    loss: Literal["ce", "dlr", "margin"],
    steps: int,
    restarts: int = 1,
    targets: int = 0,
    draws: int = 1,
    early_stop: bool = False,
) -> Tensor:
    """targets: 0 for the untargeted loss. draws: gradients averaged a step. early_stop: see :class:`StopsWhereWrong`.

    Returns a wrong iterate in the ball, else that of the highest loss.
    """
    if threat.radius == 0 or len(images) == 0:
        return images.clone()

    def build(net: nn.Module) -> _APGD:
        attack = _APGD(
            net,
            norm=_NORMS[threat.norm],
            eps=threat.radius,
            steps=steps,
            loss="ce" if loss == "ce" else "dlr",
            eot_iter=draws,
        )
        attack.restarts, attack.target_count, attack.scaled = restarts, targets, loss != "margin"
        attack.early_stop = early_stop
        return attack

    return _call(build, classifier, images, labels, rng, shim=StopsWhereWrong)


class _APGD(torchattacks.APGD):
    """The library's step loop, with our own loop over restarts and targets around it.

    APGDT of the library is a copy of APGD with another loss (and one step length for the whole batch under L2): here
    it is APGD with that loss.
    """

    restarts, target_count, scaled, early_stop = 1, 0, True, False
    targets: Tensor | None = None

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        column = (-1, 1, 1, 1)
        best, highest = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
        found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        order, ranks = images[:0], [None]
        if self.target_count:
            with torch.no_grad():
                order = self.get_logits(images).argsort(1)
            ranks = range(2, 2 + min(self.target_count, order.shape[1] - 1))
        for rank in (rank for rank in ranks for _ in range(self.restarts)):
            left = (~found).nonzero().squeeze(1)
            if len(left) == 0:
                break
            self.targets = None if rank is None else order[left, -rank]
            self.model.stop(labels[left] if self.early_stop else None, left)
            try:
                climbed, right, loss, wrong = self.attack_single_run(images[left], labels[left])
            except AllWrong:  # its arithmetic on what is passed no more costs as much as a small network's passes
                best[left], found[left] = self.model.kept, True
                break
            finally:
                self.model.release()
            broken = ~right.bool()
            # Without a usable gradient an iterate is a random start: no attempt, and it must not look like one.
            higher = broken | (self.model.seen & (loss > highest[left]))
            made = torch.where(broken.view(column), wrong, climbed).detach()
            best[left] = torch.where(higher.view(column), made, best[left])
            highest[left] = torch.where(higher, loss.detach(), highest[left])
            found[left] = broken
        return finite_or(images, best)

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (M, K) logits, y: (M,). (M,) the DLR loss, the targeted one for ``targets``, or the plain margin."""
        rows = torch.arange(len(y), device=y.device)
        ordered = x.sort(dim=1).values
        if self.targets is not None:
            scale = ordered[:, -1] - 0.5 * ordered[:, -3] - 0.5 * ordered[:, -4] + 1e-12
            return -(x[rows, y] - x[rows, self.targets]) / scale
        other = torch.where(x.argmax(1) == y, ordered[:, -2], ordered[:, -1])
        return -(x[rows, y] - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12 if self.scaled else 1)


@component
class FAB:
    """Targeted fast adaptive boundary attack (Croce & Hein 2020b, alg. 1): the smallest perturbation, class by class.

    Each step goes onto the linearised boundary to one class, pulled back towards the image. All ``targets`` likeliest
    other classes are aimed at, and the nearest example is kept.
    """

    steps: Steps = 100
    targets: Targets = 9

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "fab"
    parallel: ClassVar[bool] = True

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success, else the last iterate.

        Of ``threat`` only the norm is used: the distance is measured by the evaluation.
        """
        return fab(classifier, images, labels, threat.norm, rng, steps=self.steps, targets=self.targets)


def fab(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str,
    rng: torch.Generator,
    *,
    steps: int,
    targets: int,
    enough: float = 0.0,
) -> Tensor:
    """FAB-T. enough: an image with an example at most so far away is aimed at no further class.

    Returns the nearest example that is wrong, else the last iterate; the image itself where no step was possible.
    """
    if len(images) == 0:
        return images.clone()
    attack: list[_FAB] = []

    def build(net: nn.Module) -> _FAB:
        attack.append(_FAB(net, norm=_NORMS[norm], steps=steps))
        attack[0].target_count, attack[0].enough = targets, enough
        return attack[0]

    nearest = _call(build, classifier, images, labels, rng, shim=UnitSpread)
    pushed = images + 1.001 * (nearest - images)  # on the boundary one batch's rounding decides the label
    best, found = nearest_wrong(classifier, images, labels, [nearest, pushed], norm)
    return torch.where(found.view(-1, 1, 1, 1), best, into_box(images, attack[0].last))


class _FAB(torchattacks.FAB):
    """The library's steps towards one class; what they find is kept here, over all classes."""

    target_count, enough = 9, 0.0

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        column = (-1, 1, 1, 1)
        nearest, self.last = images.clone(), images.clone()
        distance = torch.full((len(images),), torch.inf, device=images.device)
        seen = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        logits = self.get_logits(images)
        order, right = logits.argsort(1), logits.argmax(1) == labels
        for rank in range(2, 2 + min(self.target_count, logits.shape[1] - 1)):
            left = (right & (distance > self.enough)).nonzero().squeeze(1)
            if len(left) == 0:
                break
            found = nearest_found(self, images[left], labels[left], order[left, -rank])
            nearer = found.distance < distance[left]
            distance[left[nearer]], nearest[left[nearer]] = found.distance[nearer], found.nearest[nearer]
            seen[left] |= found.seen  # without a slope it moves by rounding alone
            tried = (found.last != images[left]).flatten(1).any(1) & seen[left]
            self.last[left] = torch.where(tried.view(column), found.last, self.last[left])
        return nearest


@component
class Square:
    """Square Attack (Andriushchenko et al. 2020, algs. 1 to 3): random search over squares, no gradient.

    The side of the squares shrinks after fixed numbers of queries as in the paper; a search of fewer than 5000 goes
    through the whole schedule.
    """

    queries: Queries = 5000

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["score"]] = "score"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "square"
    parallel: ClassVar[bool] = True

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the best point tried, shaped as ``images``."""
        if threat.radius == 0 or len(images) == 0:
            return images.clone()
        height, width = images.shape[2:]
        side = _square_side(max(height, width)) if threat.norm == "l2" else 0
        padding = (0, max(side - width, 0), 0, max(side - height, 0))
        inner = _Cropped(classifier, height, width)
        settings = {"norm": _NORMS[threat.norm], "eps": threat.radius, "n_queries": self.queries}
        # Under L2 every square rescales the whole image: there is no window to gain by.
        remembers = isinstance(classifier, Twin) and threat.norm == "linf"
        with classifier.remembering() if remembers else nullcontext() as patches:

            def build(net: nn.Module) -> _Square:
                attack = _Square(net, resc_schedule=self.queries < 5000, **settings)
                attack.patches = patches
                return attack

            given = inner if any(padding) else classifier
            made = _call(build, given, F.pad(images, padding), labels, rng, shim=OwnLogits)
        return made[:, :, :height, :width].contiguous()


def _square_side(side: int) -> int:
    """The smallest side from ``side`` on that the library's first L2 pattern, of tiles a fifth wide, fits into."""
    side = max(side, 5)
    tile = side // 5
    fits = tile == 1 or (side - 5 * tile) // 2 + side // tile * tile <= side
    return side if fits else _square_side(side + 1)


class _Cropped(nn.Module):
    """The network of images that were padded below and on the right."""

    def __init__(self, network: nn.Module, height: int, width: int):
        super().__init__()
        self.network, self.height, self.width = network, height, width

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images[:, :, : self.height, : self.width])


class _Square(torchattacks.Square):
    """A failure is the best point tried, not the clean image; the global generators are seeded from outside.

    patches: what the network remembers the best points with.
    """

    patches: Patches | None = None

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        self.init_hyperparam(x)
        if self.norm == "Linf":
            return best_found(self, x, y, self.patches)
        return self.attack_single_run(x, y)[1]
