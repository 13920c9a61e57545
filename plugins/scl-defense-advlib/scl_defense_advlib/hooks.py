"""What this distribution adds. Imported by every scl-defense command, so nothing heavy is imported here."""

from scl_defense import hookimpl
from scl_defense.hookspecs import Register

ATTACKS = (
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
    for name, target, summary in ATTACKS:
        register(f"advlib:{name}", f"scl_defense_advlib.attacks:{target}", summary=summary)
