"""What a finished run left behind, as numbers, a table and curves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scl_defense import shown
from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind. ``clean`` and ``robust``: validation accuracies of the best checkpoint.

    forwards, backwards: image passes through the encoder per training image of an epoch, generator and trainer
    together (:mod:`scl_defense.passes`): the cost of the method in units that do not depend on the machine. In a
    notebook it shows itself as its table and its curves.
    """

    run_dir: Path
    best: Path
    last: Path
    epochs: int
    best_epoch: int
    clean: float
    robust: float
    threat: ThreatModel
    seconds: float
    forwards: float
    backwards: float

    def history(self) -> tuple[Mapping[str, Any], ...]:
        """One record an epoch, from 0, as ``metrics.jsonl`` of the run holds them; empty where nobody logged there."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return ()
        found = {line["epoch"]: line for line in records if isinstance(line, dict) and "epoch" in line}
        return tuple(found[epoch] for epoch in sorted(found))  # a resumed run may tell an epoch twice: the last counts

    def table(self, width: int = 100) -> shown.Table:
        """The run on a few lines. ``rows`` of it: one mapping, numbers as numbers."""
        lines = {
            "best checkpoint": str(self.best),
            "best epoch": f"{self.best_epoch + 1} of {self.epochs}",
            "validation accuracy, clean": f"{100 * self.clean:.1f} %",
            f"validation accuracy, short PGD {self.threat}": f"{100 * self.robust:.1f} %",
            "cost": f"{self.forwards:.4g} forward and {self.backwards:.4g} backward passes per image and epoch",
            "time": f"{self.seconds:.0f} s",
        }
        row = {"run": str(self.run_dir), "best_epoch": self.best_epoch, "epochs": self.epochs, "clean": self.clean,
               "robust": self.robust, "threat": str(self.threat), "seconds": self.seconds, "forwards": self.forwards,
               "backwards": self.backwards}  # fmt: skip
        return shown.Table(("training run", self.run_dir.name), list(lines.items()), [row], width=width)

    def figure(self) -> "Figure":
        """Training loss, clean and robust validation accuracy over the epochs; the dotted line is the best epoch.

        Raises :class:`UserError` where the run kept no ``metrics.jsonl``.
        """
        history = self.history()
        if not history:
            raise UserError(f"'{self.run_dir}' holds no metrics.jsonl to draw; train with the logger jsonl")
        with shown.styled():
            figure = shown.new_figure(2 * shown.WIDTH, 2.2)
            left, right = figure.subplots(1, 2)
            curves = (
                (left, "loss", "training loss", 1),
                (right, "val_clean", "clean", 100),
                (right, "val_robust", f"short PGD, {self.threat}", 100),
            )
            for place, (axes, name, label, scale) in enumerate(curves):
                points = [(line["epoch"] + 1, scale * line[name]) for line in history if name in line]
                look: dict[str, Any] = {"color": shown.COLOURS[place], "linestyle": shown.DASHES[max(0, place - 1)]}
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 3 else "", **look)
            for axes in (left, right):
                axes.axvline(self.best_epoch + 1, color="0.6", linewidth=0.6, linestyle=":")
                axes.set_xlabel("epoch")
            left.set_ylabel("training loss")
            right.set_ylabel("validation accuracy (%)")
            right.set_ylim(0, 101)
            right.legend(loc="best")
        return figure

    def _repr_html_(self) -> str:
        curves = shown.img(self.figure(), "loss and validation accuracy by epoch") if self.history() else ""
        return self.table()._repr_html_() + curves
