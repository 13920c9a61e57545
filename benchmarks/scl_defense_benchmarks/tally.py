"""What is known of an attack, image by image: gathered chunk by chunk, kept as plain JSON types."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scl_defense_benchmarks.loans import Passes

# Per image and attack: everything that rows, worst cases and the per-image file are made of. Lists in a record.
FLAGS = ("tried", "fooled", "moved", "guided", "outside_box", "outside_ball", "nonfinite", "rounded")


@dataclass
class Tally:
    """What is known of an attack, image by image, (N,) on the CPU.

    tried: there is a verdict. rounded: fools as an 8-bit image too. inside: (T, N) an example of it lies in the ball of
    that number and fools. predicted: the label of the example, -1 unless it fools. forwards: what the image paid, as
    far as that can be told (see :class:`scl_defense_benchmarks.loans.Passes`); backwards: of its chunk, shared equally.
    skipped: (N,) not attacked, because broken before.
    """

    tried: Tensor
    fooled: Tensor
    moved: Tensor
    guided: Tensor
    outside_box: Tensor
    outside_ball: Tensor
    nonfinite: Tensor
    rounded: Tensor
    inside: Tensor
    distance: Tensor
    predicted: Tensor
    forwards: Tensor
    backwards: Tensor
    skipped: Tensor
    traceable: bool = True
    wrote_input: bool = False
    changed_weights: bool = False
    fault: str = ""
    unfinished: str = ""
    seconds: float = 0.0

    @classmethod
    def empty(cls, n: int, balls: int) -> "Tally":
        flags = {name: torch.zeros(n, dtype=torch.bool) for name in (*FLAGS, "skipped")}
        numbers = {name: torch.zeros(n, dtype=torch.float64) for name in ("distance", "forwards", "backwards")}
        return cls(
            **flags,
            **numbers,
            inside=torch.zeros(balls, n, dtype=torch.bool),
            predicted=torch.full((n,), -1),
        )

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one chunk's record (see :func:`record_of`)."""
        places = torch.tensor(record["places"], dtype=torch.int64)
        for name in FLAGS:
            getattr(self, name)[places] = bits(record[name])
        for ball, text in enumerate(record["inside"]):
            self.inside[ball, places] = bits(text)
        self.distance[places] = torch.tensor(record["distance"], dtype=torch.float64)
        self.predicted[places] = torch.tensor(record["predicted"], dtype=torch.int64)
        self.forwards[places] = torch.tensor(record["paid"], dtype=torch.float64)
        self.backwards[places] = record["backwards"] / max(len(places), 1)
        self.traceable &= record["traceable"]
        self.wrote_input |= record["wrote_input"]
        self.changed_weights |= record["changed_weights"]
        self.fault = self.fault or record["fault"]
        self.seconds += record["seconds"]


def record_of(tally: Tally, places: Tensor, passes: Passes) -> dict[str, Any]:
    return {
        "places": places.tolist(),
        **{name: _text(getattr(tally, name)) for name in FLAGS},
        "inside": [_text(one) for one in tally.inside],
        "distance": tally.distance.tolist(),
        "predicted": tally.predicted.tolist(),
        "forwards": passes.forwards,
        "paid": [float(f"{paid:.8g}") for paid in tally.forwards.tolist()],
        "backwards": passes.backwards,
        "traceable": passes.traceable,
        "wrote_input": tally.wrote_input,
        "changed_weights": tally.changed_weights,
        "fault": tally.fault,
        "seconds": round(tally.seconds, 6),
    }


def _text(flags: Tensor) -> str:
    return "".join("1" if flag else "0" for flag in flags.tolist())


def bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)
