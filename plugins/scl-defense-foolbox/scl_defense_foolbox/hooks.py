"""What this distribution adds. Imported by every scl-defense command, so nothing heavy is imported here."""

from scl_defense import hookimpl
from scl_defense.hookspecs import Register

ATTACKS = (
    ("fgsm", "FGSM", "FGSM, Linf, one step"),
    ("pgd", "PGD", "LinfPGD and L2PGD"),
    ("cw", "CW", "Carlini-Wagner, smallest L2"),
    ("deepfool", "DeepFool", "DeepFool, smallest L2"),
    ("ead", "EAD", "elastic-net attack, smallest L1"),
)


@hookimpl
def register_attacks(register: Register) -> None:
    for name, target, summary in ATTACKS:
        register(f"foolbox:{name}", f"scl_defense_foolbox.attacks:{target}", summary=summary)
