"""Training records in Weights & Biases."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from scl_defense.types import Field, component
from scl_defense_tracking.common import Guarded, imported, keep, opened, recalled

NAME = "wandb.json"


@component
class WandB:
    """One W&B run a run: the recipe as its config, every number of an epoch at that step.

    ``WANDB_MODE=offline`` writes into the run's folder, for ``wandb sync`` later. Opened again it goes on in the run
    that the folder names; a run of W&B only grows, so of an epoch that is done twice the first record stays.
    """

    project: Annotated[str, Field(description="its project; empty: WANDB_PROJECT, or scl-defense")] = ""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Guarded:
        wandb = imported("wandb")
        kept = recalled(run_dir / NAME) if epoch else {}
        id = str(kept.get("id") or secrets.token_hex(4))
        last = int(kept.get("last", -1))
        project = self.project or os.environ.get("WANDB_PROJECT") or "scl-defense"
        run = opened("wandb", lambda: wandb.init(
            id=id, resume="allow", project=project, name=run_dir.name, dir=str(run_dir), config=dict(config),
            settings=wandb.Settings(silent=True, console="off"), reinit="finish_previous",
        ))  # fmt: skip
        keep(run_dir / NAME, {"id": id, "project": project, "last": last})

        def send(step: int, values: dict[str, float]) -> None:
            if step <= last:  # it has this step, and would say so on every one
                return
            run.log(values, step=step)
            keep(run_dir / NAME, {"id": id, "project": project, "last": step})

        return Guarded("wandb", send, run.finish)
