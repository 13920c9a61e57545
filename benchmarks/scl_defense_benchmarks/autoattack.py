"""AutoAttack's standard sequence, each stage on what the stages before it have not broken by our own check."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from scl_defense.guard import frozen
from scl_defense.threat import ThreatModel
from scl_defense.types import component
from scl_defense_benchmarks.fields import EarlyStop, Queries, Steps, Targets
from scl_defense_benchmarks.torchattacks_adapter import APGDCE, APGDDLR, APGDT, Square, class_count, fab, margin_apgd
from scl_defense_benchmarks.twin import Twin
from scl_defense_benchmarks.verdicts import judge

Stage = Callable[[nn.Module, Tensor, Tensor, ThreatModel, torch.Generator], Tensor]


@component
class AutoAttack:
    """APGD-CE, APGD-T, FAB-T, Square (Croce & Hein 2020, standard version), one after the other.

    A stage gets the images that are still classified rightly, and its example counts when it is inside box and ball
    and our own float32 forward pass gives another label. The targeted loss needs four classes: with three, the
    untargeted DLR loss takes its place, with two the plain margin. (The official code only warns.)
    With other options than the defaults the number is not comparable with published ones.

    torchattacks' class of this name runs 10 steps instead of 100 and is not used.
    """

    steps: Steps = 100
    targets: Targets = 9
    queries: Queries = 5000
    early_stop: EarlyStop = True

    norms: ClassVar[frozenset[str]] = frozenset({"linf", "l2"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["white-box"]] = "white-box"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "autoattack"
    parallel: ClassVar[bool] = True

    def stages(self, classes: int) -> dict[str, Stage]:
        """The stages for a network of so many classes, by name."""
        second: dict[str, Stage] = {"apgd-t": APGDT(steps=self.steps, targets=self.targets, early_stop=self.early_stop)}
        if classes == 3:
            second = {"apgd-dlr": APGDDLR(steps=self.steps, early_stop=self.early_stop)}
        elif classes < 3:
            second = {"apgd-margin": partial(margin_apgd, steps=self.steps, early_stop=self.early_stop)}
        return {
            "apgd-ce": APGDCE(steps=self.steps, early_stop=self.early_stop),
            **second,
            "fab-t": self._fab,
            "square": Square(queries=self.queries),
        }

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the ball, shaped as ``images``.

        Unbroken images come back as the last iterate of a gradient stage, and untouched where none had a gradient:
        the search of Square alone is not what this attack's name promises.
        """
        best, labels = images.clone(), labels.long()
        if threat.radius == 0 or len(images) == 0:
            return best
        left = torch.arange(len(images), device=images.device)
        for name, stage in self.stages(class_count(classifier, images)).items():
            given, truth = images[left], labels[left]
            if isinstance(classifier, Twin):
                classifier.rows = left
            made = stage(classifier, given, truth, threat, rng)
            with frozen(classifier):
                verdict = judge(classifier, given, truth, made, threat, minimal=False)
            taken = verdict.fooled | (verdict.moved & (name != "square"))
            best[left] = torch.where(taken.view(-1, 1, 1, 1), verdict.examples, best[left])
            left = left[~verdict.fooled]
            if len(left) == 0:
                break
        if isinstance(classifier, Twin):
            classifier.rows = None
        return best

    def _fab(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        settings = {"steps": self.steps, "targets": self.targets, "enough": threat.radius}
        return fab(classifier, images, labels, threat.norm, rng, **settings)
