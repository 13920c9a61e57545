"""A linear classifier on a frozen encoder."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.models import Network
from scl_defense.types import Batch, Field, StepOutput, component


@component
class Linear:
    """The frozen-encoder protocols of RobustSSL: cross-entropy of the classifier alone, the encoder stays as it is.

    Without adversarial views and with ``head=probe`` it is SLF (the head is solved to convergence); with generator
    ``pgd`` it is ALF (Jiang et al. 2020): the head is trained on adversarial examples of the whole network. Give the
    encoder with ``--init CKPT``; ``scl-defense finetune`` is the recipe.
    """

    views: ClassVar[int] = 1
    by_row: ClassVar[bool] = True
    frozen_encoder: ClassVar[bool] = True

    head: Annotated[
        Literal["joint", "probe"], Field(description="train the head step by step, or solve it on clean features")
    ] = "joint"

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(encoder, num_classes, mean, std)

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        images = adversarial if len(adversarial) else batch.views[:1]
        with torch.no_grad():
            features = network.features(images.flatten(0, 1))
        loss = F.cross_entropy(network.classifier(features).float(), batch.labels.repeat(len(images)))
        return StepOutput(loss, {"ce_adv" if len(adversarial) else "ce_clean": loss.detach()})
