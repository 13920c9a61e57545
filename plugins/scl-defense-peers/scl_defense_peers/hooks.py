"""What this distribution adds. Imported by every scl-defense command, so nothing heavy is imported here."""

from scl_defense import hookimpl
from scl_defense.hookspecs import Register

FOOLBOX = (
    ("fgsm", "FGSM", "FGSM, Linf, one step"),
    ("pgd", "PGD", "LinfPGD and L2PGD"),
    ("cw", "CW", "Carlini-Wagner, smallest L2"),
    ("deepfool", "DeepFool", "DeepFool, smallest L2"),
    ("ead", "EAD", "elastic-net attack, smallest L1"),
)
ADVLIB = (
    ("cw", "CW", "Carlini-Wagner, smallest L2"),
    ("ddn", "DDN", "decoupled direction and norm, smallest L2"),
    ("deepfool", "DeepFool", "DeepFool, smallest L2"),
    ("fmn", "FMN", "fast minimum norm, smallest Linf, L2 or L1"),
    ("fab", "FAB", "fast adaptive boundary, smallest Linf, L2 or L1"),
    ("apgd-l1", "APGDL1", "Auto-PGD in the L1 ball"),
    ("sigma-zero", "SigmaZero", "sigma-zero, smallest L0"),
)


@hookimpl
def register_attacks(register: Register) -> None:
    for library, attacks in (("foolbox", FOOLBOX), ("advlib", ADVLIB)):
        for name, target, summary in attacks:
            register(f"{library}:{name}", f"scl_defense_peers.{library}_attacks:{target}", summary=summary)
