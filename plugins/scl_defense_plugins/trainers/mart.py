"""MART."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.losses import kl
from scl_defense.models import Network
from scl_defense.types import Batch, Field, StepOutput, component


@component
class MART:
    """Misclassification-aware adversarial training (Wang et al. 2020, eq. 11)::

        L = BCE(p(a), y) + beta * mean_i KL( p(x_i) || p(a_i) ) * (1 - p_y(x_i))
        BCE(p, y) = -log p_y - log( 1 - max_{k != y} p_k )

    a maximises cross-entropy: generator ``pgd``, its usual one, from x + 0.001 N(0, I).
    """

    views: ClassVar[int] = 1
    by_row: ClassVar[bool] = True
    head: ClassVar[str] = "joint"
    usual: ClassVar[tuple[str, dict[str, Any]]] = ("pgd", {"start": "gaussian"})

    beta: Annotated[float, Field(ge=0, allow_inf_nan=False, description="weight of the KL")] = 5.0

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(encoder, num_classes, mean, std)

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        logits = network(batch.views[0]).float()
        if not len(adversarial):
            loss = boosted_cross_entropy(logits, batch.labels)
            return StepOutput(loss, {"bce": loss.detach()})
        attacked = network(adversarial.flatten(0, 1)).float()
        labels = batch.labels.repeat(len(adversarial))
        logits = logits.repeat(len(adversarial), 1)
        loss = boosted_cross_entropy(attacked, labels)
        unsure = 1 - F.softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
        smooth = (kl(logits, attacked) * unsure).mean()
        return StepOutput(loss + self.beta * smooth, {"bce": loss.detach(), "kl": smooth.detach()})


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """mean of -log p_y - log(1 - max_{k != y} p_k). logits: (N, K); labels: (N,)."""
    log_p = F.log_softmax(logits, dim=1)
    others = log_p.scatter(1, labels[:, None], -torch.inf)
    # 1 - p_k as the sum of all other probabilities: 1 - exp(log p) would be 0 in float32 where p_k is near 1.
    runner_up = others.argmax(1)
    rest = log_p.scatter(1, runner_up[:, None], -torch.inf).logsumexp(1)
    return (-log_p.gather(1, labels[:, None]).squeeze(1) - rest).mean()
