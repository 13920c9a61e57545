"""What a study left behind, as numbers, a table and figures."""

import dataclasses
import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scl_defense import shown
from scl_defense.errors import UserError, nearest
from scl_defense.shown import Table, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scl_defense_benchmarks.study.tables import Row

FIGURES = ("clean-robust", "curve", "cost")


@dataclass(frozen=True)
class StudyResult:
    """What a study left behind. lines: of ``results.jsonl``. failed: cell -> reason. missing: cells that nobody ran.

    arms: one a method and context, with its lines and its comparison with the baseline. In a notebook it shows itself
    as its table and the worst case against the clean accuracy.
    """

    out: Path
    lines: tuple[Mapping[str, Any], ...]
    failed: Mapping[str, str]
    missing: tuple[str, ...]
    files: tuple[Path, ...]
    arms: "tuple[Row, ...]" = field(repr=False, default=())

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """One mapping a method and context, shares in [0, 1]: mean and ``sd`` over seeds, cost, comparison."""
        return tuple(arm.plain() for arm in self.arms)

    def table(self, width: int = 100) -> Table:
        """A line a method and context: clean and worst-case accuracy over seeds, and its difference to the baseline."""
        cells = []
        for row in self.rows:
            numbers = (percent(row.get(name), row.get(f"{name} sd")) for name in ("clean", "worst case"))
            difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
            label = f"{row['context']}: {row['label']}" if row["context"] else row["label"]
            cells.append((label, str(row["seeds"]), *numbers, difference))
        columns = ("method", "seeds", "clean %", "worst case %", "to baseline")
        return Table(columns, cells, self.rows, notes=self._notes(), width=width)

    def _notes(self) -> list[str]:
        notes = [f"failed: {cell}: {why}" for cell, why in self.failed.items()]
        return notes + ([f"not run: {len(self.missing)} cells"] if self.missing else [])

    def figure(self, name: Literal["clean-robust", "curve", "cost"] = "clean-robust", context: str = "") -> "Figure":
        """``clean-robust``: worst case against clean accuracy; ``curve``: against eps; ``cost``: against the cost.

        context: of a study with several data sets or balls (default: the first). Raises :class:`UserError` for a name
        or context that is not there, and where nothing was measured that it could show.
        """
        from scl_defense_benchmarks.study import figures

        if name not in FIGURES:
            raise UserError(f"a study has no figure '{name}'{nearest(name, FIGURES)}; write {', '.join(FIGURES)}")
        arms = [arm for arm in self.arms if arm.lines]
        contexts = list(dict.fromkeys(arm.context for arm in arms))
        if context and context not in contexts:
            raise UserError(f"the study has no context '{context}'{nearest(context, contexts)}")
        own = [arm for arm in arms if arm.context == (context or contexts[0])]
        draw = {"clean-robust": figures.clean_against_robust, "curve": figures.curves,
                "cost": figures.robust_against_cost}[name]  # fmt: skip
        with shown.styled():
            drawn = draw(own) if own else None
        if drawn is None:
            raise UserError(f"there is nothing to draw in '{name}': no finished cell of '{self.out}' measured it")
        return drawn

    def to_json(self) -> dict[str, Any]:
        """What ``study --json`` prints."""
        plain = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "arms"}
        return {**plain, "out": str(self.out), "files": [str(path) for path in self.files], "table": self.rows}

    def _repr_html_(self) -> str:
        page = f"<p>{html.escape(str(self.out / 'summary.md'))}</p>"
        known = [arm for arm in self.arms if arm.lines]
        picture = shown.img(self.figure(), "worst case against clean accuracy") if known else ""
        return self.table()._repr_html_() + picture + page
