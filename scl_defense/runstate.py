"""Where a run stands, as its checkpoints hold it. Random streams are derived, so there is no other state."""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from scl_defense import checkpoint
from scl_defense.config import as_dict
from scl_defense.errors import UserError
from scl_defense.runtime import versions

if TYPE_CHECKING:
    from scl_defense.train import Run

_MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}}


@dataclass
class Progress:
    """epoch and step come next; sums: metrics of the epoch so far; best: epoch, accuracies and number of
    validation images of the kept checkpoint; seconds: spent.

    stopped: ended early, for want of progress. passes: (forwards, backwards) an image, of the last whole epoch.
    parts: in how many a batch is taken, since memory ran out. skipped, skipped_now: batches that were left out, because
    their loss or gradient was no number; in this epoch.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: bool = False
    passes: tuple[float, float] = (0.0, 0.0)
    parts: int = 1
    skipped: int = 0
    skipped_now: int = 0


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
            "device": str(run.device),
            "threads": torch.get_num_threads(),  # sums of another number of threads round differently
            "processes": 1,
            "random": {"seed": config.seed, "scheme": "derived from (seed, purpose, epoch, step)"},
            "ranks": {**run.ranks.about(), "device": run.device.type, "sync_bn": config.sync_bn},
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
    try:
        run.network.load_state_dict(state["network"] if run.average is None else state["training"])
        if run.average is not None:
            run.average.load_state_dict({"network": state["network"], "updates": state["averages"]})
        _check_optimizer(run.optimizer, state["optimizer"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.twin is not None:
            run.twin.load_state_dict(state["twin"])
    except Exception as error:  # torch has one for each way in which a state is not of this network
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"this checkpoint is not of the run that its recipe describes ({type(error).__name__}: {text}); resume "
            "from another one, or start a new run"
        ) from None
    names = [part.name for part in fields(Progress) if part.name in state]  # an older file knows fewer
    run.progress = Progress(**{name: copy.copy(state[name]) for name in names})


def _check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless these are moments of this optimizer: torch looks when it steps, not when it loads."""
    own = optimizer.state_dict()["param_groups"]
    for mine, theirs in zip(own, saved["param_groups"], strict=True):
        for name in mine.keys() - {"lr", "initial_lr"}:
            if theirs[name] != mine[name]:
                raise ValueError(f"its optimizer has another {name}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, moments in saved["state"].items():
        if moments.keys() != _MOMENTS[type(optimizer).__name__]:
            raise ValueError("its optimizer keeps other moments")
        for name, value in moments.items():
            shape = torch.Size() if name == "step" else parameters[place].shape
            if not isinstance(value, torch.Tensor) or value.shape != shape or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} of its optimizer does not belong to this network")


def _lacking(content: Mapping[str, Any]) -> str | None:
    """The first entry without which nothing can go on, or that is of another kind; ``None``: all are there."""
    numbers = {name: (float, int) for name in ("clean", "robust", "epoch", "images")}
    kinds: dict[str, type | tuple[type, ...]] = {
        "optimizer": dict, "data_sha256": str, "generator": str, "epoch": int, "step": int, "sums": dict, "best": dict,
        "seconds": (float, int),
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind) or isinstance(content[name], bool):
            return name
    if content["epoch"] < 0 or content["step"] < 0 or not isinstance(content.get("stopped", False), bool):
        return "its place in the run"
    if not all(isinstance(value, (float, int)) for value in content["sums"].values()):
        return "sums"
    if content["best"] and not all(isinstance(content["best"].get(name, 0), kind) for name, kind in numbers.items()):
        return "best"
    if content["epoch"] and not {"epoch", "clean", "robust"} <= content["best"].keys():
        return "best"
    passes = content.get("passes", (0.0, 0.0))
    if len(passes) != 2 if isinstance(passes, (list, tuple)) else True:
        return "passes"
    counts = [content.get(name, 1) for name in ("parts", "skipped", "skipped_now")]
    if not all(isinstance(count, int) and 0 <= count <= 1 << 20 for count in counts) or counts[0] < 1:
        return "how its batches are taken"
    config = json.loads(content["config"])
    return None if isinstance(config.get("epochs"), int) else "config"


def read(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and last checkpoint of an unfinished run (its folder, or the file). Raises :class:`UserError`."""
    path = run / "last.pt" if run.is_dir() else run
    if not run.exists():
        raise UserError(f"there is nothing to resume: '{run}' does not exist; give the folder of a run")
    if not path.exists():
        raise UserError(f"there is nothing to resume in '{run}': {path.name} is missing; start the run again")
    content, _ = checkpoint.read(path)
    if lacking := _lacking(content):
        raise UserError(f"checkpoint '{path}' cannot be resumed: {lacking} is missing or damaged; start a new run")
    best = path.parent / "best.pt"
    if content["epoch"] >= json.loads(content["config"])["epochs"] or content.get("stopped"):
        raise UserError(f"run '{path.parent}' is finished: all {content['epoch']} epochs are done; benchmark {best}")
    return path.parent, content
