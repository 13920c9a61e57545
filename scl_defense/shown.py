"""Tables and figures that show themselves: as text in a terminal, as HTML and PNG in a notebook."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any, Self

from scl_defense.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette (2008) without its yellow, which paper swallows; markers and dashes repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
DASHES = ("-", "--", "-.", ":")
WIDTH = 3.35  # inches: one column of a paper, 85 mm
STYLE: dict[Any, Any] = {
    "font.size": 7, "axes.labelsize": 7, "axes.titlesize": 7, "xtick.labelsize": 6, "ytick.labelsize": 6,
    "legend.fontsize": 5.5, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.0,
    "lines.markersize": 4, "axes.grid": True, "grid.color": "0.92", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "pdf.fonttype": 42, "savefig.dpi": 300,
}  # fmt: skip
DPI = 160  # of a figure in a notebook


class Table(str):
    """A table. It is its own text, so ``print(table)`` and ``"pgd" in table`` work; a notebook shows it as HTML.

    rows: one mapping a line, numbers as numbers, shares in [0, 1]. cells: the same as shown, below ``columns``.
    """

    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    rows: tuple[Mapping[str, Any], ...]
    caption: str
    notes: tuple[str, ...]

    def __new__(
        cls,
        columns: Sequence[str],
        cells: Sequence[Sequence[str]],
        rows: Sequence[Mapping[str, Any]],
        *,
        caption: str = "",
        notes: Sequence[str] = (),
        width: int = 100,
        text: str | None = None,
    ) -> Self:
        """text: how it looks in a terminal, where that is more than columns and cells in ``width`` characters."""
        made = super().__new__(cls, _text(columns, cells, caption, notes, width) if text is None else text)
        made.columns, made.cells = tuple(columns), tuple(tuple(line) for line in cells)
        made.rows, made.caption, made.notes = tuple(rows), caption, tuple(notes)
        return made

    def __repr__(self) -> str:
        return str(self)

    def __reduce__(self) -> Any:
        made = (self.columns, self.cells, self.rows)
        return _again, (made, {"caption": self.caption, "notes": self.notes, "text": str(self)})

    def _repr_html_(self) -> str:
        numeric = [all(not line[place] or line[place][0] in "-+0123456789" for line in self.cells)
                   for place in range(len(self.columns))]  # fmt: skip
        sides = ["right" if right else "left" for right in numeric]

        def line(tag: str, texts: Sequence[str]) -> str:
            parts = (f'<{tag} style="text-align:{side}">{escape(text)}</{tag}>'
                     for text, side in zip(texts, sides, strict=True))  # fmt: skip
            return f"<tr>{''.join(parts)}</tr>"

        head = f'<caption style="text-align:left">{escape(self.caption)}</caption>' if self.caption else ""
        body = "".join(line("td", texts) for texts in self.cells)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table>{head}<thead>{line('th', self.columns)}</thead><tbody>{body}</tbody></table>{notes}"

    def to_frame(self) -> Any:
        """``rows`` as a pandas ``DataFrame``. Raises :class:`UserError` without pandas, which is optional."""
        return to_frame(self.rows)


def _again(made: tuple[Any, Any, Any], settings: Mapping[str, Any]) -> Table:
    return Table(*made, **settings)


def to_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas ``DataFrame`` with a row a mapping. Raises :class:`UserError` without pandas, which is optional."""
    try:
        import pandas
    except ImportError:
        raise UserError("a data frame needs pandas, which is not installed: pip install 'scl-defense[frame]'") from None
    return pandas.DataFrame([dict(row) for row in rows])


def _text(
    columns: Sequence[str], cells: Sequence[Sequence[str]], caption: str, notes: Sequence[str], width: int
) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, title=Text(caption) if caption else None, title_justify="left")
    for place, name in enumerate(columns):
        numeric = place > 0 and all(not line[place] or line[place][0] in "-+0123456789" for line in cells)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for line in cells:
        table.add_row(*(Text(text) for text in line))
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=False, color_system=None)
    console.print(table, *(Text(note) for note in notes))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def percent(share: float | None, sd: float | None = None) -> str:
    """``0.4217`` -> ``42.2``, with ``± sd`` where there is one; ``-`` for ``None``."""
    return "-" if share is None else f"{100 * share:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


# -- figures


@cache
def _figure_class() -> type["Figure"]:
    """matplotlib's figure, shown by a notebook whether or not pyplot was imported there."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            return png(self)

    return ShownFigure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, without a window system. Call it, and draw, inside :func:`styled`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure_class()(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def styled() -> Iterator[None]:
    """Inside, matplotlib draws in the style of this project; names are text, a dollar sign starts no mathematics."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "text.parse_math": False}):
        yield


def png(figure: "Figure") -> bytes:
    """A figure as it is shown in a notebook."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def img(figure: "Figure", alt: str) -> str:
    """A figure as an HTML ``img`` that holds its own data."""
    data = base64.b64encode(png(figure)).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}" style="max-width:100%">'
