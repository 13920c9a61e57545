"""The batch size of an evaluation reaches no verdict: asked of every family of attacks, of every library."""

import pytest
from scl_defense_benchmarks.battery import plan_attacks
from scl_defense_benchmarks.evaluate import evaluate

from scl_defense.threat import ThreatModel

LINF = ThreatModel("linf", "0.1")
FAMILIES = {  # what is short enough; what goes image by image is in test_evaluate.py
    "one step": ("native:fgsm", "torchattacks:fgsm", "art:fgsm"),
    "steps": ("native:pgd:steps=3", "torchattacks:pgd:steps=3", "art:pgd:steps=3", "mifgsm:steps=3"),
    "another loss": ("native:pgd:steps=3:loss=margin", "eot:steps=2:draws=2"),
    "random": ("noise:draws=3",),
    "adaptive": ("apgd-ce:steps=5", "apgd-dlr:steps=5", "apgd-t:steps=5:targets=2", "apgd-l1:norm=l1:eps=3:steps=5"),
    "smallest": ("cw:steps=10:c=1:norm=l2:eps=1", "deepfool:steps=5:norm=l2:eps=1", "fab-t:steps=5:targets=2"),
    "smallest, of ART": ("art:cw:steps=5:binary_search_steps=2:norm=l2:eps=1",
                         "ead:steps=5:binary_search_steps=2:norm=l1:eps=3"),
    "pixels": ("jsma:norm=l0:eps=8", "sparsefool:steps=3:norm=l0:eps=8"),
    "queries": ("square:queries=30",),
}  # fmt: skip


def test_the_random_starts_of_art_do_not_know_it_either(network, digit_images, host):
    """Drawn from NumPy by the library. One step of little length: where an example ends is where it began."""
    for attack in ("art:pgd:steps=1:rel_step=0.01", "art:pgd:steps=1:rel_step=0.01:norm=l2:eps=1"):
        plan = plan_attacks(attack, host=host, threat=LINF)
        whole, parts = (evaluate(network, *digit_images, plan, seed=0, batch_size=size) for size in (128, 33))
        (one,), (other,) = whole.attacks, parts.attacks
        assert one.distances == pytest.approx(other.distances, abs=1e-6)
        assert len({round(value, 5) for value in one.distances if value}) > 50  # the starts do differ


@pytest.mark.faults
@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_size_reaches_no_verdict(family, network, digit_images, host):
    asked(",".join(FAMILIES[family]), network, digit_images, host)


def asked(attacks, network, digit_images, host):
    images, labels = digit_images[0][:12], digit_images[1][:12]
    plan = plan_attacks(attacks, host=host, threat=LINF)
    whole, parts = (evaluate(network, images, labels, plan, seed=0, batch_size=size) for size in (128, 5))
    assert len(whole.attacks) == attacks.count(",") + 1
    for one, other in zip(whole.attacks, parts.attacks, strict=True):
        assert one.status != "failed", one.note
        seen, again = ((row.outcomes, row.predictions) for row in (one, other))
        assert seen == again, one.label
