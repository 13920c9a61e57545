"""The page of a study: methods over seeds, from its results file and what lies beside it."""

import base64
import re
import statistics as stdlib
from collections.abc import Sequence
from typing import Any

from scl_defense.errors import UserError
from scl_defense.threat import parse_eps
from scl_defense_benchmarks.report.gather import percent
from scl_defense_benchmarks.report.page import Charts, render
from scl_defense_benchmarks.report.read import Study
from scl_defense_benchmarks.statistics import mean_sd
from scl_defense_benchmarks.study.tables import CLEAN, WORST, Row

LARGEST = 4 << 20  # bytes of one figure that is taken into the page


def study_page(study: Study) -> str:
    """The whole page. Raises :class:`UserError` for lines that do not fit together."""
    try:
        return _page(study)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the results of study '{study.folder}' are damaged ({type(error).__name__}: {error}); run the study again"
        ) from None


def _page(study: Study) -> str:
    charts, parts = Charts(), []
    for number, context in enumerate(dict.fromkeys(line["context"] for line in study.lines)):
        parts.append(_part(study, context, _rows(study, context), charts, f"c{number}"))
    contents = [*((part["id"], part["title"]) for part in parts)]
    contents += [("summary", "In words")] if study.summary else []
    return render(
        "study.html.j2",
        title=study.title,
        kind="Study report",
        contents=[*contents, ("cells", "Every cell"), ("about", "How it was made")],
        payload={"charts": charts.data, "galleries": {}, "confusions": {}},
        parts=parts,
        made=_facts(study),
        summary=blocks(study.summary),
        cells=_cells(study),
        figures=_figures(study),
    )


def _rows(study: Study, context: str) -> list[Row]:
    rows: dict[str, Row] = {}
    seeds = {line["seed"] for line in study.lines}
    for line in study.lines:
        if line["context"] == context:
            arm = line["arm"]
            row = rows.setdefault(arm, Row(context, arm, study.labels.get(arm, arm), None, len(seeds), {}))
            row.lines[line["seed"]] = line
    return list(rows.values())


def _part(study: Study, context: str, rows: Sequence[Row], charts: Charts, id: str) -> dict[str, Any]:
    measures = list(dict.fromkeys(name for row in rows for name in row.measures()))
    ranked = sorted(rows, key=lambda row: -(row.mean(WORST) or 0.0))
    table = [
        [row.label, len(row.lines), *(_spread(row.measures().get(name, [])) for name in measures), row.cost_text()]
        for row in ranked
    ]
    first = next(iter(rows[0].lines.values()))
    threat = " ".join(first["threat"].split(":", 1))
    drawn = [
        _dots(charts, f"{id}-clean", rows, lambda row: [100 * value for value in row.measures()[CLEAN]],
              "clean accuracy (%)", "Worst case against clean accuracy, a mark a method", threat),
        _dots(charts, f"{id}-cost", rows, Row.costs, "backward passes per training image, whole training",
              "Worst case against the cost of training", threat),
        _curve(charts, f"{id}-curve", rows, threat),
    ]  # fmt: skip
    return {
        "id": id,
        "title": context or "Methods",
        "sentence": _sentence(study, ranked, first, threat),
        "columns": ["method", "seeds", *(f"{name} %" for name in measures), "backward passes an epoch"],
        "rows": table,
        "charts": [one for one in drawn if one is not None],
    }


def _sentence(study: Study, ranked: Sequence[Row], first: Any, threat: str) -> str:
    best = ranked[0]
    seeds = {seed for row in ranked for seed in row.lines}
    data = f" of {first['data']}" if isinstance(first.get("data"), str) else ""
    over = f"Over {len(seeds)} seeds" if len(seeds) > 1 else "With one seed, which is an anecdote,"
    if best.mean(WORST) is None:
        return f"{over} on {first['n']} test images{data}: no worst case is known for any of {len(ranked)} methods."
    return (
        f"{over} on {first['n']} test images{data}, the highest worst case of {len(ranked)} methods within {threat} is "
        f"that of {best.label}: {_spread(best.measures()[WORST])} %, with {_spread(best.measures()[CLEAN])} % clean. "
        "Which differences are shown and which are not, the section In words says."
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, sd = mean_sd(values)
    return percent(mean) + ("" if sd is None else f" ± {percent(sd)}")


def _dots(
    charts: Charts, key: str, rows: Sequence[Row], x: Any, x_label: str, caption: str, threat: str
) -> dict[str, Any] | None:
    points = {}
    for row in rows:
        worst = row.measures().get(WORST) or []
        if worst and (xs := x(row)):
            mean, sd = mean_sd(worst)
            points[row.label] = [(stdlib.fmean(xs), 100 * mean, 100 * (mean - (sd or 0)), 100 * (mean + (sd or 0)))]
    if len(points) < 2:
        return None
    made = charts.dots(key, points, x=x_label, y=f"worst-case accuracy, {threat} (%)", caption=caption)
    return made | {"note": "Mean over seeds; the tooltip tells one standard deviation."}


def _curve(charts: Charts, key: str, rows: Sequence[Row], threat: str) -> dict[str, Any] | None:
    """Mean accuracy against eps with one standard deviation over seeds as the band."""
    found: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for row in rows:
        radii = sorted({eps for line in row.lines.values() for eps in line["curve"]}, key=parse_eps)
        columns = [(0.0, row.measures()[CLEAN])]
        columns += [(float(parse_eps(eps)), [line["curve"][eps] for line in row.lines.values()
                                             if line["curve"].get(eps) is not None]) for eps in radii]  # fmt: skip
        points = []
        for radius, values in columns:
            if values:
                mean, sd = mean_sd(values)
                low, high = (None, None) if sd is None else (max(100 * (mean - sd), 0), min(100 * (mean + sd), 100))
                points.append((radius, 100 * mean, low, high))
        if len(points) > 2:
            found[row.label] = points
    if not found:
        return None
    norm = threat.split(" ")[0]
    return charts.dots(key, found, x=f"{norm} radius eps (images in [0, 1])", y="robust accuracy (%)", joined=True,
                       caption="Accuracy against the radius; band: one standard deviation over seeds")  # fmt: skip


def _facts(study: Study) -> list[tuple[str, Any]]:
    lines = study.lines
    keep = ("scl-defense", "python", "torch", "torchattacks", "adversarial-robustness-toolbox")
    return [
        ("command", study.about.get("command")),
        ("machine", study.about.get("machine")),
        ("seeds", _listed(line["seed"] for line in lines)),
        ("images", _listed(f"n = {line['n']}" for line in lines)),
        ("threat model", _listed(line["threat"] for line in lines)),
        ("device", _listed(line["machine"].get("device", "?") for line in lines)),
        ("batteries", _listed(f"{name}: {', '.join(battery['attacks'])}" for line in lines
                              for name, battery in line["batteries"].items())),
        *((name, _listed(line["versions"].get(name, "?") for line in lines)) for name in keep),
    ]  # fmt: skip


def _listed(found: Any) -> str:
    return "; ".join(sorted({str(one) for one in found}, key=lambda text: (len(text), text)))


def _cells(study: Study) -> list[list[Any]]:
    times = {one.get("cell"): one for one in study.times}
    rows = []
    for line in study.lines:
        time = times.get(line["cell"], {})
        flags = line.get("flags")
        rows.append([
            line["cell"], percent(line["clean"]), percent(line.get("worst")), line.get("best_epoch", "-"),
            _seconds(time.get("train_seconds")), _seconds(time.get("attack_seconds")),
            ", ".join(map(str, flags)) if isinstance(flags, list) else "",
        ])  # fmt: skip
    return rows


def _seconds(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, int | float) else "-"


def _figures(study: Study) -> list[tuple[str, str]]:
    """What the study drew that this page does not: as data URIs with their names."""
    found = []
    for path in sorted((study.folder / "figures").glob("*.png")):
        if path.name.startswith(("epochs", "embedding")) and path.stat().st_size <= LARGEST:
            payload = path.read_bytes()
            if payload.startswith(b"\x89PNG"):
                found.append((path.stem, "data:image/png;base64," + base64.b64encode(payload).decode()))
    return found


def blocks(text: str) -> list[tuple[str, Any]]:
    """The Markdown that a summary is written in, as (kind, content): ``head`` text, ``para`` and ``item`` pieces.

    A piece is (text, bold). Nothing else of Markdown is read: what looks like HTML stays text.
    """
    found: list[tuple[str, Any]] = []
    for line in text.splitlines()[1:]:  # the first line is the title
        if line.startswith("#"):
            found.append(("head", line.lstrip("# ")))
        elif line.startswith("- "):
            if not found or found[-1][0] != "list":
                found.append(("list", []))
            found[-1][1].append(pieces(line[2:]))
        elif line.strip():
            found.append(("para", pieces(line)))
        else:
            continue
    return found


def pieces(text: str) -> list[tuple[str, bool]]:
    """``a **b** c`` -> ``[("a ", False), ("b", True), (" c", False)]``."""
    return [(part, place % 2 == 1) for place, part in enumerate(re.split(r"\*\*(.+?)\*\*", text)) if part]
