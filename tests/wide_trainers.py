"""Trainers whose network computes in float64, where a rounding must not decide; also used as a plugin."""

from scl_defense_plugins.trainers.cross_entropy import CrossEntropy
from scl_defense_plugins.trainers.presets import ACL, AdvSupCon, SupCon

from scl_defense import hookimpl
from scl_defense.types import component, replace


def _wide(trainer):
    def build(self, encoder, num_classes, mean, std):
        return trainer.build(self, encoder, num_classes, mean, std).double()

    return component(type(f"Wide{trainer.__name__}", (trainer,), {"build": build, "__module__": __name__}))


WideSupCon, WideAdvSupCon, WideACL, WideCrossEntropy = map(_wide, (SupCon, AdvSupCon, ACL, CrossEntropy))


@component
class WideUnsplit(WideAdvSupCon):
    """One that has to see all images: it mixes every image with its neighbour before the network does."""

    by_row = False

    def step(self, network, batch, adversarial):
        mixed = 0.7 * batch.views + 0.3 * batch.views.roll(1, dims=1)
        return WideAdvSupCon.step(self, network, replace(batch, views=mixed), adversarial)


@hookimpl
def register_trainers(register):
    register("wide-supcon", WideSupCon, summary="SupCon in float64")
    register("wide-adv-supcon", WideAdvSupCon, summary="AdvSupCon in float64")
    register("wide-unsplit", WideUnsplit, summary="AdvSupCon in float64 on mixed images")
    register("wide-acl", WideACL, summary="ACL in float64")
    register("wide-cross-entropy", WideCrossEntropy, summary="cross-entropy in float64")
