"""Protocols and batches: what every component is handed, and what it must give back.

Shapes: V views, A adversarial views, N images, C channels, H x W pixels, K classes, D features. Images are float32
in [0, 1] everywhere outside a network; normalisation is the network's first layer.

A component is a frozen keyword-only dataclass made with :func:`component`; its fields are its hyper-parameters: they
are validated, stored in the checkpoint, offered on the command line and listed in the documentation.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, dataclass_transform, runtime_checkable

import numpy as np
import torch
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as _pydantic_dataclass
from torch import Tensor, nn

from scl_defense.errors import ComponentError
from scl_defense.threat import ThreatModel, parse_eps

if TYPE_CHECKING:
    from scl_defense.models import Network

NEEDS = frozenset({"embed", "logits", "labels", "checkpoint"})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, Field))
def component(cls: type) -> Any:
    """Make a class a component: a frozen, keyword-only, validated dataclass.

    Annotate fields as ``steps: Annotated[int, Field(ge=1, description="...")] = 10``. Strings from the command line
    are converted; unknown names and values out of range raise ``pydantic.ValidationError``.
    """
    return _pydantic_dataclass(
        frozen=True,
        kw_only=True,
        config=ConfigDict(extra="forbid", validate_default=True, arbitrary_types_allowed=True),
    )(cls)


def _checked_eps(value: Any) -> str:
    try:
        parse_eps(value)
    except Exception as error:
        raise ValueError(str(error)) from None
    return str(value).strip()


#: A radius as a component field: written ``8/255`` or ``0.1``, kept as written.
Eps = Annotated[str, BeforeValidator(_checked_eps)]


class UndeclaredNeed(ComponentError):
    """A generator asked for something that its ``needs`` does not name."""


@dataclass(frozen=True)
class Batch:
    """One training batch.

    views: (V, N, C, H, W) augmented images in [0, 1]. labels: (N,) int64. images: (N, C, H, W), the same images
    without augmentation. indices: (N,) their places in the training split.
    """

    views: Tensor
    labels: Tensor
    images: Tensor
    indices: Tensor


@dataclass(frozen=True)
class GeneratorBatch:
    """What a generator sees of a :class:`Batch`: everything but the labels (those are ``context.labels``)."""

    views: Tensor
    images: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Context:
    """Everything else that a generator may use, and nothing more than it declared.

    threat: the ball. rng: the only source of randomness, on the CPU or the images' device. calibration:
    (M, C, H, W) a fixed seeded sample of training images without labels. cache: a place for what can be made again
    from (seed, calibration) at any time; it is not saved. reaugment: (images (N, C, H, W), view index v) -> those
    images augmented with the very draws that made ``batch.views[v]``; ``None`` where nothing is augmented.

    gather: (n, ...) values of the images of the batch -> (N, ...) those of all processes' images, without a gradient;
    first: the place of the batch's first image among them. With one process, and for a generator that is not
    ``by_row``, the batch holds all images.
    """

    threat: ThreatModel
    rng: torch.Generator
    calibration: Tensor
    epoch: int = 0
    step: int = 0
    cache: MutableMapping[Any, Any] = field(default_factory=dict)
    streams: Callable[..., torch.Generator] | None = None
    granted: Mapping[str, Any] = field(default_factory=dict)
    generator: str = "this generator"
    reaugment: Callable[[Tensor, int], Tensor] | None = None
    first: int = 0
    gather: Callable[[Tensor], Tensor] = lambda values: values

    def _grant(self, need: str) -> Any:
        if need not in self.granted:
            raise UndeclaredNeed(f"{self.generator} used context.{need}, which its needs do not declare")
        return self.granted[need]

    @property
    def embed(self) -> Callable[[Tensor], Tensor]:
        """(N, C, H, W) -> (N, D): the encoder in training with its projector, frozen, in eval mode."""
        embed: Callable[[Tensor], Tensor] = self._grant("embed")
        return embed

    @property
    def logits(self) -> Callable[[Tensor], Tensor]:
        """(N, C, H, W) -> (N, K): the classifier in training, frozen, in eval mode."""
        logits: Callable[[Tensor], Tensor] = self._grant("logits")
        return logits

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        labels: Tensor = self._grant("labels")
        return labels

    @property
    def checkpoint(self) -> Callable[[str], Callable[[Tensor], Tensor]]:
        """path -> ((N, C, H, W) -> (N, D)): the encoder of a saved checkpoint, frozen, in eval mode; it never moves."""
        checkpoint: Callable[[str], Callable[[Tensor], Tensor]] = self._grant("checkpoint")
        return checkpoint

    def stream(self, purpose: str, redraw: Literal["never", "epoch", "step"] = "never") -> torch.Generator:
        """A generator that is the same whenever asked for again: of the run, of this epoch, or of this step."""
        counters = {"never": (), "epoch": (self.epoch,), "step": (self.epoch, self.step)}[redraw]
        if self.streams is None:
            raise ComponentError(f"{self.generator} asked for a random stream outside a run")
        return self.streams(purpose, *counters)


@dataclass(frozen=True)
class StepOutput:
    """loss: a scalar with a graph. metrics: numbers worth logging (averaged over the epoch)."""

    loss: Tensor
    metrics: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Generator(Protocol):
    """Makes adversarial views inside the threat ball and [0, 1].

    needs: subset of {"embed", "logits", "labels", "checkpoint"}; the core hands over nothing else. Empty:
    *model-free*. Optional ``ema``: momentum in [0, 1) of a weight-averaged twin that then stands behind
    ``context.embed``. Optional ``prepare(data, threat)``: called once before training, with the opened data set and
    the threat model, to raise :class:`scl_defense.UserError` when the generator cannot work on them. Optional
    ``by_row = True``: under ``torchrun`` it may get the images of one process alone, because what it makes of an image
    needs no other one but through ``context.gather``, and because all it draws from ``context.rng`` are ``torch.rand``
    and ``torch.randn`` with a row an image. Without it every process makes the views of all images.
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        """-> (A, N, C, H, W), A >= 0: finite, in [0, 1], within ``context.threat`` of ``batch.views[a % V]``.

        There may be more adversarial views than views: view a belongs to ``batch.views[a % V]``.
        """
        ...


@runtime_checkable
class Trainer(Protocol):
    """Builds encoder + heads and turns a batch into a loss.

    views: how many augmented views a batch holds. head: ``joint`` (a classifier is trained along) or ``probe`` (the
    core fits a linear classifier on the frozen encoder). Optional ``ignores_adversarial = True``: the loss leaves the
    adversarial views out on purpose. torch's global generator is seeded from (seed, epoch, step) before every step,
    for dropout; a trainer draws from nothing else. Optional ``usual = (NAME, options)``: the generator that belongs to
    the method when the user names none. Optional ``frozen_encoder = True``: only the classifier is trained. Optional
    ``by_row = True``: under ``torchrun`` its views, images and adversarial views may be those of one process, because
    it looks at them through ``network.features`` (``embed``, ``logits``, the network itself) alone, whole views at a
    time; what these give, the labels and the indices are those of all. Without it every process gets all images.
    """

    views: int
    head: str

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> "Network":
        """A :class:`scl_defense.models.Network`: normalisation, encoder, projector, classifier."""
        ...

    def step(self, network: "Network", batch: Batch, adversarial: Tensor) -> StepOutput:
        """adversarial: (A, N, C, H, W), A >= 0. The core owns mode, backward and optimizer."""
        ...


@runtime_checkable
class Attack(Protocol):
    """Makes adversarial examples for an evaluation; its own opinion of its success is never asked.

    norms: which norms it can attack in. minimal: True for attacks that look for the *smallest* perturbation (the
    threat's radius is then only the budget at which accuracy is counted). access: what it uses of the network.
    Optional ``min_classes``: the fewest classes that it can work with (2 where it does not say).
    """

    norms: ClassVar[frozenset[str]]
    minimal: ClassVar[bool]
    access: ClassVar[Literal["white-box", "score", "decision", "control"]]

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """classifier: (N, C, H, W) in [0, 1] -> logits (N, K). Returns adversarial images, shaped as images."""
        ...


@runtime_checkable
class Model(Protocol):
    """A factory of encoders."""

    def __call__(self, image_shape: tuple[int, int, int]) -> nn.Module:
        """(C, H, W) -> an encoder (N, C, H, W) -> (N, D) with an attribute ``feature_dim`` = D."""
        ...


@dataclass(frozen=True)
class ImageArrays:
    """One split. images: (N, H, W, C) uint8. labels: (N,) integers in [0, K). classes: K names.

    mean, std: per channel in [0, 1] units; ``None``: the core measures them on the training split.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@runtime_checkable
class Dataset(Protocol):
    """flip: whether a mirrored image keeps its label. budgets: norm -> the usual eps for this data, as written."""

    flip: bool
    budgets: Mapping[str, str]

    def load(self, split: Literal["train", "test"], root: Path) -> ImageArrays:
        """Read (or download into ``root``) one split. Raises :class:`scl_defense.UserError` when it cannot."""
        ...


class LogWriter(Protocol):
    """What an opened logger does."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Logger(Protocol):
    """Opens a writer of training records."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> LogWriter:
        """epoch: the first epoch that will be logged; what an earlier, interrupted run wrote from there on must go."""
        ...


def with_labels_hidden(batch: Batch) -> GeneratorBatch:
    return GeneratorBatch(batch.views, batch.images, batch.indices)


__all__ = [
    "NEEDS",
    "Annotated",
    "Attack",
    "Batch",
    "Context",
    "Dataset",
    "Eps",
    "Field",
    "Generator",
    "GeneratorBatch",
    "ImageArrays",
    "LogWriter",
    "Logger",
    "Model",
    "StepOutput",
    "Trainer",
    "UndeclaredNeed",
    "component",
    "replace",
    "with_labels_hidden",
]
