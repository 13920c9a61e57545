"""From ``robustbench:[DATASET:THREAT:]NAME`` to a classifier of [0, 1] images."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from scl_defense import UserError
from scl_defense.checkpoint import LoadedClassifier

DATASETS = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
THREATS = ("Linf", "L2", "corruptions", "corruptions_3d")


def load(name: str, options: Mapping[str, Any]) -> LoadedClassifier:
    """The network that RobustBench's ``load_model`` gives. options: ``classes`` and ``image_shape`` of the data.

    Raises :class:`UserError`, one line, for a wrong name, missing data, or a RobustBench that cannot load networks.
    """
    dataset, threat, model = _parts(name, options)
    given = [
        key for key in ("model", "model_options", "mean", "std", "channels", "head", "weights") if options.get(key)
    ]
    if given:
        raise UserError(f"'{name}' brings its own network and normalisation; leave {', '.join(given)} out")
    try:
        network = _load_model()(model_name=model, dataset=dataset, threat_model=threat)
    except KeyError:
        raise UserError(
            f"RobustBench has no network '{model}' for {dataset} and {threat}; see its leaderboard"
        ) from None
    except Exception as error:  # downloads, timm, torch: each has its own
        text = " ".join(str(error).split())[:200]
        raise UserError(f"RobustBench cannot load '{model}': {type(error).__name__}: {text}") from None
    channels = options["image_shape"][0]
    return LoadedClassifier(
        network=network,
        classes=tuple(options["classes"]),
        image_shape=tuple(options["image_shape"]),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        threat=None,
        data=None,
        data_options={},
        path=Path(name),
        sha256=_digest(network),
        meta={"foreign": True, "robustbench": {"model": model, "dataset": dataset, "threat_model": threat,
                                               "version": _version()}},
    )  # fmt: skip


def _parts(name: str, options: Mapping[str, Any]) -> tuple[str, str, str]:
    parts = name.split(":")[1:]
    if len(parts) not in (1, 3) or not all(parts):
        raise UserError(f"'{name}' must be robustbench:NAME or robustbench:DATASET:THREAT:NAME")
    if not options.get("classes") or not options.get("image_shape"):
        raise UserError(f"'{name}' does not say which images to use; name the data set with --data")
    classes = len(options["classes"])
    known = next((dataset for dataset, count in DATASETS.items() if count == classes), None)
    if len(parts) == 1 and known is None:
        raise UserError(f"'{name}': RobustBench has no data set of {classes} classes (10, 100 or 1000)")
    dataset, threat = (known, "Linf") if len(parts) == 1 else parts[:2]
    if dataset not in DATASETS:
        raise UserError(f"RobustBench has no data set '{dataset}'; it has {', '.join(DATASETS)}")
    if threat not in THREATS:
        raise UserError(f"RobustBench has no threat model '{threat}'; it has {', '.join(THREATS)}")
    return dataset, threat, parts[-1]


def _load_model() -> Any:
    try:
        from robustbench.utils import load_model
    except Exception as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        # torchattacks installs a part of RobustBench under the same name; it is found first or written over it.
        raise UserError(
            f"RobustBench cannot be imported ({fault}); pip install --force-reinstall --no-deps robustbench, after "
            "torchattacks, which brings a stale package of that name"
        ) from None
    return load_model


def _version() -> str:
    try:
        return version("robustbench")
    except PackageNotFoundError:
        return "unknown"


def _digest(network: nn.Module) -> str:
    """SHA-256 of the names and bytes of all tensors: RobustBench does not say which file they came from."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + str(value.dtype).encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
