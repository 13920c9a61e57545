"""The data of an audit: what ``--data`` names, or a function of the user's own, ``package.module:factory``."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from scl_defense.data import Data, open_data
from scl_defense.errors import SclDefenseError, UserError
from scl_defense.plugins import PluginHost
from scl_defense.types import Dataset, ImageArrays
from scl_defense_benchmarks.factories import imported, literal


def open_named(name: str, *, root: str | Path | None, options: Mapping[str, Any] | None, host: PluginHost) -> Data:
    """The data set that the user named: as :func:`scl_defense.data.open_data`, else ``package.module:factory``.

    The factory gives ``(images, labels)`` or ``(images, labels, classes)`` of the test split (of either split when it
    has a parameter ``split``), or a data set component. Only for names that the user gave: it imports and runs code,
    which a name in a stranger's file must never do.
    """
    module, colon, _ = name.rpartition(":")
    if not colon or name in host["dataset"] or Path(name).exists() or any(e.qualified == name for e in host["dataset"]):
        return open_data(name, root=root, options=options, host=host)
    if not module:
        raise UserError(f"--data '{name}' must be a data set's name, a path, or package.module:factory")
    made = imported(name, "--data")
    given = {key: literal(value) for key, value in (options or {}).items()}
    if isinstance(made, type) or (isinstance(made, Dataset) and not given):
        component = _called(made, name, given) if isinstance(made, type) else made
    elif not callable(made):
        raise UserError(f"--data '{name}' is a {type(made).__name__}; it must be a function or a data set component")
    else:
        component = FromFactory(name, given)
    if not isinstance(component, Dataset):
        kind = type(component).__name__
        raise UserError(
            f"--data '{name}' gives a {kind}; it must give (images, labels, classes) or a data set component"
        )
    return open_data(name, root=root, host=host, component=component)


@dataclass(frozen=True)
class FromFactory:
    """A function as a data set. ``budgets``: the radii usual for images in [0, 1] of 32 pixels."""

    name: str
    options: Mapping[str, Any]
    flip: ClassVar[bool] = False
    budgets: ClassVar[Mapping[str, str]] = {"linf": "8/255", "l2": "0.5", "l1": "12"}

    def splits(self, root: Path) -> tuple[str, ...]:
        parameters = inspect.signature(imported(self.name, "--data")).parameters
        return ("train", "test") if "split" in parameters else ("test",)

    def load(self, split: str, root: Path) -> ImageArrays:
        if split not in self.splits(root):
            raise UserError(f"data '{self.name}' has a {self.splits(root)[0]} split alone; give its factory a 'split'")
        named = {"split": split} if len(self.splits(root)) > 1 else {}
        found = _called(imported(self.name, "--data"), self.name, {**self.options, **named})
        if isinstance(found, Dataset):
            return found.load(split, root)
        if not isinstance(found, (tuple, list)) or len(found) not in (2, 3):
            raise UserError(
                f"data '{self.name}' gives a {type(found).__name__}; return (images, labels, classes): uint8 images "
                "(N, H, W, C), integer labels (N,), names of the classes"
            )
        images, labels = _array(found[0]), _array(found[1])
        largest = int(labels.max()) if labels.size and np.issubdtype(labels.dtype, np.integer) else 0
        classes = found[2] if len(found) == 3 else range(largest + 1)
        return ImageArrays(_as_bytes(images), labels, tuple(map(str, classes)))


def _called(factory: Any, name: str, options: Mapping[str, Any]) -> Any:
    try:
        return factory(**options)
    except SclDefenseError:
        raise
    except Exception as error:  # whatever the user's function raises
        text = " ".join(str(error).split())[:200]
        raise UserError(f"--data '{name}' failed with {dict(options)}: {type(error).__name__}: {text}") from None


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _as_bytes(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) where nothing is lost: torch's order of axes, and floats that are whole 255ths."""
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if np.issubdtype(images.dtype, np.floating) and images.size and images.min() >= 0 and images.max() <= 1:
        scaled = images.astype(np.float64) * 255
        if np.abs(scaled - scaled.round()).max() < 1e-2:
            return scaled.round().astype(np.uint8)
    return images
