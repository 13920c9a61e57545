"""What stands around a foreign network: normalisation and channel order before it, its labels after it."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError, nearest
from scl_defense.models import Normalize

Channels = Literal["rgb", "bgr"]


class Prepared(nn.Module):
    """(N, C, H, W) in [0, 1] -> channels in the network's order -> (images - mean) / std -> the network's logits.

    mean, std: in the network's order of channels. [0, 255]: mean 0, std 1/255; [-1, 1]: mean 0.5, std 0.5.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], channels: Channels = "rgb"):
        super().__init__()
        self.normalize, self.network, self.channels = Normalize(mean, std), network, channels

    def forward(self, images: Tensor) -> Tensor:
        ordered = images.flip(1) if self.channels == "bgr" else images
        return self.network(self.normalize(ordered))


class Relabelled(nn.Module):
    """Logits (N, outputs) -> (N, K): of each class of the data the largest of the outputs that stand for it.

    So the predicted class is that of the network's largest output; outputs that stand for no class are left out.
    """

    def __init__(self, network: nn.Module, label_map: Sequence[int | None], classes: int):
        super().__init__()
        self.network, self.label_map, self.outputs = network, tuple(label_map), len(label_map)
        columns = [[j for j, label in enumerate(label_map) if label == k] for k in range(classes)]
        self.single = all(len(column) == 1 for column in columns)
        self.columns = columns

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        if logits.dim() != 2 or logits.shape[1] != self.outputs:
            raise UserError(
                f"the network returns {tuple(logits.shape)}, the label map has {self.outputs} entries; "
                "give one entry for each of the network's outputs"
            )
        if self.single:
            return logits[:, [column[0] for column in self.columns]]
        return torch.stack([logits[:, column].amax(1) for column in self.columns], 1)


def normalisation(options: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...], Channels]:
    """mean, std and channel order as given; what is not given changes nothing. Raises :class:`UserError`."""
    mean = tuple(map(float, options.get("mean") or (0.0,) * channels))
    std = tuple(map(float, options.get("std") or (1.0,) * channels))
    if len(mean) != channels or len(std) != channels or not min(std) > 0:
        raise UserError(f"--mean and --std need {channels} numbers each, std above 0, not {mean} and {std}")
    order = options.get("channels") or "rgb"
    if order not in ("rgb", "bgr"):
        raise UserError(f"channels '{order}' are unknown; they must be rgb or bgr")
    if order == "bgr" and channels != 3:
        raise UserError(f"channels bgr need images of 3 channels, these have {channels}; leave --channels out")
    return mean, std, order


def read_label_map(given: Any, classes: Sequence[str]) -> list[int | None] | None:
    """For each output of a network, in order, the place of its class in ``classes``; ``None``: it stands for none.

    given: a list (or a text with commas) of class names or numbers, ``-`` or ``None`` for an output that no class of
    the data has; the path of a JSON or TOML file (``labels = [...]``) with such a list, or a table output -> class.
    """
    if given is None:
        return None
    entries = _entries(given)
    found = [_place(entry, classes) for entry in entries]
    lacking = [name for k, name in enumerate(classes) if k not in found]
    if lacking:
        raise UserError(
            f"the label map has no output for class '{lacking[0]}'"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            + f"; it must name each of the {len(classes)} classes"
        )
    return found


def _entries(given: Any) -> list[Any]:
    if isinstance(given, (str, Path)):
        path = Path(given)
        if path.suffix.lower() in (".json", ".toml"):
            given = _read(path)
        else:
            return [part.strip() for part in str(given).split(",")]
    if isinstance(given, Mapping):
        given = given.get("labels", given) if len(given) == 1 else given
    if isinstance(given, Mapping):
        try:
            places = {int(output): label for output, label in given.items()}
        except ValueError:
            raise UserError("a label map that is a table has the outputs' numbers as its keys: 0, 1, 2, ...") from None
        if min(places, default=0) < 0 or max(places, default=0) > 1_000_000:
            raise UserError("a label map's outputs are numbered from 0 on")
        return [places.get(output) for output in range(max(places, default=-1) + 1)]
    if not isinstance(given, Sequence) or not given:
        raise UserError("a label map is a list: for each output of the network, in order, the class that it stands for")
    return list(given)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except RecursionError:
        raise UserError(f"label map '{path}' is nested too deeply; it is a list of classes") from None
    except OSError as error:
        raise UserError(f"label map '{path}' cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"label map '{path}' is no {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from None


def _place(entry: Any, classes: Sequence[str]) -> int | None:
    if entry is None or entry in ("-", ""):
        return None
    if str(entry) in classes:
        return list(classes).index(str(entry))
    try:
        number = int(entry)
    except (TypeError, ValueError, OverflowError):  # JSON knows Infinity
        raise UserError(f"label map: the data has no class '{entry}'{nearest(str(entry), list(classes))}") from None
    if not 0 <= number < len(classes):
        raise UserError(f"label map: class {number} is not one of 0..{len(classes) - 1}; write - for an unused output")
    return number
