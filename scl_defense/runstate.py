"""Where a run stands, as its checkpoints hold it. Random streams are derived, so there is no other state."""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scl_defense import checkpoint
from scl_defense.config import as_dict
from scl_defense.errors import UserError
from scl_defense.runtime import versions

if TYPE_CHECKING:
    from scl_defense.train import Run


@dataclass
class Progress:
    """epoch and step come next; sums: metrics of the epoch so far; best: epoch, accuracies and number of
    validation images of the kept checkpoint; seconds: spent.

    stopped: ended early, for want of progress. passes: (forwards, backwards) an image, of the last whole epoch.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: bool = False
    passes: tuple[float, float] = (0.0, 0.0)


def save(run: "Run", path: Path) -> None:
    """Write everything needed to rebuild the classifier, and to go on with the run."""
    config, data = run.config, run.data
    checkpoint.save(
        path,
        {
            "network": run.kept().state_dict(),
            "branch": run.network.branches[0] if len(run.network.branches) > 1 else None,
            "model": config.model,
            "model_options": dict(config.model_options),
            "model_owner": checkpoint.provenance_of(run.host, "model", config.model),
            "classes": list(data.classes),
            "image_shape": list(data.image_shape),
            "mean": list(run.mean),
            "std": list(run.std),
            "threat": str(run.threat),
            "data": json.dumps(data.provenance),
            "data_sha256": data.fingerprint("train"),
            "config": json.dumps(as_dict(config)),
            "generator": repr(run.generator),
            "trainer": repr(run.trainer),
            "plugins": run.host.provenance(),
            "versions": versions(),
            "random": {"seed": config.seed, "scheme": "derived from (seed, purpose, epoch, step)"},
            "optimizer": run.optimizer.state_dict(),
            "twin": None if run.twin is None else run.twin.state_dict(),
            # With a weight average, "network" is the average: what goes on training is kept beside it.
            "training": None if run.average is None else run.network.state_dict(),
            "averages": 0 if run.average is None else run.average.updates,
            **asdict(run.progress),
        },
    )


def restore(run: "Run", state: Mapping[str, Any]) -> None:
    """Put a run that was just built where the checkpoint left off. Raises :class:`UserError` when its data changed."""
    if state["data_sha256"] != run.data.fingerprint("train"):
        raise UserError(f"data '{run.config.data}' is not what this run began with; restore it or start a new run")
    if state["generator"] != repr(run.generator):  # stored examples know their file
        raise UserError(f"generator '{run.config.generator}' is not what this run began with; start a new run")
    run.mean, run.std = tuple(state["mean"]), tuple(state["std"])
    run.network.load_state_dict(state["network"] if run.average is None else state["training"])
    if run.average is not None:
        run.average.load_state_dict({"network": state["network"], "updates": state["averages"]})
    run.optimizer.load_state_dict(state["optimizer"])
    if run.twin is not None:
        run.twin.load_state_dict(state["twin"])
    names = [part.name for part in fields(Progress) if part.name in state]  # an older file knows fewer
    run.progress = Progress(**{name: copy.copy(state[name]) for name in names})


def read(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and last checkpoint of an unfinished run (its folder, or the file). Raises :class:`UserError`."""
    path = run / "last.pt" if run.is_dir() else run
    if not run.exists():
        raise UserError(f"there is nothing to resume: '{run}' does not exist; give the folder of a run")
    if not path.exists():
        raise UserError(f"there is nothing to resume in '{run}': {path.name} is missing; start the run again")
    content, _ = checkpoint.read(path)
    best = path.parent / "best.pt"
    if content["epoch"] >= json.loads(content["config"])["epochs"] or content.get("stopped"):
        raise UserError(f"run '{path.parent}' is finished: all {content['epoch']} epochs are done; benchmark {best}")
    return path.parent, content
