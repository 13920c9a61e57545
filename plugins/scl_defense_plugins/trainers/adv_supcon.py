"""The proposal: supervised contrastive learning whose positives include adversarial examples."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.losses import supcon
from scl_defense.models import Network
from scl_defense.types import Batch, Field, StepOutput, component


@component
class AdvSupCon:
    """SupCon over clean and adversarial views, plus cross-entropy on both::

        L = contrast * SupCon({clean views, adversarial views}; same class = positive)
            + ce_clean * CE(clean views) + ce_adv * CE(adversarial views)

    SupCon is the L_out form of Khosla et al. 2020. Without adversarial views it is SupCon + CE trained jointly. With
    ``ce_adv=0`` the adversarial views enter as positives alone. ``head=probe`` is the two-stage form: the contrastive
    term trains the encoder, and a linear classifier is fitted on the frozen features (``ce_*`` are then unused).
    """

    views: ClassVar[int] = 2

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False, description="temperature of SupCon")] = 0.1
    contrast: Annotated[float, Field(ge=0, allow_inf_nan=False, description="weight of SupCon")] = 1.0
    ce_clean: Annotated[float, Field(ge=0, allow_inf_nan=False, description="weight of CE on the clean views")] = 1.0
    ce_adv: Annotated[float, Field(ge=0, allow_inf_nan=False, description="weight of CE on the adversarial views")] = (
        1.0
    )
    head: Annotated[
        Literal["joint", "probe"], Field(description="classifier: trained along, or a linear probe after")
    ] = "joint"
    hidden: Annotated[int, Field(ge=1, description="hidden width of the projector")] = 128
    dim: Annotated[int, Field(ge=1, description="output width of the projector")] = 64

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        return Network(encoder, num_classes, mean, std, projection=(self.hidden, self.dim))

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        if self.head == "joint" and not self.ce_clean and not (self.ce_adv and len(adversarial)):
            raise UserError(
                "trainer 'adv-supcon' with head=joint would never train its classifier: both cross-entropy terms are "
                "off; set ce_clean above 0, or head=probe"
            )
        images = torch.cat([batch.views, adversarial])
        features = network.features(images.flatten(0, 1))
        labels = batch.labels.repeat(len(images))
        contrast = supcon(network.projector(features), labels, self.temperature)
        loss, metrics = self.contrast * contrast, {"supcon": contrast.detach()}
        if self.head == "joint":
            cross_entropy = F.cross_entropy(network.classifier(features).float(), labels, reduction="none")
            clean, attacked = cross_entropy.split(
                [len(batch.views) * len(batch.labels), len(adversarial) * len(batch.labels)]
            )
            loss = loss + self.ce_clean * clean.mean()
            metrics["ce_clean"] = clean.detach().mean()
            if len(adversarial):
                loss = loss + self.ce_adv * attacked.mean()
                metrics["ce_adv"] = attacked.detach().mean()
        return StepOutput(loss, metrics)
