"""The figures of a study, as PNG and PDF: drawn for a column 85 mm wide, told apart without colour vision too."""

import io
import itertools
import json
import statistics as stdlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scl_defense.shown import COLOURS, DASHES, MARKERS, STYLE, WIDTH, new_figure
from scl_defense.threat import parse_eps
from scl_defense_benchmarks.statistics import mean_sd
from scl_defense_benchmarks.study.cells import Cell
from scl_defense_benchmarks.study.store import Store
from scl_defense_benchmarks.study.tables import CLEAN, WORST, About, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(about: About, rows: Sequence[Row], cells: Sequence[Cell], store: Store) -> list[Path]:
    """Every figure that the results and the cells' folders give; the files written, in ``figures/``."""
    import matplotlib

    folder = store.out / "figures"
    folder.mkdir(exist_ok=True)
    made = []
    with matplotlib.rc_context(STYLE):
        for context in dict.fromkeys(row.context for row in rows):
            own = [row for row in rows if row.context == context and row.lines]
            inside = [cell for cell in cells if cell.context == context]
            end = f"-{context.replace(' ', '-')}" if context else ""
            for name, figure in (
                ("clean-robust", clean_against_robust(own)),
                ("curve", curves(own)),
                ("cost", robust_against_cost(own)),
                ("epochs", epochs(own, inside, store)),
                ("embedding", embedding(own, inside, store)),
            ):
                if figure is not None:
                    made += _save(figure, folder / f"{name}{end}", about.spec.title)
    return made


def _save(figure: "Figure", path: Path, title: str) -> list[Path]:
    from scl_defense.checkpoint import atomic_write_bytes

    # No dates in the files: the same results give the same figures.
    for kind, unnamed in (("png", "Software"), ("pdf", "CreationDate")):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, metadata={"Title": title, unnamed: None})
        atomic_write_bytes(path.with_name(f"{path.name}.{kind}"), drawn.getvalue())
    return [path.with_name(path.name + end) for end in (".png", ".pdf")]


def _figure(height: float, width: float = WIDTH) -> "Figure":
    return new_figure(width, height)


def _look(place: int) -> dict[str, Any]:
    colour = COLOURS[place % len(COLOURS)]
    return {
        "color": colour,
        "marker": MARKERS[place % len(MARKERS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def _line(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}


def _legend(figure: "Figure", axes: Any, count: int) -> None:
    """Below the axes: beside them it would take the width that the data need."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 34 else 2,
                  handlelength=1.6, columnspacing=1.0, labelspacing=0.3)  # fmt: skip


def _legend_height(rows: Sequence[Row]) -> float:
    columns = 1 if max(len(row.label) for row in rows) > 34 else 2
    return 0.13 * -(-len(rows) // columns) + 0.1


def _points(rows: Sequence[Row], x: Any, x_label: str) -> "Figure | None":
    """Worst-case accuracy against ``x(row)`` -> numbers, one a seed: every seed small, the mean with its spread."""
    known = [(place, row) for place, row in enumerate(rows) if row.measures().get(WORST) and x(row)]
    if not known:
        return None
    figure = _figure(2.3 + _legend_height([row for _, row in known]))
    axes = figure.subplots()
    for place, row in known:
        xs, ys = x(row), [100 * value for value in row.measures()[WORST]]
        if len(xs) == len(ys) > 1:
            axes.plot(xs, ys, linestyle="", marker=".", markersize=2, color=_look(place)["color"], alpha=0.6)
        (x_mean, x_sd), (y_mean, y_sd) = mean_sd(xs), mean_sd(ys)
        axes.errorbar(x_mean, y_mean, xerr=x_sd or None, yerr=y_sd, linestyle="", elinewidth=0.6, label=row.label,
                      **_look(place))  # fmt: skip
    axes.set_xlabel(x_label)
    axes.set_ylabel(_robust_label(rows))
    _legend(figure, axes, len(known))
    return figure


def clean_against_robust(rows: Sequence[Row]) -> "Figure | None":
    return _points(
        rows, lambda row: [100 * value for value in row.measures()[CLEAN]], "clean accuracy (% of test images)"
    )


def robust_against_cost(rows: Sequence[Row]) -> "Figure | None":
    """Worst case against gradient passes of the whole training; nothing where no cost was recorded."""
    return _points(rows, Row.costs, "training cost (backward passes per training image)")


def curves(rows: Sequence[Row]) -> "Figure | None":
    """Accuracy against eps, mean and one standard deviation over seeds; at eps 0 stands the clean accuracy."""
    known = [(place, row) for place, row in enumerate(rows) if any(line["curve"] for line in row.lines.values())]
    if not known:
        return None
    figure = _figure(2.3 + _legend_height([row for _, row in known]))
    axes = figure.subplots()
    for place, row in known:
        radii, means, sds = [0.0], [row.mean(CLEAN)], [mean_sd(row.measures()[CLEAN])[1] or 0.0]
        for eps in sorted(next(iter(row.lines.values()))["curve"], key=parse_eps):
            values = [value for line in row.lines.values() if (value := line["curve"].get(eps)) is not None]
            if values:
                radii.append(float(parse_eps(eps)))
                means.append(stdlib.fmean(values))
                sds.append(mean_sd(values)[1] or 0.0)
        axes.plot(radii, [100 * mean for mean in means], label=row.label, **_line(place))
        low, high = ([100 * (m + sign * sd) for m, sd in zip(means, sds, strict=True)] for sign in (-1, 1))
        axes.fill_between(radii, low, high, color=_line(place)["color"], alpha=0.15, linewidth=0)
    threat = next(iter(rows[0].lines.values()))["threat"]
    norm, _, eps = threat.partition(":")
    axes.axvline(float(parse_eps(eps)), color="0.6", linewidth=0.6, linestyle=":")
    axes.set_xlabel(f"{norm} radius eps (images in [0, 1]; dotted: eps of training)")
    axes.set_ylabel("robust accuracy (% of test images)")
    axes.set_ylim(0, 101)
    axes.set_xlim(left=0)
    _legend(figure, axes, len(known))
    return figure


def epochs(rows: Sequence[Row], cells: Sequence[Cell], store: Store) -> "Figure | None":
    """Training loss and robust validation accuracy over epochs, mean over seeds with the range as a band."""
    found = []
    for place, row in enumerate(rows):
        runs = [_metrics(store.folder(cell) / "train" / "metrics.jsonl") for cell in cells if cell.arm == row.arm]
        runs = [run for run in runs if run]
        if runs:
            found.append((place, row, runs))
    if not found:
        return None
    figure = _figure(3.4 + _legend_height([row for _, row, _ in found]))
    above, below = figure.subplots(2, 1, sharex=True)
    for place, row, runs in found:
        for axes, name, scale in ((above, "loss", 1), (below, "val_robust", 100)):
            length = min(len(run) for run in runs)
            columns = [[scale * run[epoch][name] for run in runs] for epoch in range(length)]
            places = range(1, length + 1)
            axes.plot(places, [stdlib.fmean(column) for column in columns], label=row.label, **_line(place))
            axes.fill_between(places, [min(c) for c in columns], [max(c) for c in columns],
                              color=_line(place)["color"], alpha=0.12, linewidth=0)  # fmt: skip
    above.set_ylabel("training loss")
    below.set_ylabel("validation accuracy\nunder a short PGD (%)")
    below.set_xlabel("epoch")
    below.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, above, len(found))
    return figure


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [record for record in records if "loss" in record and "val_robust" in record]


def embedding(rows: Sequence[Row], cells: Sequence[Cell], store: Store) -> "Figure | None":
    """Test points (dots) and their adversarials (crosses) on the first two principal axes, a panel a method."""
    found = []
    for row in rows:
        for cell in cells:
            path = store.folder(cell) / "embedding.json"
            if cell.arm == row.arm and path.exists():
                found.append((row, json.loads(path.read_text())))
                break
    if not found:
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    width = WIDTH if columns < 3 else 1.5 * WIDTH
    figure = _figure(0.5 + 1.05 * width / columns * lines, width)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    from matplotlib import colormaps

    wheel = colormaps["tab10"]
    for panel, (row, points) in zip(panels, found, strict=False):
        colours = [wheel(label % 10) for label in points["labels"]]
        for cloud, marker, size in (("clean", "o", 3), ("adversarial", "x", 5)):
            xs, ys = zip(*points[cloud], strict=True)
            panel.scatter(xs, ys, s=size, c=colours, marker=marker, linewidths=0.4 if marker == "x" else 0, alpha=0.75)
        if len(points["classes"]) <= 10:  # the colours of ten classes cannot all be told apart: names can
            _name_classes(panel, points, 72 * 0.85 * width / columns)
        panel.set_title("\n".join(_wrapped(row.label, 26)), pad=2)
        one, two = points["explained"]
        panel.set_xlabel(f"PC 1 ({one:.0%})", labelpad=1)
        panel.set_ylabel(f"PC 2 ({two:.0%})", labelpad=1)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.grid(False)
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    threat = found[0][1]["threat"]
    figure.supxlabel(f"dots: test images, crosses: their adversarials ({threat}); colour: true class", fontsize=6)
    return figure


def _name_classes(panel: Any, points: dict[str, Any], width: float) -> None:
    """Each class's name at the mean of its clean points, moved up or down where it would lie on another.

    width: of the panel, about as high as wide, in points.
    """
    from matplotlib.patheffects import withStroke

    size, (left, right), (low, high) = 6, panel.get_xlim(), panel.get_ylim()
    across, down = (right - left) / width, (high - low) / width  # a point of the paper in units of the axes
    names, places = [], []
    for label in sorted(set(points["labels"])):
        cloud = [point for point, own in zip(points["clean"], points["labels"], strict=True) if own == label]
        names.append(points["classes"][label][:10])
        places.append([stdlib.fmean(axis) for axis in zip(*cloud, strict=True)])
    extents = [0.6 * size * len(name) * across for name in names]
    apart(places, extents, 1.1 * size * down)
    for name, (x, y) in zip(names, places, strict=True):
        panel.text(x, y, name, fontsize=size, ha="center", va="center",
                   path_effects=[withStroke(linewidth=1.5, foreground="white")])  # fmt: skip


def apart(places: list[list[float]], widths: Sequence[float], height: float, rounds: int = 200) -> None:
    """Move boxes around ``places`` [x, y], of these widths and one height, up or down until none lies on another."""
    for _ in range(rounds):
        moved = False
        for one, two in itertools.combinations(range(len(places)), 2):
            (x, y), (other, above) = places[one], places[two]
            overlap = height - abs(above - y)
            if abs(other - x) >= (widths[one] + widths[two]) / 2 or overlap <= 1e-6 * height:
                continue
            push = overlap / 2 if above >= y else -overlap / 2
            places[one][1], places[two][1], moved = y - push, above + push, True
        if not moved:
            return


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [text]


def _robust_label(rows: Sequence[Row]) -> str:
    threat = next(iter(rows[0].lines.values()))["threat"]
    return f"worst-case accuracy, {threat} (%)"
