"""Examples made on another network: what an attacker without access to this one would try first."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel
from scl_defense.types import Field, component
from scl_defense_benchmarks.fields import RelStep, Steps
from scl_defense_benchmarks.forward import logits_of
from scl_defense_benchmarks.native import margin
from scl_defense_benchmarks.torchattacks_adapter import can_transfer, transferable

if TYPE_CHECKING:
    from scl_defense.checkpoint import LoadedClassifier


@component
class Transfer:
    """MIFGSM, DIFGSM, TIFGSM and VMIFGSM on a surrogate network; the worst of them by this network's margin.

    (Dong et al. 2018 and 2019, Xie et al. 2019, Wang & He 2021.) Of the network under test only the logits are asked,
    once for each. DIFGSM and TIFGSM need square images, TIFGSM three channels: they are left out elsewhere. An example
    that breaks a network which its own gradients do not break shows that those gradients are no guide.
    """

    surrogate: Annotated[str, Field(description="checkpoint of the network that the examples are made on")] = ""
    methods: Annotated[
        tuple[Literal["mifgsm", "difgsm", "tifgsm", "vmifgsm"], ...],
        Field(min_length=1, description="attacks on the surrogate"),
    ] = ("mifgsm", "difgsm", "tifgsm", "vmifgsm")
    steps: Steps = 10
    rel_step: RelStep = 0.25

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["score"]] = "score"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "transfer"

    def unable(self, classes: int | None, image_shape: tuple[int, ...] | None) -> str | None:
        """Why it cannot work on such images and classes; ``None`` where it can. Opens the surrogate."""
        if not self.surrogate:
            return "has no surrogate network; name one: --surrogate CKPT, or transfer:surrogate=CKPT"
        loaded = _open(self.surrogate, "cpu")
        if classes is not None and len(loaded.classes) != classes:
            return f"has a surrogate of {len(loaded.classes)} classes, the network has {classes}; name another"
        if image_shape is not None and tuple(loaded.image_shape) != tuple(image_shape):
            return (
                f"has a surrogate of images {tuple(loaded.image_shape)}, these are {tuple(image_shape)}; name another"
            )
        if image_shape is not None and not any(can_transfer(name, image_shape) for name in self.methods):
            return f"has no method for images {tuple(image_shape)}; add mifgsm"
        return None

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """images: (N, C, H, W) in [0, 1]; labels: (N,). Returns images in the Linf ball, shaped as ``images``."""
        worst, labels = images.clone(), labels.long()
        if threat.radius == 0 or len(images) == 0:
            return worst
        if reason := self.unable(None, tuple(images.shape[1:])):
            raise UserError(f"attack 'transfer' {reason}")
        surrogate = _open(self.surrogate, str(images.device)).network
        highest = torch.full((len(images),), -torch.inf, device=images.device)
        for name in dict.fromkeys(self.methods):
            if not can_transfer(name, tuple(images.shape[1:])):
                continue
            settings = {"steps": self.steps, "rel_step": self.rel_step}
            made = transferable(name, surrogate, images, labels, threat, rng, **settings)
            with torch.no_grad():
                value = margin(logits_of(classifier, made), labels).to(highest)
            higher = value > highest
            worst = torch.where(higher.view(-1, 1, 1, 1), made, worst)
            highest = torch.where(higher, value, highest)
        return worst


def _open(path: str, device: str) -> "LoadedClassifier":
    file = Path(path)
    if not file.is_file():
        raise UserError(f"surrogate '{path}' does not exist; name the checkpoint of a trained network")
    return _load(str(file.resolve()), file.stat().st_mtime_ns, device)


@lru_cache(maxsize=2)
def _load(path: str, changed: int, device: str) -> "LoadedClassifier":
    """changed: when the file was written; another one of the same name is read anew."""
    from scl_defense.checkpoint import load_classifier

    return load_classifier(path, device=device)
