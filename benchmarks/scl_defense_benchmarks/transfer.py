"""Examples made on another network: what an attacker without access to this one would try first."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel
from scl_defense.types import Field, component
from scl_defense_benchmarks.fields import RelStep, Steps
from scl_defense_benchmarks.forward import logits_of, margin
from scl_defense_benchmarks.torchattacks_adapter import can_transfer, class_count, transferable

if TYPE_CHECKING:
    from scl_defense.checkpoint import LoadedClassifier


@component
class Transfer:
    """MIFGSM, DIFGSM, TIFGSM and VMIFGSM on a surrogate network; the worst of them by this network's margin.

    (Dong et al. 2018 and 2019, Xie et al. 2019, Wang & He 2021.) Of the network under test only the logits are asked,
    once for each. DIFGSM and TIFGSM need square images, TIFGSM three channels: they are left out elsewhere. An example
    that breaks a network which its own gradients do not break shows that those gradients are no guide.

    A surrogate that this project did not write is read as ``--surrogate-model``, ``-m``, ``--mean``, ``--std`` and
    ``--channels`` say, like the network under test; one of ours says for itself what it is.
    """

    surrogate: Annotated[str, Field(description="checkpoint of the network that the examples are made on")] = ""
    methods: Annotated[
        tuple[Literal["mifgsm", "difgsm", "tifgsm", "vmifgsm"], ...],
        Field(min_length=1, description="attacks on the surrogate"),
    ] = ("mifgsm", "difgsm", "tifgsm", "vmifgsm")
    steps: Steps = 10
    rel_step: RelStep = 0.25
    model: Annotated[str, Field(description="network of a surrogate that is bare weights")] = ""
    model_options: Annotated[tuple[str, ...], Field(description="its options, each as name=value")] = ()
    mean: Annotated[tuple[float, ...], Field(description="its normalisation; empty: none")] = ()
    std: Annotated[tuple[float, ...], Field(description="the same: standard deviations")] = ()
    channel_order: Annotated[Literal["rgb", "bgr"], Field(description="order of its colours")] = "rgb"

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[Literal["score"]] = "score"
    library: ClassVar[str] = "torchattacks"
    family: ClassVar[str] = "transfer"

    def unable(self, classes: int | None, image_shape: tuple[int, ...] | None) -> str | None:
        """Why it cannot work on such images and classes; ``None`` where it can. Opens the surrogate."""
        if not self.surrogate:
            return "has no surrogate network; name one: --surrogate CKPT, or transfer:surrogate=CKPT"
        loaded = self._opened(classes, image_shape, "cpu")
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
        classes, shape = class_count(classifier, images), tuple(images.shape[1:])
        if reason := self.unable(classes, shape):
            raise UserError(f"attack 'transfer' {reason}")
        surrogate = self._opened(classes, shape, str(images.device)).network
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

    def _opened(self, classes: int | None, image_shape: tuple[int, ...] | None, device: str) -> "LoadedClassifier":
        options = tuple(tuple(option.split("=", 1)) for option in self.model_options)
        if any(len(option) < 2 for option in options):
            raise UserError("attack 'transfer': model_options are written name=value, joined by '+'")
        given = (
            ("classes", tuple(map(str, range(classes or 0)))),
            ("image_shape", image_shape and tuple(image_shape)),
            ("model", self.model or None),
            ("model_options", options or None),
            ("mean", self.mean or None),
            ("std", self.std or None),
            ("channels", self.channel_order),
        )
        return _open(self.surrogate, device, given)


def reading(foreign: Mapping[str, Any], surrogate_model: str | None) -> dict[str, Any]:
    """How a surrogate is read: as :class:`Transfer`'s fields, from what was said of the network under test.

    surrogate_model: its network, where that is another one; the options of ``-m`` go with the former alone.
    """
    own = surrogate_model is None
    model = foreign.get("model") if own else surrogate_model
    options = (foreign.get("model_options") or {}) if own else {}
    fields = {
        "model": model,
        "model_options": tuple(f"{name}={value}" for name, value in options.items()),
        "mean": tuple(map(float, foreign.get("mean") or ())),
        "std": tuple(map(float, foreign.get("std") or ())),
        "channel_order": foreign.get("channels"),
    }
    return {name: value for name, value in fields.items() if value}


_Given = tuple[tuple[str, Any], ...]


def _open(path: str, device: str, given: _Given) -> "LoadedClassifier":
    file = Path(path)
    if not file.is_file():
        raise UserError(f"surrogate '{path}' does not exist; name the checkpoint of a trained network")
    return _load(str(file.resolve()), file.stat().st_mtime_ns, device, given)


@lru_cache(maxsize=2)
def _load(path: str, changed: int, device: str, given: _Given) -> "LoadedClassifier":
    """given: what :func:`scl_defense_benchmarks.foreign.load_foreign` reads, as pairs. changed: when the file was
    written; another one of the same name is read anew.
    """
    from scl_defense.checkpoint import load_classifier
    from scl_defense_benchmarks.containers import kind_of

    options = {**dict(given), "model_options": dict(dict(given)["model_options"] or ())}
    if kind_of(Path(path)) in ("torchscript", "export", "onnx"):  # they bring their own network
        options |= {"model": None, "model_options": None}
    return load_classifier(path, device=device, options=options)
