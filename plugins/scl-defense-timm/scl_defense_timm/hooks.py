"""What this distribution adds. Imported by every scl-defense command, so nothing heavy is imported here."""

from scl_defense import hookimpl
from scl_defense.hookspecs import Register


@hookimpl
def register_models(register: Register) -> None:
    register(
        "timm", "scl_defense_timm.encoder:TimmEncoder", summary="any network of timm by its name, without its head"
    )
