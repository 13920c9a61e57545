"""What lies beside the page: CSV, Markdown and LaTeX tables, the curve as PNG and PDF, RobustBench's model info."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scl_defense.shown import COLOURS, DASHES, MARKERS, WIDTH, new_figure, styled
from scl_defense_benchmarks.report.gather import pairings, panels, percent, spanned, verdict_sentence
from scl_defense_benchmarks.report.read import Source
from scl_defense_benchmarks.results import EvaluationResult

COLUMNS = ("result", "kind", "attack", "library", "access", "norm", "eps", "minimal", "status", "n", "accuracy", "low",
           "high", "attacked", "broken", "found", "unmoved", "median_distance", "forwards", "backwards", "seconds",
           "data", "seed", "mode", "checkpoint_sha256", "verdict")  # fmt: skip


def comma(sources: Sequence[Source]) -> str:
    """A line for the clean accuracy, each attack and each worst case; shares in [0, 1], an empty cell is unknown."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for source in sources:
        writer.writerows({name: _cell(value) for name, value in line.items()} for line in _plain(source))
    return stream.getvalue()


def _cell(value: Any) -> Any:
    """A spreadsheet runs a text that begins like a formula; names come from strangers."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value


def _plain(source: Source) -> list[dict[str, Any]]:
    result = source.result
    same = {
        "result": source.name,
        "n": result.n,
        "data": (result.data or {}).get("name"),
        "seed": result.seed,
        "mode": result.mode,
        "checkpoint_sha256": (result.checkpoint or {}).get("sha256"),
        "verdict": result.conclusion.kind,
    }
    low: float | None
    high: float | None
    low, high = result.clean_interval
    lines = [{**same, "kind": "clean", "accuracy": result.clean_accuracy, "low": low, "high": high,
              "broken": result.n - result.clean_correct}]  # fmt: skip
    for row in result.attacks:
        low, high = row.interval or (None, None)
        own = ("library", "access", "norm", "eps", "minimal", "status", "attacked", "broken", "found", "unmoved",
               "median_distance", "forwards", "backwards", "seconds")  # fmt: skip
        lines.append({**same, "kind": "attack", "attack": row.label, "accuracy": row.robust_accuracy, "low": low,
                      "high": high, **{name: getattr(row, name) for name in own}})  # fmt: skip
    for case in result.worst_cases:
        low, high = case.interval or (None, None)
        lines.append({**same, "kind": "worst case", "attack": " ".join(case.attacks), "norm": case.norm,
                      "eps": case.eps, "accuracy": case.robust_accuracy, "low": low, "high": high,
                      "broken": case.broken, "unmoved": case.unmoved})  # fmt: skip
    return lines


# -- tables for a text


def _rows(result: EvaluationResult) -> list[tuple[str, str, str, str, str]]:
    """attack, ball, accuracy, interval, status."""
    found = [("none (clean)", "", percent(result.clean_accuracy), spanned(result.clean_interval), "")]
    found += [(row.label, f"{row.norm}:{row.eps}", percent(row.robust_accuracy), spanned(row.interval), row.status)
              for row in result.attacks]  # fmt: skip
    found += [("worst case", f"{case.norm}:{case.eps}", percent(case.robust_accuracy), spanned(case.interval), "")
              for case in result.worst_cases]  # fmt: skip
    return found


_TITLES = ("attack", "ball", "accuracy %", "95 % interval", "status")


def _about(result: EvaluationResult) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return [
        verdict_sentence(result),
        f"n = {result.n}, seed {result.seed}, {result.mode} attacks, 95 % Wilson intervals, worst case per image",
        *([f"command: {result.command}"] if result.command else []),
        *([f"versions: {versions}"] if versions else []),
    ]


def markdown(sources: Sequence[Source]) -> str:
    parts = ["# Robustness report", ""]
    for source in sources:
        parts += [f"## {_md(source.name)}", "", *(f"{_md(text)}\n" for text in _about(source.result))]
        parts += ["| " + " | ".join(_TITLES) + " |", "|---|---|---:|---|---|"]
        parts += ["| " + " | ".join(map(_md, row)) + " |" for row in _rows(source.result)]
        parts.append("")
    if found := pairings(sources):
        parts += ["## Compared image by image", ""]
        parts += [
            "| higher | lower | difference, points | 95 % interval | p (McNemar, Holm) |",
            "|---|---|---:|---|---:|",
        ]
        for one in found:
            span = f"{100 * one.paired.low:+.1f} to {100 * one.paired.high:+.1f}"
            names = f"{_md(one.better)} | {_md(one.than)}"
            parts.append(f"| {names} | {100 * one.paired.difference:+.1f} | {span} | {one.holm:.3g} |")
        parts.append("")
    return "\n".join(parts)


_MD = {ord(sign): f"\\{sign}" for sign in "\\`*_[]|#!"} | {ord("<"): "&lt;", ord(">"): "&gt;", ord("&"): "&amp;",
                                                          ord("\n"): " ", ord("\r"): " "}  # fmt: skip


def _md(text: str) -> str:
    return text.translate(_MD)


_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$",
        "\n": " ", "\r": " "}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def latex(sources: Sequence[Source]) -> str:
    """One booktabs table a result."""
    parts = [r"% needs \usepackage{booktabs}"]
    for source in sources:
        facts = [source.name, *_about(source.result)]
        parts += [f"% {' '.join(fact.split())}" for fact in facts]
        parts += [r"\begin{tabular}{llrll}", r"\toprule", " & ".join(map(_tex, _TITLES)) + r" \\", r"\midrule"]
        parts += [" & ".join(map(_tex, row)) + r" \\" for row in _rows(source.result)]
        parts += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(parts)


# -- RobustBench


def model_info(source: Source) -> str:
    """A model-info file as RobustBench keeps them: accuracies in percent, as texts; ``null`` is for the author to fill.

    ``autoattack_acc`` is there only where the attack ``autoattack`` was run to its end in the main ball; ``external``
    holds the worst case over all attacks, where that is lower or AutoAttack was not run. What RobustBench has no field
    for stands under ``scl_defense``.
    """
    result, about = source.result, source.result.checkpoint or {}
    case = result.worst_case
    auto = [row.robust_accuracy for row in result.attacks if row.name.rpartition(":")[2] == "autoattack"
            and (row.norm, row.eps) == (result.norm, result.eps) and row.status == "ok" and result.mode != "cascade"
            and row.robust_accuracy is not None]  # fmt: skip
    official = min(auto, default=None)
    worst = None if case is None else case.robust_accuracy
    lower = worst is not None and (official is None or worst < official)
    content = {
        "link": None,
        "name": source.name,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": (result.data or {}).get("name"),
        "venue": None,
        "architecture": about.get("model") or about.get("network"),
        "eps": result.eps,
        "clean_acc": percent(result.clean_accuracy, 2),
        "reported": None,
        "autoattack_acc": None if official is None else percent(official, 2),
        **({"external": percent(worst, 2)} if lower else {}),
        "unreliable": result.conclusion.kind == "not-trustworthy",
        "footnote": f"Evaluated by scl-defense on {result.n} test images: {result.conclusion.text}.",
        "scl_defense": {
            "norm": result.norm,
            "n": result.n,
            "seed": result.seed,
            "worst_case": worst,
            "interval": None if case is None or case.interval is None else list(case.interval),
            "attacks": [row.label for row in result.attacks],
            "verdict": result.conclusion.kind,
            "checkpoint_sha256": about.get("sha256"),
            "versions": dict(result.versions),
        },
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


# -- the curve


def curve_files(sources: Sequence[Source], stem: Path) -> list[Path]:
    """``STEM-curve.png`` and ``.pdf``: accuracy against eps, a panel a norm; nothing where no curve was measured."""
    from scl_defense.checkpoint import atomic_write_bytes

    drawn = curve_lines(sources)
    if not drawn:
        return []
    with styled():
        entries = max(len(lines) for _, lines in drawn)
        figure = new_figure(WIDTH * min(len(drawn), 2), 2.3 + 0.13 * entries)
        draw_curves(figure.subplots(1, len(drawn), squeeze=False)[0], drawn)
        made = []
        for end, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
            stream = io.BytesIO()
            figure.savefig(stream, format=end[1:], metadata=metadata)
            path = stem.with_name(f"{stem.name}-curve{end}")
            atomic_write_bytes(path, stream.getvalue())
            made.append(path)
    return made


def draw_curves(panes: Sequence[Any], drawn: Sequence[tuple[str, Sequence[tuple[str, Any]]]]) -> None:
    """The lines of :func:`curve_lines` into matplotlib axes, a panel a norm."""
    for pane, (norm, lines) in zip(panes, drawn, strict=True):
        for place, (name, series) in enumerate(lines):
            xs = [point.radius for point in series.points]
            ys = [100 * point.accuracy for point in series.points]
            look = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place % len(DASHES)], "label": name}
            if series.kind == "minimal":
                pane.step(xs, ys, where="post", **look)
                continue
            pane.plot(xs, ys, marker=MARKERS[place % len(MARKERS)], markersize=3, **look)
            banded = [point for point in series.points if point.low is not None and point.high is not None]
            if series.kind == "worst" and banded:
                pane.fill_between([p.radius for p in banded], [100 * (p.low or 0) for p in banded],
                                  [100 * (p.high or 0) for p in banded], color=look["color"], alpha=0.15,
                                  linewidth=0)  # fmt: skip
        pane.set_xlabel(f"{norm} radius eps (images in [0, 1])")
        pane.set_ylabel("accuracy (% of test images)")
        pane.set_ylim(0, 101)
        pane.set_xlim(left=0)
        pane.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=1)


def curve_lines(sources: Sequence[Source]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(norm, lines): one result: all its series; several: of each the worst case, or its searches."""
    norms: dict[str, list[tuple[str, Any]]] = {}
    for source in sources:
        for panel in panels(source.result):
            for series in panel.series:
                if len(sources) == 1:
                    norms.setdefault(panel.norm, []).append((series.name, series))
                elif series.kind != "attack":
                    named = source.name if series.kind == "worst" else f"{source.name}, {series.name}"
                    norms.setdefault(panel.norm, []).append((named, series))
    return list(norms.items())
