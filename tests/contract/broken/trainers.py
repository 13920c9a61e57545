"""Broken trainers."""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from broken import Case
from scl_defense.losses import supcon
from scl_defense.models import Network
from scl_defense.types import Batch, StepOutput, component

KIND = "trainer"


class Base:
    """Cross-entropy on the first view and on all adversarial views; the broken ones change one thing."""

    views: ClassVar[int] = 2
    head: ClassVar[str] = "joint"

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(encoder, num_classes, mean, std)

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        loss = self.loss(network, batch, adversarial)
        return StepOutput(loss, {"ce": loss.detach()})

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        images = torch.cat([batch.views[:1], adversarial])
        return F.cross_entropy(network(images.flatten(0, 1)), batch.labels.repeat(len(images)))


@component
class Sound(Base):
    """Cross-entropy."""


@component
class SoundClean(Base):
    """A baseline that says that it leaves the adversarial views out."""

    ignores_adversarial: ClassVar[bool] = True

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        return F.cross_entropy(network(batch.views[0]), batch.labels)


@component
class NoViews(Base):
    """Asks for no view."""

    views: ClassVar[int] = 0


@component
class UnknownHead(Base):
    """A head that nobody fits."""

    head: ClassVar[str] = "linear"


@component
class OneClassMore(Base):
    """Built with a class for 'adversarial'."""

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(encoder, num_classes + 1, mean, std)


@component
class CopiesEncoder(Base):
    """The encoder of the recipe is not the one that is trained."""

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(copy.deepcopy(encoder), num_classes, mean, std)


@component
class ForgetsNormalisation(Base):
    """Mean 0 and std 1 whatever it is told."""

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(encoder, num_classes, [0.0 for _ in mean], [1.0 for _ in std])


class ScaledNetwork(Network):
    def logits(self, images: Tensor) -> Tensor:
        return 10 * super().logits(images)


@component
class OtherLogits(Base):
    """The loaded checkpoint would have other logits than the network that was trained."""

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return ScaledNetwork(encoder, num_classes, mean, std)


@component
class LossOfEveryImage(Base):
    """reduction="none"."""

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        return StepOutput(F.cross_entropy(network(batch.views[0]), batch.labels, reduction="none") + adversarial.sum())


@component
class DetachedLoss(Base):
    """Nothing to differentiate."""

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        return StepOutput(self.loss(network, batch, adversarial).detach())


@component
class DividesByViews(Base):
    """The mean over no adversarial view is NaN."""

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        clean = F.cross_entropy(network(batch.views[0]), batch.labels)
        attacked = F.cross_entropy(network(adversarial.flatten(0, 1)), batch.labels.repeat(len(adversarial)))
        return StepOutput(clean + attacked)


@component
class MetricIsNaN(Base):
    """A metric of the adversarial views, also when there is none."""

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        return StepOutput(self.loss(network, batch, adversarial), {"brightness": adversarial.mean()})


@component
class MetricIsVector(Base):
    """One metric an image."""

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        return StepOutput(self.loss(network, batch, adversarial), {"labels": batch.labels})


@component
class ForgetsEncoder(Base):
    """Trains the classifier on detached features."""

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        images = torch.cat([batch.views[:1], adversarial])
        features = network.features(images.flatten(0, 1)).detach()
        return F.cross_entropy(network.classifier(features), batch.labels.repeat(len(images)))


@component
class ForgetsClassifier(Base):
    """Says joint and trains the encoder alone."""

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        images = torch.cat([batch.views, adversarial])
        return supcon(network.embed(images.flatten(0, 1)), batch.labels.repeat(len(images)))


@component
class IgnoresAdversarial(SoundClean):
    """A clean baseline under the generator's name."""

    ignores_adversarial: ClassVar[bool] = False


@component
class WritesViews(Base):
    """Clips the views in place."""

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        batch.views.clamp_(0.1, 0.9)
        return super().loss(network, batch, adversarial)


@component
class SwitchesToEval(Base):
    """Freezes the batch statistics of the rest of the run."""

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        loss = super().loss(network, batch, adversarial)
        network.eval()
        return loss


@component
class CallsBackward(Base):
    """The loop calls backward again: every gradient counts twice."""

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        loss = super().loss(network, batch, adversarial)
        loss.backward(retain_graph=True)
        return loss


@component
class MixesUp(Base):
    """Draws its weights from torch's global generator."""

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        weight = torch.rand(())
        mixed = weight * batch.views[:1] + (1 - weight) * batch.views[-1:]
        images = torch.cat([mixed, adversarial])
        return F.cross_entropy(network(images.flatten(0, 1)), batch.labels.repeat(len(images)))


@component
class KeepsQueue(Base):
    """A memory bank that no checkpoint holds."""

    bank: ClassVar[list[Tensor]] = []

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        loss = super().loss(network, batch, adversarial)
        features = network.features(batch.views[0]).mean(0)
        self.bank.append(features.detach())
        return loss + 0.01 * (features - torch.stack(self.bank[-8:]).mean(0)).square().sum()


@component
class SpreadOfOneImage(Base):
    """The variance inside a class that has one image is NaN."""

    views: ClassVar[int] = 1

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        features = network.features(batch.views[0])
        variances = []
        for label in batch.labels.unique():
            mine = features[batch.labels == label]
            variances.append((mine - mine.mean(0)).square().sum() / (len(mine) - 1))
        return super().loss(network, batch, adversarial) + 0.01 * torch.stack(variances).mean()


@component
class RootOfZero(Base):
    """The loss is finite; the gradient of a square root at 0 is not."""

    views: ClassVar[int] = 1

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        features, labels = network.features(batch.views[0]), batch.labels
        centres = torch.stack([features[labels == label].mean(0) for label in labels])
        pull = (features - centres).square().sum(1).sqrt().mean()
        return super().loss(network, batch, adversarial) + 0.1 * pull


@component
class Unlearns(Base):
    """The value is right, the gradient has the wrong sign."""

    def loss(self, network: Network, batch: Batch, adversarial: Tensor) -> Tensor:
        loss = super().loss(network, batch, adversarial)
        return 2 * loss.detach() - loss


SOUND = [Sound, SoundClean]

CASES = [
    Case(KIND, NoViews, "views-and-head", "views is 0"),
    Case(KIND, UnknownHead, "views-and-head", "head is 'linear'"),
    Case(KIND, OneClassMore, "builds-network", "5 classes, not 4"),
    Case(KIND, CopiesEncoder, "builds-network", "another encoder"),
    Case(KIND, ForgetsNormalisation, "builds-network", "normalises with mean (0.0,)"),
    Case(KIND, OtherLogits, "builds-network", "would answer otherwise"),
    Case(KIND, LossOfEveryImage, "loss", "no scalar"),
    Case(KIND, DetachedLoss, "loss", "no graph"),
    Case(
        KIND,
        DividesByViews,
        "loss",
        "the loss is nan with 0 adversarial views",
        also=frozenset({"lonely-classes"}),
    ),
    Case(KIND, MetricIsNaN, "metrics", "'brightness' is nan"),
    Case(KIND, MetricIsVector, "metrics", "'labels' is Tensor"),
    Case(KIND, ForgetsEncoder, "gradients-reach-encoder", "no gradient reaches the encoder"),
    Case(KIND, ForgetsClassifier, "gradients-reach-classifier", "head is 'joint'"),
    Case(KIND, IgnoresAdversarial, "adversarial-views-matter", "ignores the adversarial views"),
    Case(KIND, WritesViews, "batch-untouched", "wrote into views"),
    Case(KIND, SwitchesToEval, "network-left-to-core", "train/eval mode"),
    Case(KIND, CallsBackward, "network-left-to-core", "the gradient of"),
    Case(KIND, MixesUp, "global-state", "torch's global random state"),
    Case(KIND, KeepsQueue, "deterministic", "after another step"),
    Case(KIND, SpreadOfOneImage, "lonely-classes", "in which one class appears once the loss is nan"),
    Case(KIND, RootOfZero, "lonely-classes", "is NaN or infinite"),
    Case(KIND, Unlearns, "learns", "the loss went from"),
]
