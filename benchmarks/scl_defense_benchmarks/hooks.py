"""What the benchmark layer registers. Targets are strings: listing them imports neither torch nor a library."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scl_defense import hookimpl
from scl_defense.hookspecs import Register

if TYPE_CHECKING:
    from scl_defense.checkpoint import LoadedClassifier

_HERE = "scl_defense_benchmarks"


@hookimpl
def register_attacks(register: Register) -> None:
    torchattacks, art, native = (f"{_HERE}.{name}" for name in ("torchattacks_adapter", "art_adapter", "native"))
    for name, target, summary in (
        ("apgd-ce", "APGDCE", "Auto-PGD on cross-entropy, Linf or L2, 100 steps"),
        ("apgd-dlr", "APGDDLR", "Auto-PGD on the DLR loss, Linf or L2, 100 steps, 3 classes or more"),
        ("apgd-t", "APGDT", "Auto-PGD on the targeted DLR loss, 9 classes in turn, 4 classes or more"),
        ("fab-t", "FAB", "targeted FAB, smallest Linf or L2, 9 classes in turn"),
        ("square", "Square", "Square Attack, Linf or L2, 5000 queries, no gradient"),
        ("deepfool", "DeepFool", "DeepFool with a last overshoot, smallest L2"),
        ("mifgsm", "MIFGSM", "momentum iterative FGSM, Linf, 10 steps"),
        ("eot", "EOT", "Auto-PGD on the mean of 20 gradients, for random networks, Linf or L2"),
        ("sparsefool", "SparseFool", "SparseFool, few pixels, smallest L0"),
        ("onepixel", "OnePixel", "one-pixel attack, as many pixels as the L0 ball has, no gradient"),
        ("pixle", "Pixle", "Pixle, pixels moved about, L0, square images, no gradient"),
    ):
        for prefix, of in (("", f" (this is torchattacks:{name})"), ("torchattacks:", " (torchattacks)")):
            register(prefix + name, f"{torchattacks}:{target}", summary=summary + of)
    for name, target, summary in (
        ("ead", "EAD", "elastic-net attack, smallest L1 (slow)"),
        ("jsma", "JSMA", "saliency-map attack, smallest L0"),
        ("simba", "Simba", "SimBA, smallest L2, two queries a pixel, no gradient"),
        ("hsj", "HSJ", "HopSkipJump, smallest L2 or Linf, from labels alone"),
        ("boundary", "Boundary", "boundary attack, smallest L2, from labels alone"),
        ("spatial", "Spatial", "rotations and shifts, the worst of a grid; in no norm"),
    ):
        for prefix, of in (("", f" (this is art:{name})"), ("art:", " (ART)")):
            register(prefix + name, f"{art}:{target}", summary=summary + of)
    register("transfer", f"{_HERE}.transfer:Transfer", summary="MI-, DI-, TI-, VMI-FGSM made on another network, Linf")
    register("apgd-l1", f"{_HERE}.apgd_l1:APGDL1", summary="Auto-PGD in the L1 ball and the box, 100 steps, our own")
    register("autoattack", f"{_HERE}.autoattack:AutoAttack", summary="apgd-ce, apgd-t, fab-t, square on what is left")
    register("fgsm", f"{torchattacks}:FGSM", summary="recommended FGSM, Linf, one step (this is torchattacks:fgsm)")
    register("pgd", f"{torchattacks}:PGD", summary="recommended PGD, Linf or L2, 20 steps (this is torchattacks:pgd)")
    register("cw", f"{torchattacks}:CW", summary="recommended Carlini-Wagner, smallest L2 (this is torchattacks:cw)")
    register("torchattacks:fgsm", f"{torchattacks}:FGSM", summary="FGSM of torchattacks, Linf, one step")
    register("torchattacks:pgd", f"{torchattacks}:PGD", summary="PGD and PGDL2 of torchattacks, Linf or L2")
    register("torchattacks:cw", f"{torchattacks}:CW", summary="CW of torchattacks, smallest L2, best of several c")
    register("art:fgsm", f"{art}:FGSM", summary="FastGradientMethod of ART, Linf, one step")
    register("art:pgd", f"{art}:PGD", summary="ProjectedGradientDescent of ART, Linf or L2")
    register("art:cw", f"{art}:CW", summary="CarliniL2Method of ART, smallest L2, binary search over c (slow)")
    register("native:fgsm", f"{native}:FGSM", summary="our own FGSM, Linf, one step of the common ascent loop")
    register("native:pgd", f"{native}:PGD", summary="our own PGD, Linf, L2 or L1, cross-entropy or margin loss")
    register("pgd-min", f"{_HERE}.pgd_min:PGDMin", summary="smallest radius of a PGD, Linf, L2, L1: a curve at once")
    register("noise", f"{native}:Noise", summary="control: worst of several random points of the ball, no gradient")


@hookimpl
def load_checkpoint(path: Path, options: dict[str, Any]) -> "LoadedClassifier | None":
    from scl_defense_benchmarks.foreign import load_foreign

    return load_foreign(path, options)
