"""The peers, called as their documentation calls them: on the plain network, in batches, with the same parameters.

A peer gets a copy of the network of its own (they change modes and gradients) and is asked for nothing that it does not
offer: a task that a peer has no method for is no row. What they return is checked by us, never by them.
"""

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from scl_defense_benchmarks.library_guard import without_logging_setup
from torch import Tensor, nn

from scl_defense.guard import global_random_state
from scl_defense.threat import ThreatModel
from speed.timing import NotInstalled

BATCH = 128  # images at a time; SPEED of every library is best between 64 and 256
Examples = list[list[Tensor]]  # for every ball: sets of examples (N, C, H, W), the worst of which counts


@dataclass(frozen=True)
class Task:
    """What is compared. ours: our battery, ``{l2}`` the L2 radius. search: ours again, all radii of a curve from one
    search. steps, restarts: of a PGD or APGD; c: of CW.
    """

    name: str
    ours: str
    search: str = ""
    steps: int = 10
    restarts: int = 1
    curve: int = 1
    minimal: bool = False
    queries: int = 5000
    targets: int = 9

    def balls(self, eps: str, l2: str) -> list[ThreatModel]:
        """Where examples are counted: one ball, ``curve`` of them up to twice eps, or one of each norm."""
        if self.minimal:
            return [ThreatModel("l2", l2)]
        if self.name == "standard":
            return [ThreatModel("linf", eps), ThreatModel("l2", l2)]
        if self.curve == 1:
            return [ThreatModel("linf", eps)]
        radius = ThreatModel("linf", eps).radius
        return [ThreatModel("linf", f"{2 * radius * k / self.curve:.6g}") for k in range(1, self.curve + 1)]


def imported(module: str, distribution: str) -> ModuleType:
    """The module; :class:`NotInstalled` where it cannot be imported."""
    try:
        # ART would close every log file of this process; some print at import.
        with without_logging_setup("art"), contextlib.redirect_stdout(io.StringIO()):
            return import_module(module)
    except ImportError as error:
        raise NotInstalled(f"pip install {distribution} ({' '.join(str(error).split())[:80]})") from None


class Rival:
    """A library's view of a network. It has a method for every task that it offers, named as the task's kind."""

    name = ""
    #: kind of task -> the most images it is given; what is slow by a factor of ten is timed on fewer.
    most: dict[str, int] = {}  # noqa: RUF012

    #: (task, eps) -> one start of PGD, (images, labels) -> examples; of those who do not bring a ``pgd`` of their own.
    once: Callable[[Task, float], Callable[[Tensor, Tensor], Tensor]]

    def __init__(self, network: nn.Module, classes: int):
        self.network = copy.deepcopy(network).eval()
        self.classes = classes

    def run(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        """Examples for every ball, and one forward pass over each: what a user does to learn the accuracy."""
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())  # bars of ART
        with global_random_state(), torch.enable_grad(), quiet[0], quiet[1]:
            torch.manual_seed(0)
            made = getattr(self, task.name.partition("-")[0].replace("restarts", "pgd"))(task, images, labels, balls)
        self.network.eval()
        with torch.no_grad():
            for sets in made:
                for examples in sets:
                    for part in examples.split(BATCH):
                        self.network(part).argmax(1).sum().item()
        return made

    def pgd(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        return [[batched(self.once(task, ball.radius), images, labels) for _ in range(task.restarts)] for ball in balls]

    curve = pgd


def batched(call: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat(
        [call(x.clone(), y).detach() for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True)]
    )


class Torchattacks(Rival):
    name = "torchattacks"

    def __init__(self, network: nn.Module, classes: int):
        super().__init__(network, classes)
        self.library = imported("torchattacks", "torchattacks")

    def once(self, task: Task, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        return self.library.PGD(self.network, eps=eps, alpha=eps / 4, steps=task.steps, random_start=True)

    def apgd(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        return [[batched(self.library.APGD(self.network, eps=balls[0].radius, steps=task.steps), images, labels)]]

    def cw(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        return [[batched(self.library.CW(self.network, c=1, steps=task.steps, lr=0.02), images, labels)]]

    def autoattack(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        """As shipped: 10 steps where the papers take 100."""
        attack = self.library.AutoAttack(self.network, eps=balls[0].radius, n_classes=self.classes, seed=0)
        return [[batched(attack, images, labels)]]

    def standard(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        """The attacks of our tier with its parameters, each on every image, as a list of the library's attacks."""
        ta, net, eps, l2, few = self.library, self.network, balls[0].radius, balls[1].radius, task.steps
        linf = [
            ta.FGSM(net, eps=eps),
            ta.PGD(net, eps=eps, alpha=eps / 4, steps=20),
            ta.APGD(net, eps=eps, steps=few, loss="ce"),
            ta.APGD(net, eps=eps, steps=few, loss="dlr"),
            ta.APGDT(net, eps=eps, steps=few, n_classes=min(self.classes, task.targets + 1)),
            ta.FAB(net, eps=eps, steps=few, multi_targeted=True, n_classes=min(self.classes, task.targets + 1)),
            ta.Square(net, eps=eps, n_queries=task.queries, resc_schedule=task.queries < 5000),
        ]
        nearest = [ta.PGDL2(net, eps=l2, alpha=l2 / 5, steps=40), ta.DeepFool(net, steps=50)]
        nearest += [ta.CW(net, c=c, steps=200, lr=0.02) for c in (1, 10, 100)]
        return [[batched(attack, images, labels) for attack in group] for group in (linf, nearest)]


class Foolbox(Rival):
    name = "foolbox"

    def __init__(self, network: nn.Module, classes: int):
        super().__init__(network, classes)
        self.library = imported("foolbox", "foolbox")
        self.model = self.library.PyTorchModel(self.network, bounds=(0, 1), device="cpu")

    def once(self, task: Task, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        attack = self.library.attacks.LinfPGD(rel_stepsize=0.25, steps=task.steps, random_start=True)
        attack = attack.repeat(task.restarts) if task.restarts > 1 else attack
        return lambda x, y: attack(self.model, x, y, epsilons=eps)[1]

    def pgd(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        return [[batched(self.once(task, ball.radius), images, labels)] for ball in balls]

    curve = pgd

    def cw(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        settings = {"binary_search_steps": 1, "steps": task.steps, "stepsize": 0.02, "initial_const": 1.0}
        attack = self.library.attacks.L2CarliniWagnerAttack(**settings)
        return [[batched(lambda x, y: attack(self.model, x, y, epsilons=None)[1], images, labels)]]


class AdvLib(Rival):
    name = "adv-lib"

    def __init__(self, network: nn.Module, classes: int):
        super().__init__(network, classes)
        self.library = imported("adv_lib.attacks", "adv-lib")

    def once(self, task: Task, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        settings = {"steps": task.steps, "restarts": task.restarts, "relative_step_size": 0.25}
        return lambda x, y: self.library.pgd_linf(self.network, x, y, eps, **settings)

    pgd = curve = Foolbox.pgd  # restarts are its own

    def apgd(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        settings = {"eps": balls[0].radius, "norm": math.inf, "n_iter": task.steps, "loss_function": "ce"}
        return [[batched(lambda x, y: self.library.apgd(self.network, x, y, **settings), images, labels)]]

    def cw(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        settings = {"learning_rate": 0.02, "initial_const": 1.0, "binary_search_steps": 1}
        call = self.library.carlini_wagner_l2
        return [[batched(lambda x, y: call(self.network, x, y, max_iterations=task.steps, **settings), images, labels)]]


class ART(Rival):
    name = "art"
    most = {"cw": 32, "standard": 16, "autoattack": 16}  # noqa: RUF012

    def __init__(self, network: nn.Module, classes: int):
        super().__init__(network, classes)
        self.library = imported("art.attacks.evasion", "adversarial-robustness-toolbox")
        self.classifier: Any = None

    def estimator(self, images: Tensor) -> Any:
        if self.classifier is None:
            estimators = imported("art.estimators.classification", "adversarial-robustness-toolbox")
            self.classifier = estimators.PyTorchClassifier(
                self.network,
                loss=nn.CrossEntropyLoss(),
                input_shape=tuple(images.shape[1:]),
                nb_classes=self.classes,
                clip_values=(0.0, 1.0),
                device_type="cpu",
            )
        return self.classifier

    def made(self, attack: Any, images: Tensor, labels: Tensor | None) -> Tensor:
        found = attack.generate(images.numpy()) if labels is None else attack.generate(images.numpy(), labels.numpy())
        return torch.from_numpy(found).float()

    def pgd(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        where = "art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch"
        attack = imported(where, "adversarial-robustness-toolbox").ProjectedGradientDescentPyTorch
        settings = {"max_iter": task.steps, "num_random_init": task.restarts, "batch_size": BATCH, "verbose": False}
        net = self.estimator(images)
        return [
            [self.made(attack(net, eps=b.radius, eps_step=b.radius / 4, **settings), images, labels)] for b in balls
        ]

    curve = pgd

    def apgd(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        settings = {"max_iter": task.steps, "nb_random_init": 1, "batch_size": BATCH, "verbose": False}
        settings |= {"eps": balls[0].radius, "eps_step": 2 * balls[0].radius, "loss_type": "cross_entropy"}
        attack = self.library.AutoProjectedGradientDescent(self.estimator(images), **settings)
        return [[self.made(attack, images, labels)]]

    def cw(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        settings = {"max_iter": task.steps, "binary_search_steps": 1, "initial_const": 1.0, "learning_rate": 0.02}
        attack = self.library.CarliniL2Method(self.estimator(images), batch_size=BATCH, verbose=False, **settings)
        return [[self.made(attack, images, labels)]]

    def autoattack(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        """Its own sequence: APGD twice, DeepFool, Square."""
        eps = balls[0].radius
        settings = {"eps": eps, "eps_step": 2 * eps, "batch_size": BATCH}
        return [[self.made(self.library.AutoAttack(self.estimator(images), **settings), images, labels)]]

    def standard(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        """What it has of our tier: neither targeted APGD nor FAB."""
        art, net, eps, l2 = self.library, self.estimator(images), balls[0].radius, balls[1].radius
        quiet = {"batch_size": BATCH, "verbose": False}
        apgd = {"eps": eps, "eps_step": 2 * eps, "max_iter": task.steps, "nb_random_init": 1, **quiet}
        linf = [
            art.FastGradientMethod(net, eps=eps, batch_size=BATCH),
            art.ProjectedGradientDescent(net, eps=eps, eps_step=eps / 4, max_iter=20, num_random_init=1, **quiet),
            art.AutoProjectedGradientDescent(net, loss_type="cross_entropy", **apgd),
            art.AutoProjectedGradientDescent(net, loss_type="difference_logits_ratio", **apgd),
            art.SquareAttack(net, eps=eps, max_iter=task.queries, **quiet),
        ]
        descent = {"norm": 2, "eps": l2, "eps_step": l2 / 5, "max_iter": 40, "num_random_init": 1, **quiet}
        nearest = [
            art.ProjectedGradientDescent(net, **descent),
            art.DeepFool(net, max_iter=50, epsilon=1e-3, **quiet),
            art.CarliniL2Method(net, max_iter=50, binary_search_steps=5, initial_const=0.1, **quiet),
        ]
        return [[self.made(attack, images, labels) for attack in group] for group in (linf, nearest)]


class Official(Rival):
    """The authors' AutoAttack, as packaged in pyautoattack."""

    name = "pyautoattack"

    def __init__(self, network: nn.Module, classes: int):
        super().__init__(network, classes)
        self.library = imported("pyautoattack", "pyautoattack")

    def _run(self, images: Tensor, labels: Tensor, eps: float, **settings: Any) -> Examples:
        attack = self.library.AutoAttack(self.network, norm="Linf", eps=eps, seed=0, **settings)
        made, _ = attack.run_standard_evaluation(images.clone(), labels.clone(), batch_size=BATCH)
        return [[made.detach()]]

    def apgd(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        return self._run(images, labels, balls[0].radius, version="custom", attacks=["apgd-ce"])

    def autoattack(self, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]) -> Examples:
        return self._run(images, labels, balls[0].radius, version="standard")


RIVALS: tuple[type[Rival], ...] = (Torchattacks, ART, Foolbox, AdvLib, Official)


def offering(task: Task) -> Iterator[type[Rival]]:
    """The rivals that have a method for the task."""
    kind = task.name.partition("-")[0].replace("restarts", "pgd")
    for rival in RIVALS:
        has = getattr(rival, kind, None)
        if has is not None and (has not in (Rival.pgd, Rival.curve) or hasattr(rival, "once")):
            yield rival
