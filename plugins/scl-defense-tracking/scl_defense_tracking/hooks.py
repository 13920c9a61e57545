"""What this distribution adds. Imported by every scl-defense command, so nothing heavy is imported here."""

from scl_defense import hookimpl
from scl_defense.hookspecs import Register


@hookimpl
def register_loggers(register: Register) -> None:
    register("mlflow", "scl_defense_tracking.with_mlflow:MLflow", summary="records in MLflow, one of its runs a run")
    register("wandb", "scl_defense_tracking.with_wandb:WandB", summary="records in Weights & Biases, also offline")
