"""The general contrastive trainer: one weighted multi-view loss, and the terms that are added to it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.losses import Contrast, kl, margin, multiview
from scl_defense.models import Network
from scl_defense.types import Batch, Field, StepOutput, component

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False, description="temperature of the contrastive loss")]
Positives = Annotated[
    Literal["class", "instance"], Field(description="positives: views of the same class, or of the same image")
]
Pool = Annotated[
    Literal["together", "separate", "adv", "cross"],
    Field(
        description="views that meet in a denominator: all; clean and adv apart (mean of both); adv alone; adv view 0 "
        "with clean view 1"
    ),
]
Stop = Annotated[
    Literal["none", "keys", "clean", "adv"],
    Field(description="constants: none; every key; clean keys of adv anchors; adv keys of clean anchors"),
]
CleanWeight = Annotated[Weight, Field(description="weight of CE on the clean views")]
AdvWeight = Annotated[Weight, Field(description="weight of CE on the adversarial views")]
MarginWeight = Annotated[Weight, Field(description="weight of the margin loss over all views")]
KLWeight = Annotated[Weight, Field(description="weight of the KL between adversarial and clean output")]
Head = Annotated[Literal["joint", "probe"], Field(description="classifier: trained along, or a linear probe after")]
BatchNorm = Annotated[
    Literal["shared", "dual"], Field(description="batch norm: one for all, or one for clean and one for adv views")
]
Terms = list[tuple[float, Contrast]]


@component
class MultiView:
    """Contrastive learning over clean and adversarial views, with every published switch as an option::

        L = contrast * L_con + ce_clean * CE(clean) + ce_adv * CE(adv) + margin * L_margin + kl * KL

    L_con is :func:`scl_defense.losses.multiview` over the views ``clean:0``, ``clean:1`` and ``adv:0``, ...; the named
    methods (``supcon``, ``rocl``, ``acl``, ...) are this trainer with other defaults. With ``head=probe`` the
    contrastive term trains the encoder alone and a linear classifier is fitted on its frozen features (the other
    terms but the margin are then unused). KL is between the outputs on the adversarial and clean view 0, ....
    """

    views: ClassVar[int] = 2
    by_row: ClassVar[bool] = True

    contrast: Annotated[Weight, Field(description="weight of the contrastive loss")] = 1.0
    temperature: Temperature = 0.1
    positives: Positives = "class"
    pool: Pool = "together"
    clean_adv: Annotated[Weight, Field(description="weight of positive pairs of a clean and an adversarial view")] = 1.0
    stop: Stop = "none"
    inferior: Annotated[
        float | None,
        Field(ge=0, le=1, description="A-InfoNCE: adversarials as inferior positives; share of the pull on them"),
    ] = None
    select: Annotated[Literal["all", "hard", "soft", "leaked"], Field(description="negatives by prediction (ASCL)")] = (
        "all"
    )
    beta: Annotated[Weight, Field(description="hardness of the negatives' weights (A-InfoNCE; 0: alike)")] = 0.0
    tau_plus: Annotated[float, Field(ge=0, lt=1, description="assumed share of false negatives")] = 0.0
    ce_clean: CleanWeight = 1.0
    ce_adv: AdvWeight = 1.0
    margin: MarginWeight = 0.0
    gap: Annotated[float, Field(gt=0, le=2, description="distance that the margin loss asks of two classes")] = 1.0
    kl: KLWeight = 0.0
    kl_from: Annotated[
        Literal["adv", "clean"], Field(description="its first argument: KL(adv || clean) or KL(clean || adv)")
    ] = "adv"
    head: Head = "joint"
    bn: BatchNorm = "shared"
    hidden: Annotated[int, Field(ge=1, description="hidden width of the projector")] = 128
    dim: Annotated[int, Field(ge=1, description="output width of the projector")] = 64

    def build(self, encoder: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Network:
        projection = (self.hidden, self.dim)
        return Network(encoder, num_classes, mean, std, projection=projection, dual=self.bn == "dual")

    def terms(self, adversarial: int) -> Terms:
        """The weighted contrastive terms for so many adversarial views; a preset may have its own."""
        both = frozenset({("clean", "clean"), ("clean", "adv"), ("adv", "clean"), ("adv", "adv")})
        stop = {"none": frozenset(), "keys": both, "clean": {("adv", "clean")}, "adv": {("clean", "adv")}}[self.stop]
        across = (("clean", "adv"), ("adv", "clean"))
        whole = Contrast(
            positives=self.positives,
            temperature=self.temperature,
            weights={} if self.clean_adv == 1 else dict.fromkeys(across, self.clean_adv),
            stop=frozenset(stop),
            select=self.select,
            beta=self.beta,
            tau_plus=self.tau_plus,
        )
        if not adversarial:
            return [(1.0, whole)]
        if self.inferior is not None:
            # Yu et al. 2022: the clean view is not drawn to the adversarial one as strongly as the other way round.
            apart = dict.fromkeys(across, 0.0)
            alone = {("clean", "clean"): 0.0, ("adv", "adv"): 0.0}
            pulls = (("adv", "clean", self.inferior), ("clean", "adv", 1 - self.inferior))
            return [(1.0, replace(whole, weights=apart))] + [
                (self.clean_adv * share, replace(whole, anchors=(mine,), weights=alone, stop=frozenset({(mine, key)})))
                for mine, key, share in pulls
            ]
        clean, cross = replace(whole, views=("clean",)), replace(whole, views=("adv:0", "clean:1"))
        adv = replace(whole, views=("adv",)) if adversarial > 1 else cross  # a lone adversarial view has no partner
        return {
            "together": [(1.0, whole)],
            "separate": [(0.5, clean), (0.5, adv)],
            "adv": [(1.0, adv)],
            "cross": [(1.0, cross)],
        }[self.pool]

    def clean_weight(self, adversarial: int) -> float:
        """Weight of CE on the clean views beside so many adversarial ones; a preset may have its own."""
        return self.ce_clean

    def step(self, network: Network, batch: Batch, adversarial: Tensor) -> StepOutput:
        ce_clean = self.clean_weight(len(adversarial))
        if self.head == "joint" and not ce_clean and not (self.ce_adv and len(adversarial)):
            raise UserError(
                "this trainer with head=joint would never train its classifier: both cross-entropy terms are off; "
                "set ce_clean above 0, or head=probe"
            )
        if self.contrast and len(batch.labels) < 2:
            raise UserError("a contrastive loss needs at least 2 images a batch: with one there is no negative")
        features = _features(network, batch.views, adversarial)
        embed, logits = network.projector(features), network.classifier(features).float()
        shape = (len(features) // len(batch.labels), len(batch.labels), -1)
        embed, logits = embed.view(shape), logits.view(shape)
        clean, count = len(batch.views), len(adversarial)
        roles = [*(f"clean:{view}" for view in range(clean)), *(f"adv:{view}" for view in range(count))]
        terms = self.terms(count)
        predictions = logits.detach().argmax(2) if self.select != "all" else None
        contrast = sum(
            weight * multiview(embed, roles, batch.labels, term, predictions=predictions) for weight, term in terms
        )
        loss, metrics = self.contrast * contrast, {"contrast": contrast.detach()}
        labels = batch.labels.repeat(len(roles))
        if self.margin:
            pushed = margin(embed.flatten(0, 1), labels, self.gap)
            loss, metrics["margin"] = loss + self.margin * pushed, pushed.detach()
        if self.head == "joint":
            each = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(len(roles), -1)
            loss = loss + ce_clean * each[:clean].mean()
            metrics["ce_clean"] = each[:clean].detach().mean()
            if count:
                loss = loss + self.ce_adv * each[clean:].mean()
                metrics["ce_adv"] = each[clean:].detach().mean()
                if self.kl:
                    partners = logits[torch.arange(count, device=logits.device) % clean].flatten(0, 1)
                    pair = (logits[clean:].flatten(0, 1), partners)
                    smooth = kl(*(pair if self.kl_from == "adv" else pair[::-1])).mean()
                    loss, metrics["kl"] = loss + self.kl * smooth, smooth.detach()
        return StepOutput(loss, metrics)


def _features(network: Network, views: Tensor, adversarial: Tensor) -> Tensor:
    """((V + A) N, D), clean views first. One pass, so that batch norm sees all views; with two branches, two.

    Without adversarial views the clean ones train the adversarial branch: it is the one that is exported.
    """
    if len(network.branches) == 1 or not len(adversarial):
        return network.features(torch.cat([views, adversarial]).flatten(0, 1))
    with network.branch("clean"):
        features = network.features(views.flatten(0, 1))
    return torch.cat([features, network.features(adversarial.flatten(0, 1))])
