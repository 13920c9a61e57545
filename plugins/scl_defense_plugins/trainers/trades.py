"""TRADES."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.losses import kl
from scl_defense.models import Network
from scl_defense.types import Batch, Field, StepOutput, component


@component
class TRADES:
    """Trade-off between accuracy and robustness (Zhang et al. 2019, eq. 5)::

        L = CE(p(x), y) + beta * KL( p(x) || p(a) )

    a maximises that KL from x + 0.001 N(0, I): generator ``pgd -g loss=kl``, its usual one.
    """

    views: ClassVar[int] = 1
    by_row: ClassVar[bool] = True
    head: ClassVar[str] = "joint"
    usual: ClassVar[tuple[str, dict[str, Any]]] = ("pgd", {"loss": "kl"})

    beta: Annotated[float, Field(ge=0, allow_inf_nan=False, description="weight of the KL")] = 6.0

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(encoder, num_classes, mean, std)

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        # Two passes, as in the published code: clean and adversarial images have batch statistics of their own.
        logits = network(batch.views[0]).float()
        loss = F.cross_entropy(logits, batch.labels)
        metrics = {"ce_clean": loss.detach()}
        if len(adversarial):
            attacked = network(adversarial.flatten(0, 1)).float()
            smooth = kl(logits.repeat(len(adversarial), 1), attacked).mean()
            loss, metrics["kl"] = loss + self.beta * smooth, smooth.detach()
        return StepOutput(loss, metrics)
