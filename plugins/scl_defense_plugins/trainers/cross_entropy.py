"""The plain baseline."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.models import Network
from scl_defense.types import Batch, Field, StepOutput, component


@component
class CrossEntropy:
    """Cross-entropy on the clean view, or on the adversarial views when the generator makes any.

    With generator ``pgd`` it is the adversarial training of Madry et al. 2018; with ``pgd -g steps=1`` FGSM-RS
    (Wong et al. 2020). ``ce_clean`` mixes the clean loss in beside the adversarial one; the mix alone moves robust
    accuracy by points, so compare methods at equal mix.
    """

    views: ClassVar[int] = 1
    by_row: ClassVar[bool] = True
    head: ClassVar[str] = "joint"

    ce_clean: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="weight of the clean loss beside the adversarial one")
    ] = 0.0

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(encoder, num_classes, mean, std)

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        if not len(adversarial):
            loss = F.cross_entropy(network(batch.views[0]).float(), batch.labels)
            return StepOutput(loss, {"ce_clean": loss.detach()})
        logits = network(adversarial.flatten(0, 1)).float()
        loss = F.cross_entropy(logits, batch.labels.repeat(len(adversarial)))
        metrics = {"ce_adv": loss.detach()}
        if self.ce_clean:
            clean = F.cross_entropy(network(batch.views[0]).float(), batch.labels)
            loss, metrics["ce_clean"] = loss + self.ce_clean * clean, clean.detach()
        return StepOutput(loss, metrics)
