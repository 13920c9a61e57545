"""From results to the text of the page: every name is escaped, every chart stands there as a still picture too."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from scl_defense.errors import UserError
from scl_defense_benchmarks import diagnostics
from scl_defense_benchmarks.catalogue import CATALOGUE
from scl_defense_benchmarks.report import gather, svg
from scl_defense_benchmarks.report.evidence import Gallery, Map, Opened, Picture, embedding, gallery
from scl_defense_benchmarks.report.exports import curve_lines
from scl_defense_benchmarks.report.gather import Series, percent, spanned
from scl_defense_benchmarks.report.read import Source
from scl_defense_benchmarks.results import AttackRow, EvaluationResult

SCHEMA = "scl-defense-report/1"
CHARTED = 40  # classes that a bar chart can hold, and a confusion matrix
MATRIX = 20
FIRST = 12  # pictures that stand in the page itself; the script brings the others
BALLS = 8


class Charts:
    """The charts of a page by key, for the script; each is drawn once more as a still picture."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}

    def lines(self, key: str, series: Sequence[tuple[str, Series]], norm: str, caption: str) -> dict[str, Any]:
        """Accuracy against eps; the first series is drawn strong, with its band."""
        x, y = f"{norm} radius eps (images in [0, 1])", "accuracy (% of test images)"
        lines, rows = [], []
        radii: dict[float, str] = {}
        for name, one in series:
            points = [(p.radius, 100 * p.accuracy, _scaled(p.low), _scaled(p.high)) for p in one.points]
            if one.kind != "minimal":
                radii |= {p.radius: p.eps for p in one.points}
                rows += [[name, p.eps, percent(p.accuracy), "-" if p.low is None else f"{low:.1f} to {high:.1f}"]
                         for p, (_, _, low, high) in zip(one.points, points, strict=True)]  # fmt: skip
            if one.kind != "worst":
                points = [(radius, accuracy, None, None) for radius, accuracy, _, _ in points]
            lines.append(svg.Line(name, points, step=one.kind == "minimal", strong=one.kind == "worst"))
        written = sorted(radii.items()) if all(one.kind != "minimal" for _, one in series) else None
        still = svg.line_chart(lines, title=caption, x_label=x, y_label=y, y_range=(0, 100), x_ticks=written)
        self.data[key] = {"kind": "lines", "x": x, "y": y, "range": [0, 100], "start": 0, "digits": 1,
                          "series": [_series(line, "eps") for line in lines]}  # fmt: skip
        return {"key": key, "still": still, "caption": caption, "note": "",
                "columns": ["series", "eps", "accuracy %", "95 % interval"], "rows": rows}  # fmt: skip

    def plain(self, key: str, names: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, caption: str,
              span: tuple[float, float] | None, digits: int) -> dict[str, Any]:  # fmt: skip
        """Lines without bands, over epochs."""
        lines = [svg.Line(name, [(a, b, None, None) for a, b in points]) for name, points in names.items()]
        still = svg.line_chart(lines, title=caption, x_label=x, y_label=y, y_range=span)
        self.data[key] = {"kind": "lines", "x": x, "y": y, "range": span and list(span), "start": 1, "digits": digits,
                          "series": [_series(line, x) for line in lines]}  # fmt: skip
        return {"key": key, "still": still, "caption": caption, "note": "", "columns": [], "rows": []}

    def dots(self, key: str, names: Mapping[str, Sequence[tuple[float, float, float | None, float | None]]], *, x: str,
             y: str, caption: str, joined: bool = False) -> dict[str, Any]:  # fmt: skip
        """Points (x, y, low, high) by name, in percent; joined to lines with bands, or each by itself."""
        lines = [svg.Line(name, points, joined=joined) for name, points in names.items()]
        every = [point for points in names.values() for point in points]
        across = None if joined else svg.room([point[0] for point in every])
        up = (0, 100) if joined else svg.room([value for point in every for value in point[1:] if value is not None])
        still = svg.line_chart(lines, title=caption, x_label=x, y_label=y, x_range=across, y_range=up)
        self.data[key] = {"kind": "lines", "x": x, "y": y, "range": up, "across": across, "digits": 1,
                          "start": 0 if joined else None, "series": [_series(line, x) for line in lines]}  # fmt: skip
        rows = [[name, f"{a:.4g}", f"{b:.1f}", "-" if low is None else f"{low:.1f} to {high:.1f}"]
                for name, points in names.items() for a, b, low, high in points]  # fmt: skip
        return {"key": key, "still": still, "caption": caption, "note": "",
                "columns": ["method", x, "accuracy %", "± 1 sd"], "rows": rows}  # fmt: skip

    def classes(self, key: str, rows: Sequence[gather.ClassRow], caption: str) -> dict[str, Any]:
        texts = [[f"{percent(row.clean)} % of {row.n}" for row in rows],
                 [f"{percent(row.robust)} % ({spanned(row.robust_interval)})" for row in rows]]  # fmt: skip
        names = _distinct([row.name for row in rows])
        spans = [row.robust_interval and [_scaled(end) for end in row.robust_interval] for row in rows]
        self.data[key] = {
            "kind": "bars", "x": "accuracy (% of the class)", "names": names,
            "series": [{"name": "clean", "values": [_scaled(row.clean) for row in rows], "texts": texts[0],
                        "spans": [None] * len(rows)},
                       {"name": "worst case", "values": [_scaled(row.robust) for row in rows], "texts": texts[1],
                        "spans": spans}],
        }  # fmt: skip
        return {"key": key, "still": svg.class_chart(rows, title=caption), "caption": caption, "note": "",
                "columns": CLASS_COLUMNS, "rows": class_cells(rows)}  # fmt: skip

    def map(self, key: str, found: Map, names: Sequence[str], caption: str) -> dict[str, Any]:
        still = svg.scatter([("clean", found.clean, found.labels), ("adversarial", found.adversarial, found.labels)],
                            names, title=caption, x_label=found.axes[0], y_label=found.axes[1])  # fmt: skip
        self.data[key] = {"kind": "map", "x": found.axes[0], "y": found.axes[1], "classes": list(names),
                          "clean": found.clean, "adversarial": found.adversarial, "labels": found.labels,
                          "indices": found.indices, "fooled": found.fooled}  # fmt: skip
        return {"key": key, "still": still, "caption": caption, "note": "", "columns": [], "rows": []}


def _series(line: svg.Line, x: str) -> dict[str, Any]:
    points = [[a, b, low, high, f"{x} {a:.4g}"] for a, b, low, high in line.points]
    return {"name": line.name, "points": points, "step": line.step, "strong": line.strong, "joined": line.joined,
            "band": line.joined and any(point[2] is not None for point in points)}  # fmt: skip


def _scaled(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 4)


def _distinct(names: Sequence[str]) -> list[str]:
    """Rows of a chart are told apart by name: classes that are called alike get their number."""
    return [name if names.count(name) == 1 else f"{name} [{place}]" for place, name in enumerate(names)]


CLASS_COLUMNS = ["class", "images", "clean %", "worst case %", "95 % interval"]


def class_cells(rows: Sequence[gather.ClassRow]) -> list[list[Any]]:
    return [[row.name, row.n, percent(row.clean), percent(row.robust), spanned(row.robust_interval)] for row in rows]


# -- one result


def view(source: Source, opened: Opened, charts: Charts, number: int, *, pictures: int, tsne: bool) -> dict[str, Any]:
    """What the template says of one result; its charts are added to ``charts``."""
    result, id = source.result, f"r{number}"
    rows = gather.classes(result)
    caption = f"Accuracy of each class; worst case within {result.norm} {result.eps}"
    shown = gallery(result, opened, pictures)
    flags = [_flag(flag) for flag in (*result.flags, *diagnostics.notes(result))]
    maps, missing = _maps(result, opened, tsne)
    return {
        "id": id,
        "name": source.name,
        "n": result.n,
        "conclusion": result.conclusion,
        "sentence": gather.verdict_sentence(result),
        "facts": _facts(result),
        "command": result.command,
        "versions": _versions(result),
        "attacks": list(_attack_rows(result)),
        "cascade": result.mode == "cascade",
        "left_out": result.left_out,
        "curves": _curves(id, source, charts),
        "upsets": [_upset(found) for found in gather.upsets(result)[:BALLS]],
        "class_chart": charts.classes(f"{id}-classes", rows, caption) if len(rows) <= CHARTED else None,
        "class_columns": CLASS_COLUMNS,
        "class_rows": class_cells(sorted(rows, key=lambda row: (row.robust is None, row.robust, row.name))),
        "confusion": _confusion(result),
        "gallery": shown and _gallery(result, shown),
        "maps": [charts.map(f"{id}-map-{place}", one, gather.class_names(result),
                            f"{one.method} of the encoder's features: dots are test images, crosses their adversarials")
                 | {"note": f"{len(one.labels)} images, the same share of each class. Adversarials: {one.about}."}
                 for place, one in enumerate(maps)],
        "flags": flags,
        "alarms": any(flag["severity"] in ("error", "warning") for flag in flags),
        "training": _training(id, opened, charts),
        "missing": (*opened.missing, *missing),
        "_gallery": shown,
        "_confusion": gather.confusion(result),
    }  # fmt: skip


def _maps(result: EvaluationResult, opened: Opened, tsne: bool) -> tuple[list[Map], list[str]]:
    """The maps, and why there is none: a stranger's network may raise whatever it likes."""
    try:
        return embedding(result, opened, tsne=tsne), []
    except UserError:
        raise
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return [], [f"The embedding map is left out: the network's features failed ({fault})."]


def _facts(result: EvaluationResult) -> list[tuple[str, Any]]:
    about, data = result.checkpoint or {}, result.data or {}
    seconds = sum(row.seconds for row in result.attacks)
    name = about.get("model") or about.get("network")
    return [
        ("threat model", f"{result.norm} eps {result.eps}, images in [0, 1], untargeted"),
        ("data", f"{data['name']}, {data.get('split', 'test')} split" if data.get("name") else "images handed over"),
        ("images", f"n = {result.n}" + (", a fixed subset" if data.get("indices_sha256") and _is_part(result) else "")),
        ("intervals", "Wilson, 95 %"),
        ("network", name if isinstance(name, str) else None),
        ("checkpoint", about.get("path")),
        ("classes", result.num_classes),
        ("seed of the attacks", result.seed),
        ("arithmetic", f"attacks {result.precision}, verdicts float32"),
        ("probes beside the battery", result.probes),
        ("mode", f"{result.mode}: " + ("each attack on what is left" if result.mode == "cascade" else
                                       "every attack gets every rightly classified image")),
        ("time of the attacks", f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:.3g} min"),
        ("made", result.created),
    ]  # fmt: skip


def _versions(result: EvaluationResult) -> list[tuple[str, Any]]:
    return [
        ("checkpoint, sha256", (result.checkpoint or {}).get("sha256")),
        ("data, sha256", (result.data or {}).get("fingerprint")),
        ("device", f"{result.device}, {result.threads} threads, batches of {result.batch_size}"),
        *result.versions.items(),
        *((f"plugin {one.get('plugin')}", f"{one.get('distribution')} {one.get('version')}") for one in result.plugins),
    ]


def _is_part(result: EvaluationResult) -> bool:
    return result.indices is not None and list(result.indices) != list(range(result.n))


_EMPTY = dict.fromkeys(("about", "ball", "distance", "passes", "rounded", "seconds", "status", "note"), "")


def _attack_rows(result: EvaluationResult) -> Iterator[dict[str, Any]]:
    """The clean accuracy, then ball by ball, the main one first: its attacks, and their worst case."""
    low, high = result.clean_interval
    yield {**_EMPTY, "kind": "clean", "label": "none (clean)", "value": result.clean_accuracy,
           "accuracy": percent(result.clean_accuracy), "interval": spanned(result.clean_interval),
           "bar": svg.interval_bar(result.clean_accuracy, low, high),
           "broken": f"{result.n - result.clean_correct} wrong"}  # fmt: skip
    for norm, eps in gather.balls(result):
        for row in (row for row in result.attacks if (row.norm, row.eps) == (norm, eps)):
            yield _attack_row(row)
        for case in (case for case in result.worst_cases if (case.norm, case.eps) == (norm, eps)):
            main = (norm, eps) == (result.norm, result.eps)
            yield {**_EMPTY, "kind": "worst", "label": "worst case" + (", the main ball" if main else ""),
                   "ball": f"{norm} {eps}", "value": -1 if case.robust_accuracy is None else case.robust_accuracy,
                   "accuracy": percent(case.robust_accuracy), "interval": spanned(case.interval),
                   "bar": svg.interval_bar(case.robust_accuracy, *(case.interval or (None, None))),
                   "broken": case.broken, "note": case.note}  # fmt: skip


def _attack_row(row: AttackRow) -> dict[str, Any]:
    restarts = f", {row.restarts} restarts" if row.restarts > 1 else ""
    restarts += f", {row.precision}" if row.precision != "fp32" else ""
    return {
        "kind": "attack", "label": _breakable(row.label),
        "about": f"{row.library}, {row.access}{', minimal' if row.minimal else ''}{restarts}",
        "ball": f"{row.norm} {row.eps}",
        "value": -1 if row.robust_accuracy is None else row.robust_accuracy,
        "accuracy": percent(row.robust_accuracy), "interval": spanned(row.interval),
        "bar": svg.interval_bar(row.robust_accuracy, *(row.interval or (None, None))),
        "broken": f"{row.broken} of {row.attacked}",
        "distance": "-" if row.median_distance is None else f"{row.median_distance:.3g}",
        "passes": f"{row.forwards:.4g} + {row.backwards:.4g}",
        "rounded": "-" if row.survive_rounding is None else f"{row.survive_rounding:.0%}",
        "seconds": f"{row.seconds:.3g}", "status": row.status, "note": row.note,
    }  # fmt: skip


def _breakable(label: str) -> Markup:
    """A label that may be broken after its colons."""
    return Markup(":<wbr>").join(label.split(":"))


def _curves(id: str, source: Source, charts: Charts) -> list[dict[str, Any]]:
    found = []
    for norm, series in curve_lines([source]):
        minimal = any(one.kind == "minimal" for _, one in series)
        worst = any(one.kind == "worst" for _, one in series)
        caption = f"Accuracy against the {norm} radius" + (", with the worst case's 95 % interval" if worst else "")
        note = "Steps: what one search for the nearest examples leaves; an attack of that very ball can find more."
        note = note if minimal else ""
        found.append(charts.lines(f"{id}-curve-{norm}", series, norm, caption) | {"note": note})
    return found


def _upset(found: gather.Upset) -> dict[str, Any]:
    title = f"Images by the set of attacks that broke them, within {found.norm} {found.eps}"
    return {
        "title": title, "still": svg.upset_chart(found, title=title), "survived": found.survived, "wrong": found.wrong,
        "others": found.others, "totals": [[name, *both] for name, both in found.totals.items()],
        "sets": [[" + ".join(members), count] for members, count in found.sets],
    }  # fmt: skip


def _confusion(result: EvaluationResult) -> dict[str, Any] | None:
    found = gather.confusion(result)
    counts, names = found[gather.WORST], gather.class_names(result)
    if not counts:
        return None
    caption = (f"Within {result.norm} {result.eps}; one label an image, the one that most attacks gave it "
               f"({sum(counts.values())} images).")  # fmt: skip
    most = max(counts.values())
    pairs = [[names[own], names[other], count] for (own, other), count in _ranked(counts)[:25]]
    matrix = [(name, [(counts[own, other], -(-5 * counts[own, other] // most)) for other in range(len(names))])
              for own, name in enumerate(names)] if len(names) <= MATRIX else None  # fmt: skip
    return {"caption": caption, "names": names, "matrix": matrix, "pairs": pairs}


def _ranked(counts: Mapping[tuple[int, int], int]) -> list[tuple[tuple[int, int], int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _gallery(result: EvaluationResult, shown: Gallery) -> dict[str, Any]:
    cards = [_card(result, picture, shown.triple) for picture in shown.pictures]
    return {"triple": shown.triple, "shown": len(cards), "total": shown.total, "first": cards[:FIRST], "cards": cards}


_OUTCOMES = {"broken": "fools", "robust": "held", "unmoved": "not moved", "beyond eps": "fools beyond eps"}


def _card(result: EvaluationResult, picture: Picture, triple: bool) -> dict[str, Any]:
    names = gather.class_names(result)

    def named(number: int) -> str:
        return names[number] if 0 <= number < len(names) else "no class"

    clean, adversarial = named(picture.clean), named(picture.adversarial)
    first, second = (f" {value:.0%}" for value in picture.confidence) if picture.confidence else ("", "")
    facts = [f"image {picture.index}", f"true class {named(picture.label)}", f"{picture.attack} ({picture.ball})",
             _OUTCOMES.get(picture.outcome, picture.outcome)]  # fmt: skip
    if picture.distance is not None:
        facts.append(f"{picture.norm} distance {picture.distance:.3g}")
    if picture.times is not None:
        facts.append(f"perturbation ×{picture.times:.3g}")
    what = "original, magnified perturbation and adversarial image" if triple else "adversarial image"
    return {
        "data": picture.data,
        "alt": f"Image {picture.index}, {what}: predicted {clean}, then {adversarial}",
        "look": f"{'three' if triple else 'one'}{' small' if max(picture.shape) <= 96 else ''}",
        "clean": clean + first,
        "adversarial": adversarial + second,
        "tone": "changed" if picture.adversarial != picture.label else "",
        "text": "; ".join(facts),
        "attack": picture.attack,
        "label": named(picture.label),
        "outcome": _OUTCOMES.get(picture.outcome, picture.outcome),
    }


def _flag(flag: diagnostics.Flag) -> dict[str, Any]:
    entry = CATALOGUE.get(flag.id)
    return {
        "id": flag.id, "severity": flag.severity, "what": flag.what, "why": flag.why, "remedy": flag.remedy,
        "attacks": flag.attacks, "measured": None if flag.measured is None else f"{flag.measured:.4g}",
        "threshold": entry.threshold if entry else None, "source": entry.source if entry else None,
    }  # fmt: skip


def _training(id: str, opened: Opened, charts: Charts) -> list[dict[str, Any]]:
    found, lines = [], opened.metrics

    def column(name: str, scale: float) -> list[tuple[float, float]]:
        return [(line["epoch"], scale * line[name]) for line in lines if name in line]

    accuracies = {"validation, clean": column("val_clean", 100), "validation, short PGD": column("val_robust", 100)}
    accuracies = {name: points for name, points in accuracies.items() if points}
    if accuracies:
        found.append(charts.plain(f"{id}-validation", accuracies, x="epoch", y="accuracy (%)", span=(0, 100), digits=1,
                                  caption="Validation accuracy over the epochs of training"))  # fmt: skip
    if loss := column("loss", 1):
        found.append(charts.plain(f"{id}-loss", {"training loss": loss}, x="epoch", y="loss", span=None, digits=4,
                                  caption="Training loss over the epochs"))  # fmt: skip
    return found


# -- several results


def compare(sources: Sequence[Source], charts: Charts) -> dict[str, Any]:
    """All results in one table, pair by pair, and their curves in one picture."""
    results = [source.result for source in sources]
    rows: list[list[str]] = [["clean", *(_number(r.clean_accuracy, r.clean_interval) for r in results)]]
    for norm, eps in dict.fromkeys(ball for result in results for ball in gather.balls(result)):
        cases = [next((c for c in r.worst_cases if (c.norm, c.eps) == (norm, eps)), None) for r in results]
        rows.append([f"worst case, {norm} {eps}", *map(_left, cases)])
        inside = [{row.label: row for row in r.attacks if (row.norm, row.eps) == (norm, eps)} for r in results]
        for label in dict.fromkeys(label for one in inside for label in one):
            given = [one.get(label) for one in inside]
            rows.append([f"{gather.bare(label)}, {norm} {eps}",
                         *map(_left, given)])  # fmt: skip
    rows.append(["images", *(str(r.n) for r in results)])
    rows.append(["verdict", *(r.conclusion.kind.replace("-", " ") for r in results)])
    pairs = [[one.better, one.than, f"{100 * one.paired.difference:+.1f}",
              f"{100 * one.paired.low:+.1f} to {100 * one.paired.high:+.1f}", one.only_better, one.only_than,
              f"{one.p:.2g}", f"{one.holm:.2g}"] for one in gather.pairings(sources)]  # fmt: skip
    return {
        "columns": ["", *(source.name for source in sources)], "rows": rows, "pairs": pairs,
        "warnings": gather.differences(sources),
        "charts": [charts.lines(f"all-{norm}", series, norm, f"Accuracy against the {norm} radius, worst cases")
                   for norm, series in curve_lines(sources)],
    }  # fmt: skip


def _left(part: Any) -> str:
    """What a row or a worst case leaves; a dash where there is none."""
    return "-" if part is None else _number(part.robust_accuracy, part.interval)


def _number(accuracy: float | None, interval: Any) -> str:
    return "-" if accuracy is None else f"{percent(accuracy)} ({spanned(interval)})"


# -- the text


def results_page(sources: Sequence[Source], opened: Sequence[Opened], *, pictures: int, tsne: bool) -> str:
    """The whole page of one result or several."""
    charts, many = Charts(), len(sources) > 1
    views = [view(source, beside, charts, number, pictures=pictures, tsne=tsne)
             for number, (source, beside) in enumerate(zip(sources, opened, strict=True))]  # fmt: skip
    title = f"Robustness of {sources[0].name}" if not many else f"Robustness of {len(sources)} checkpoints"
    contents = [("side-by-side", "Side by side")] if many else []
    for one in views:
        if many:
            contents.append((one["id"], one["name"]))
        else:
            parts = ("about", "attacks", "curve", "broke", "classes", "gallery", "map", "diagnostics", "training")
            words = ("Measured", "Attacks", "Curve", "Which broke which", "Classes", "Pictures", "Embedding",
                     "Diagnostics", "Training")  # fmt: skip
            contents += [(f"{one['id']}-{part}", word) for part, word in zip(parts, words, strict=True)]
    payload = {
        "charts": charts.data,
        "galleries": {one["id"]: {"classes": gather.class_names(source.result), "pictures": one["gallery"]["cards"]}
                      for one, source in zip(views, sources, strict=True) if one["gallery"]},
        "confusions": {one["id"]: {
            "classes": gather.class_names(source.result), "matrix": source.result.num_classes <= MATRIX,
            "attacks": {label: [[*pair, count] for pair, count in _ranked(counts)]
                        for label, counts in one["_confusion"].items() if label != gather.WORST}}
                       for one, source in zip(views, sources, strict=True)},
    }  # fmt: skip
    side = compare(sources, charts) if many else None
    contents.append(("reading", "How to read"))
    return render("results.html.j2", title=title, kind="Robustness report", contents=contents, payload=payload,
                  views=views, many=many, compare=side)  # fmt: skip


def render(template: str, *, payload: Mapping[str, Any], **values: Any) -> str:
    """A template of ``assets/`` with style, scripts and data in it, under a policy that lets no other script run."""
    from scl_defense import __version__

    style, script, library = asset("report.css"), asset("report.js"), chart_library()
    policy = (f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; "
              "img-src data:; base-uri 'none'; form-action 'none'")  # fmt: skip
    text = _environment().get_template(template).render(
        version=__version__, policy=policy, style=Markup(style), script=Markup(script), library=Markup(library),
        payload=Markup(embedded({"schema": SCHEMA, **payload})), **values,
    )  # fmt: skip
    return text.translate(UNSEEN) + "\n"


# Signs that turn the direction of what follows, or cannot be seen: a name must not rewrite the line it stands in.
_CONTROLS = [*range(9), 11, 12, *range(14, 32), *range(127, 160)]
_TURNING = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
UNSEEN = dict.fromkeys([*_CONTROLS, *_TURNING], "\ufffd")
_ESCAPED = re.compile("|".join(rf"\\u{sign:04x}" for sign in UNSEEN))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element: no sign in it can end the element or open a comment."""
    text = _ESCAPED.sub(r"\\ufffd", json.dumps(value, separators=(",", ":"), allow_nan=False))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def asset(name: str) -> str:
    text = (files("scl_defense_benchmarks.report") / "assets" / name).read_text(encoding="utf-8").strip()
    # It must not close the element it stands in, nor be changed on its way (its hash is in the policy).
    assert not re.search("</(script|style)", text.lower()) and text == text.translate(UNSEEN), name
    return text


@cache
def chart_library() -> str:
    """Chart.js as its authors minified it, without the pointer to a source map that is not here."""
    text = (files("scl_defense_benchmarks.report") / "vendor" / "chart.umd.min.js").read_text(encoding="utf-8")
    lines = [line for line in text.strip().splitlines() if not line.startswith("//# sourceMappingURL")]
    made = "\n".join(lines)
    assert "</script" not in made.lower() and made == made.translate(UNSEEN)
    return made


@cache
def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def load(name: str) -> str:
        return (files("scl_defense_benchmarks.report") / "assets" / name).read_text(encoding="utf-8")

    return Environment(loader=FunctionLoader(load), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)  # fmt: skip
