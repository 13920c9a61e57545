"""Attacks of the Adversarial Robustness Toolbox (Nicolae et al. 2018). The only file that imports ART.

Importing it takes seconds, so only its attacks do. ART creates ``~/.art`` while being imported and would
close every logging handler of the process; the latter is prevented here. ART runs on the CPU and on CUDA.

What the library does otherwise than its attacks' names say, and what is done about it here:

- Its L1-PGD stalls at the first saturated coordinate: not used, ``apgd-l1`` is our own.
- HopSkipJump and BoundaryAttack hand float64 to the network on NumPy 2 and fail: the network casts. Their starts come
  from a generator that no seed reaches: ours are drawn from ``rng``.
- SaliencyMapMethod aims *at* the labels it is given, so that the true ones do nothing: other classes are passed.
- SimBA needs probabilities, and is blind where they are exactly 1 in float32: they are softened.
- SpatialTransformation takes one transformation for the whole batch and measures the height in channels: every image
  gets its own worst one of a grid that is ours.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scl_defense.draws import image_by_image, rows_before
from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel
from scl_defense.types import Field, component
from scl_defense_benchmarks.fields import Limit, RandomStart, RelStep, Steps, Targets
from scl_defense_benchmarks.forward import decide, logits_of, margin
from scl_defense_benchmarks.library_guard import library_call, without_logging_setup
from scl_defense_benchmarks.shims import (
    LibraryNetwork,
    Softened,
    UnitGradient,
    nearest_wrong,
    off_the_walls,
    pulled_back,
    pushed_out,
    random_wrong,
    smallest_success,
)

with without_logging_setup("art"):
    from art.attacks.evasion import (
        BoundaryAttack,
        CarliniL2Method,
        ElasticNet,
        FastGradientMethod,
        HopSkipJump,
        ProjectedGradientDescent,
        SaliencyMapMethod,
        SimBA,
        SpatialTransformation,
    )
    from art.estimators.classification import PyTorchClassifier

_NORMS = {"linf": np.inf, "l2": 2}


def _call(
    build: Callable[[PyTorchClassifier], Any],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    rng: torch.Generator,
    shim: type[LibraryNetwork] = UnitGradient,
    **more: Any,
) -> Tensor:
    """``build(estimator).generate(images, one-hot labels)``; more: further arguments of ``generate``, as arrays."""
    device = images.device
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"ART runs on cpu and cuda, not on {device.type}; use --device cpu or another attack")
    with library_call(classifier, rng=rng), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        network = shim(classifier, device).eval()
        with torch.no_grad():
            classes = network(images[:1]).shape[1]
        estimator = PyTorchClassifier(
            network,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )
        given = None if labels is None else torch.nn.functional.one_hot(labels.long(), classes).float().cpu().numpy()
        more = {name: value.float().cpu().numpy() for name, value in more.items()}
        made = build(estimator).generate(images.float().cpu().contiguous().numpy(), given, **more)
        return torch.from_numpy(np.asarray(made, dtype=np.float32)).to(device)


@component
class FGSM:
    """Fast gradient sign method: x + eps sign(grad CE) (Goodfellow, Shlens & Szegedy 2015): FastGradientMethod."""

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "fgsm"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the Linf ball, shaped as ``images``."""
        if threat.radius == 0 or len(images) == 0:  # ART refuses a step of length 0
            return images.clone()
        settings = {"norm": np.inf, "eps": threat.radius, "batch_size": len(images)}
        return _call(lambda net: FastGradientMethod(net, **settings), classifier, images, labels, rng)


@component
class PGD:
    """Projected gradient descent on cross-entropy (Madry et al. 2018): ProjectedGradientDescent."""

    steps: Steps = 20
    rel_step: RelStep = 0.25
    random_start: RandomStart = True

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "pgd"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``."""
        if threat.radius == 0 or len(images) == 0:
            return images.clone()
        settings = {
            "norm": _NORMS[threat.norm],
            "eps": threat.radius,
            "eps_step": self.rel_step * threat.radius,
            "max_iter": self.steps,
            "num_random_init": int(self.random_start),
            "batch_size": len(images),
            "verbose": False,
        }

        def build(estimator: PyTorchClassifier) -> ProjectedGradientDescent:
            # The library draws its starts from NumPy, image after image: those of the images before are passed over.
            draw = np.random.random_sample if threat.norm == "linf" else np.random.standard_normal
            draw(rows_before() * images[0].numel() if self.random_start else 0)
            return ProjectedGradientDescent(estimator, **settings)

        return _call(build, classifier, images, labels, rng)


@component
class CW:
    """Carlini & Wagner's L2 attack (2017) with a binary search over c and a line search per step: CarliniL2Method.

    Five doublings from c = 0.1 end at 1.6, too little where margins are large; from 1 they reach 16.
    """

    binary_search_steps: Annotated[int, Field(ge=1, le=100, description="values of c tried, each from scratch")] = 5
    steps: Steps = 50
    initial_c: Annotated[float, Field(gt=0, allow_inf_nan=False, description="first weight of the margin")] = 1.0
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="first step length, in tanh space")] = 0.01

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "cw"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success, or the image where there is none.

        ``threat`` bounds nothing here: the distance is measured by the evaluation.
        """
        if len(images) == 0:
            return images.clone()
        settings = {
            "binary_search_steps": self.binary_search_steps,
            "max_iter": self.steps,
            "initial_const": self.initial_c,
            "learning_rate": self.lr,
            "batch_size": len(images),
            "verbose": False,
        }
        start = off_the_walls(images)
        found = _call(lambda net: CarliniL2Method(net, **settings), classifier, start, labels, rng, shim=LibraryNetwork)
        found = smallest_success(classifier, images, labels, [found])
        nearer = pulled_back(classifier, images, labels, found)
        return nearest_wrong(classifier, images, labels, [found, nearer], "l2")[0]


@component
class EAD:
    """Elastic-net attack (Chen et al. 2018, alg. 1): min c f(x + d) + ||d||_2^2 + beta ||d||_1, nearest in L1 kept.

    ElasticNet of ART with the L1 decision rule; the example is then pulled back to the boundary by bisection. One
    backward pass an image and step: slow.
    """

    binary_search_steps: Annotated[int, Field(ge=1, le=100, description="values of c tried, each from scratch")] = 5
    steps: Steps = 100
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False, description="weight of the L1 norm")] = 0.01
    initial_c: Annotated[float, Field(gt=0, allow_inf_nan=False, description="first weight of the margin")] = 0.1
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False, description="first step length")] = 0.05

    norms: ClassVar[frozenset[str]] = frozenset({"l1"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "ead"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success, or the image where there is none.

        ``threat`` bounds nothing here: the distance is measured by the evaluation.
        """
        if len(images) == 0:
            return images.clone()
        settings = {
            "binary_search_steps": self.binary_search_steps,
            "max_iter": self.steps,
            "beta": self.beta,
            "initial_const": self.initial_c,
            "learning_rate": self.lr,
            "decision_rule": "L1",
            "batch_size": len(images),
            "verbose": False,
        }
        found = _call(lambda net: ElasticNet(net, **settings), classifier, images, labels, rng, shim=LibraryNetwork)
        nearer = pulled_back(classifier, images, labels, found)
        return nearest_wrong(classifier, images, labels, [found, nearer], "l1")[0]


@component
class JSMA:
    """Saliency-map attack (Papernot et al. 2016): two coordinates at a time, to the wall, towards another class.

    SaliencyMapMethod of ART, aimed at the ``targets`` likeliest other classes in turn; the example of fewest pixels is
    kept. One backward pass an image and step: slow.
    """

    theta: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description="what a step adds to a coordinate")] = (
        1.0
    )
    gamma: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description="share of coordinates changed")] = 0.1
    targets: Targets = 3

    norms: ClassVar[frozenset[str]] = frozenset({"l0"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "jsma"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the success of fewest pixels, else the image.

        ``threat`` bounds nothing here: the pixels are counted by the evaluation.
        """
        if len(images) == 0:
            return images.clone()
        with torch.no_grad():
            logits = logits_of(classifier, images)
        order = logits.scatter(1, labels.long()[:, None], -torch.inf).argsort(1, descending=True)
        settings = {"theta": self.theta, "gamma": self.gamma, "batch_size": len(images), "verbose": False}
        made = [
            _call(lambda net: SaliencyMapMethod(net, **settings), classifier, images, order[:, rank], rng)
            for rank in range(min(self.targets, order.shape[1] - 1))
        ]
        return nearest_wrong(classifier, images, labels, made, "l0")[0]


@component
class Simba:
    """SimBA (Guo et al. 2019, alg. 1): one coordinate at a time, up or down, kept when the probability falls.

    SimBA of ART in the pixel basis, image by image; two queries a coordinate.
    """

    steps: Annotated[int, Field(ge=1, le=1_000_000, description="coordinates tried, each once in turn")] = 3000
    step: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description="what is added or taken away")] = 0.2
    limit: Limit = 1000

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["score"]] = "score"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "simba"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the first success, else the last point.

        ``threat`` bounds nothing here: the distance is measured by the evaluation.
        """
        settings = {"attack": "px", "max_iter": self.steps, "epsilon": self.step, "batch_size": 1, "verbose": False}

        def call(image: Tensor, label: Tensor, own: torch.Generator) -> Tensor:
            return _call(lambda net: SimBA(net, **settings), classifier, image, label, own, shim=Softened)

        return image_by_image(call, images, labels, rng)


@component
class HSJ:
    """HopSkipJump (Chen, Jordan & Wainwright 2020, alg. 2): the boundary's normal estimated from labels alone.

    HopSkipJump of ART on starts of our own; thousands of queries an image.
    """

    steps: Annotated[int, Field(ge=1, le=10_000, description="steps along the boundary")] = 20
    queries: Annotated[int, Field(ge=1, le=1_000_000, description="labels asked for a gradient at most")] = 1000
    first_queries: Annotated[int, Field(ge=1, le=1_000_000, description="the same at the first step")] = 100
    limit: Limit = 100

    norms: ClassVar[frozenset[str]] = frozenset({"l2", "linf"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["decision"]] = "decision"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "hsj"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success, or the image where there is none.

        Of ``threat`` only the norm is used: the distance is measured by the evaluation.
        """
        settings = {
            "norm": _NORMS[threat.norm],
            "max_iter": self.steps,
            "max_eval": max(self.queries, self.first_queries),
            "init_eval": self.first_queries,
            "targeted": False,
            "verbose": False,
        }
        return _from_starts(lambda net: HopSkipJump(net, **settings), classifier, images, labels, threat.norm, rng)


@component
class Boundary:
    """Boundary attack (Brendel, Rauber & Bethge 2018): a random walk along the boundary, towards the image.

    BoundaryAttack of ART on starts of our own; tens of thousands of queries an image.
    """

    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of the walk")] = 1000
    limit: Limit = 50

    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["decision"]] = "decision"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "boundary"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the nearest success, or the image where there is none.

        ``threat`` bounds nothing here: the distance is measured by the evaluation.
        """
        settings = {"max_iter": self.steps, "targeted": False, "verbose": False}
        return _from_starts(lambda net: BoundaryAttack(net, **settings), classifier, images, labels, "l2", rng)


def _from_starts(
    build: Callable[[PyTorchClassifier], Any],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str,
    rng: torch.Generator,
) -> Tensor:
    """A decision attack from random images of another label, image by image; the image itself where none is found."""

    def call(image: Tensor, label: Tensor, own: torch.Generator) -> Tensor:
        start, found = random_wrong(classifier, image, label, own)
        with torch.no_grad():  # an image that is wrong already is its own nearest example
            found &= decide(logits_of(classifier, image)) == label
        if not found:
            return image.clone()
        made = _call(build, classifier, image, label, own, shim=LibraryNetwork, x_adv_init=start)
        ends = [pushed_out(classifier, image, label, end) for end in (start, made)]
        return nearest_wrong(classifier, image, label, ends, norm)[0]

    return image_by_image(call, images, labels.long(), rng)


@component
class Spatial:
    """Rotations and shifts (Engstrom et al. 2019): the worst point of a grid, image by image.

    SpatialTransformation of ART. What it makes is near its image in no norm: it has a ball of its own, the whole box,
    and its row says how many images no rotation and shift of the grid breaks.
    """

    rotation: Annotated[float, Field(ge=0, le=180, allow_inf_nan=False, description="largest angle in degrees")] = 30.0
    shift: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False, description="largest shift, in image sides")] = 0.1
    grid: Annotated[int, Field(ge=1, le=101, description="values tried of the angle and of each shift")] = 5

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = True
    access: ClassVar[Literal["score"]] = "score"
    library: ClassVar[str] = "art"
    family: ClassVar[str] = "spatial"
    own_ball: ClassVar[str] = "linf:1"

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns the transformation of the largest margin.

        ``threat`` bounds nothing here: the distance is measured by the evaluation.
        """
        worst, highest = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
        if len(images) == 0:
            return worst
        height, width = images.shape[2:]

        def places(side: int) -> list[int]:
            return sorted({round(place) for place in np.linspace(-self.shift * side, self.shift * side, self.grid)})

        for down, right, angle in product(
            places(height), places(width), sorted(set(np.linspace(-self.rotation, self.rotation, self.grid)))
        ):

            def build(net: PyTorchClassifier, at: tuple[int, int, float] = (down, right, angle)) -> Any:
                attack = SpatialTransformation(net, verbose=False)
                attack.attack_trans_x, attack.attack_trans_y, attack.attack_rot = at
                return attack

            made = _call(build, classifier, images, None, rng, shim=LibraryNetwork)
            with torch.no_grad():
                value = margin(logits_of(classifier, made), labels.long()).to(highest)
            higher = value > highest
            worst = torch.where(higher.view(-1, 1, 1, 1), made, worst)
            highest = torch.where(higher, value, highest)
        return worst
