"""The published contrastive methods: each is :class:`MultiView` with other defaults, its paper and its equation.

``usual`` names the generator (and its options) that belongs to the method; ``--generator`` puts another in its place.
Every option of the general trainer remains an option of the preset. NTXent and SupCon are the losses of
:mod:`scl_defense.losses`; t1, t2 are the augmented views of an image and a1, a2 adversarial views around them.
"""

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from scl_defense.types import Field, component
from scl_defense_plugins.trainers.multiview import (
    AdvWeight,
    BatchNorm,
    CleanWeight,
    Head,
    KLWeight,
    MarginWeight,
    MultiView,
    Pool,
    Positives,
    Stop,
    Temperature,
    Terms,
    Weight,
)

Usual = ClassVar[tuple[str, dict[str, Any]]]


@component
class SimCLR(MultiView):
    """SimCLR (Chen et al. 2020, eq. 1): L = NTXent(t1, t2), temperature 0.5, linear probe on the frozen encoder."""

    usual: Usual = ("none", {})
    positives: Positives = "instance"
    temperature: Temperature = 0.5
    head: Head = "probe"


@component
class SupCon(MultiView):
    """Supervised contrastive learning (Khosla et al. 2020, eq. 2): L = SupCon(t1, t2; y), then a linear probe."""

    usual: Usual = ("none", {})
    head: Head = "probe"


@component
class AdvSupCon(MultiView):
    """The proposal: supervised contrastive learning whose positives include adversarial examples::

        L = contrast * SupCon({t1, t2, a1}; same class = positive) + ce_clean * CE(t1, t2) + ce_adv * CE(a1)

    Without adversarial views it is SupCon + CE trained jointly. With ``ce_adv=0`` the adversarial views enter as
    positives alone. ``head=probe`` is the two-stage form.
    """


@component
class RoCL(MultiView):
    """Robust contrastive learning (Kim, Tack & Hwang 2020), label-free, in the form of its released code::

        L = NTXent3(t1, t2, a1) + (1 / regularizer) * NTXent(a1, t2),     regularizer = 256, temperature 0.5

    NTXent3 sums -log p over the two positives of each of the 3N anchors (hence the factor 2 on our mean), and the
    second factor of every similarity is a constant (``stop=keys``). a1 maximises NTXent(a1, t2) of the encoder in
    training, all adversarials of the batch jointly: 7 steps. Linear probe on the frozen encoder.
    """

    usual: Usual = ("contrastive-pgd-online", {"objective": "ntxent-joint", "steps": 7})
    positives: Positives = "instance"
    temperature: Temperature = 0.5
    stop: Stop = "keys"
    head: Head = "probe"
    regularizer: Annotated[float, Field(gt=0, allow_inf_nan=False, description="divides NTXent(a1, t2)")] = 256.0

    def terms(self, adversarial: int) -> Terms:
        (share, whole), *rest = MultiView.terms(self, adversarial)
        if not adversarial:
            return [(share, whole), *rest]
        extra = replace(whole, views=("adv:0", "clean:1"))
        return [(2.0 * share, whole), *rest, (1 / self.regularizer, extra)]


@component
class ACL(MultiView):
    """Adversarial contrastive learning, dual stream (Jiang et al. 2020, ACL(DS)), label-free::

        L = 1/2 [ NTXent(t1, t2; clean batch norm) + NTXent(a1, a2; adversarial batch norm) ],   temperature 0.5

    (a1, a2) jointly maximise NTXent(a1, a2) of the adversarial branch, which is the one that is kept: 5 steps.
    ``pool=adv`` is A2A; one adversarial view (``-g views=1``) with ``pool=cross`` is A2S. Linear probe.
    """

    usual: Usual = ("contrastive-pgd-online", {"objective": "ntxent-joint", "views": 2, "steps": 5})
    positives: Positives = "instance"
    temperature: Temperature = 0.5
    pool: Pool = "separate"
    bn: BatchNorm = "dual"
    head: Head = "probe"


@component
class CLAE(MultiView):
    """Contrastive learning with adversarial examples (Ho & Vasconcelos 2020), label-free, made for clean accuracy::

        L = NTXent(t1, t2) + alpha * NTXent(t1, a1; batch norm of its own),     alpha = 1, temperature 0.5

    a1 is one step of full length eps on NTXent around t1. The paper starts that step at t1 with t1 itself as
    reference; here it starts at a random point with t2 as reference, because the alignment term vanishes there.
    """

    usual: Usual = ("contrastive-pgd-online", {"objective": "ntxent-joint", "steps": 1, "rel_step": 1.0})
    positives: Positives = "instance"
    temperature: Temperature = 0.5
    bn: BatchNorm = "dual"
    head: Head = "probe"
    alpha: Annotated[Weight, Field(description="weight of NTXent(t1, a1)")] = 1.0

    def terms(self, adversarial: int) -> Terms:
        (share, whole), *rest = MultiView.terms(self, adversarial)
        if not adversarial:
            return [(share, whole), *rest]
        clean, mixed = replace(whole, views=("clean",)), replace(whole, views=("clean:0", "adv:0"))
        return [(share, clean), *rest, (self.alpha, mixed)]


@component
class ASCL(MultiView):
    """Adversarial supervised contrastive learning (Bui et al. 2021), in the form of its released command::

        L = CE(a) + contrast * SCL({t1, t2, a1, a2}; y) + 2 * KL(p(a) || p(t)),     temperature 0.2

    a1, a2 maximise cross-entropy (``pgd``, 10 steps). ``select=hard | soft | leaked`` are its local selections.
    Without adversarial views the clean ones bear the cross-entropy.
    """

    usual: Usual = ("pgd", {"views": 2})
    temperature: Temperature = 0.2
    ce_clean: CleanWeight = 0.0
    kl: KLWeight = 2.0

    def clean_weight(self, adversarial: int) -> float:
        return self.ce_clean if adversarial else max(self.ce_clean, self.ce_adv)


@component
class WangSCL(MultiView):
    """SCL of Wang, Nayyem & Rakin 2024 (arXiv 2412.19747), re-implemented from the description::

        L = SupCon(t1, t2; y) + CE(t1, t2)

    Trained on clean images. The paper gives no temperature, weights or schedule and has no public code: no parity of
    numbers is claimed.
    """

    usual: Usual = ("none", {})
    ce_adv: AdvWeight = 0.0


@component
class WangSCLMargin(MultiView):
    """SCL with margin of Wang, Nayyem & Rakin 2024 (arXiv 2412.19747), re-implemented from the description::

        L = SupCon(t1, t2; y) + CE(t1, t2) + margin * L_margin(t1, t2; y)

    L_margin after Hadsell et al. 2006, eq. 4, on unit-length embeddings. The paper's margin formula, its size and its
    weight are not public: no parity of numbers is claimed.
    """

    usual: Usual = ("none", {})
    ce_adv: AdvWeight = 0.0
    margin: MarginWeight = 1.0
