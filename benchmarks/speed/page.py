"""docs/speed.md: its tables are made from the result files, between markers; the words around them are anybody's."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scl_defense.checkpoint import atomic_write_bytes
from scl_defense.errors import UserError
from speed.bars import Verdict, verdicts

Content = Mapping[str, Any]


def marked(name: str) -> tuple[str, str]:
    return f"<!-- speed:{name} -->", f"<!-- /speed:{name} -->"


def replaced(page: str, tables: Mapping[str, str]) -> str:
    """``page`` with what stands between the markers of every table replaced.

    Raises :class:`UserError` when a marker is missing or stands twice: nothing is guessed.
    """
    for name, table in tables.items():
        opening, closing = marked(name)
        if page.count(opening) != 1 or page.count(closing) != 1 or page.index(opening) > page.index(closing):
            raise UserError(
                f"the page needs {opening} and, after it, {closing}, each once; put them where '{name}' belongs"
            )
        before, rest = page.split(opening)
        page = f"{before}{opening}\n\n{table.strip()}\n\n{closing}{rest.split(closing)[1]}"
    return page


def rewrite(path: Path, results: Mapping[str, Content], precision: Path | None = None) -> None:
    """Put the tables of ``results`` (part -> its file) into the page; a part that was not measured keeps its table."""
    if not path.is_file():
        raise UserError(f"page '{path}' does not exist; give the page that has the markers, or none")
    made = tables(results)
    if precision is not None and precision.is_file():
        made["precision"] = _precision(json.loads(precision.read_text()))
    page = path.read_text()
    changed = replaced(page, made)
    if changed != page:
        atomic_write_bytes(path, changed.encode())


def tables(results: Mapping[str, Content]) -> dict[str, str]:
    made = {
        part: _conditions(results[part]) + "\n\n" + make(results[part]["rows"])
        for part, make in _PARTS.items()
        if part in results
    }
    if results:
        made["bars"] = _bars(verdicts({part: content["rows"] for part, content in results.items()}))
    return made


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows])


def _conditions(content: Content) -> str:
    machine, settings = content["machine"], content.get("settings", {})
    versions = content["versions"]
    named = ["torch", "torchattacks", "adversarial-robustness-toolbox", "foolbox", "adv-lib", "pyautoattack",
             "kornia", "lightly", "pytorch-metric-learning"]  # fmt: skip
    said = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    how = ", quick" if settings.get("quick") else ""
    how += ", stopped before its end" if settings.get("stopped") else ""
    anew = "".join(
        f" Measured anew on {one['started'][:10]}, load before {one['load_before']}: {'; '.join(one['comparisons'])}."
        for one in content.get("again", ())
    )
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, load before "
        f"{machine['load_before']}; {content['created'][:10]}{how}; {said}.{anew}"
    )


def _seconds(row: Content) -> str:
    if row["status"] != "ok":
        return row["status"].partition(":")[0]
    return f"{_number(row['median'])} s ({_number(row['best'])} to {_number(row['worst'])})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _attacks(rows: Sequence[Content]) -> str:
    """Per network a table of all tasks; a line a task and side."""
    texts = []
    for case in (row for row in rows if row["kind"] == "case"):
        kind = (
            "" if case["accurate"] else "; trained too briefly for its accuracy to mean anything: a case for time alone"
        )
        texts.append(
            f"**{case['case']}** on {case['data']}: {case['parameters']:,} parameters, clean accuracy "
            f"{case['clean']:.3f}, eps {case['eps']}{kind}."
        )
        found = [row for row in rows if row["kind"] == "attack" and row["case"] == case["case"]]
        best = {r["task"]: r["images_per_s"] for r in found if r["side"] == "torchattacks" and r["status"] == "ok"}
        lines = []
        for row in found:
            first = best.get(row["task"])
            over = "-" if row["status"] != "ok" or not first else f"{row['images_per_s'] / first:.2f}"
            gap = row.get("ours auto minus this") or row.get("ours fp32 minus this")
            lines.append([
                row["task"], row["side"], str(row["images"]), _seconds(row), _number(row.get("images_per_s")), over,
                f"{row['robust']:.3f}" if "robust" in row else "-",
                f"{gap[0]:+.3f} [{gap[1]:+.3f}, {gap[2]:+.3f}]" if gap and not row["side"].startswith("ours") else "",
                _share(row.get("share")) if row["side"].startswith("ours") else "",
                _share(row.get("share_side_by_side")) if row["side"].startswith("ours") else "",
            ])  # fmt: skip
        head = ["task", "side", "images", "time (spread)", "images/s", "over torchattacks", "robust, verified",
                "ours minus this, 95 %", "of the floor", "of a batch on every core"]  # fmt: skip
        texts.append(table(head, lines))
    floors = [row for row in rows if row["kind"] == "floor" and row["status"] == "ok"]
    if floors:
        texts.append("The floor: passes alone, parameters frozen, of one image.")
        lines = [
            [r["case"], r["floor"], "forward and back" if r["pass"] == "both" else "forward",
             f"{1e3 * r['median'] / r['steps'] / r['images']:.3f} ms"] for r in floors
        ]  # fmt: skip
        texts.append(table(["network", "how", "pass", "time"], lines))
    return "\n\n".join(texts)


def _steps(rows: Sequence[Content]) -> str:
    head = ["network", "precision", "step", "time (spread)", "images/s", "over CE", "over the floor of its passes",
            "generator over its floor"]  # fmt: skip
    return table(head, ([
        r["network"], r["precision"], r["method"], _seconds(r), _number(r.get("images_per_s")),
        "1" if r["method"] == "ce" else _number(r.get("over ce")), _number(r.get("over floor")),
        _number(r.get("generator over floor")),
    ] for r in rows))  # fmt: skip


def _losses(rows: Sequence[Content]) -> str:
    head = ["loss", "rows", "side", "time (spread)", "over ours", "peak memory", "gradient differs by"]
    return table(head, ([
        r["loss"], str(r["rows"]), r["side"], _seconds(r), "1" if r["side"] == "ours" else _number(r.get("over ours")),
        "-" if r.get("peak_mib") is None else f"{r['peak_mib']:.0f} MiB",
        f"{r['gradient_difference']:.0e}" if "gradient_difference" in r else "",
    ] for r in rows))  # fmt: skip


def _augment(rows: Sequence[Content]) -> str:
    sides = [row for row in rows if row["kind"] == "augment"]
    text = table(["recipe", "images", "side", "time (spread)", "images/s", "over ours"], ([
        r["recipe"], "x".join(map(str, r["shape"])), r["side"], _seconds(r), _number(r.get("images_per_s")),
        "1" if r["side"] == "ours" else _number(r.get("over ours")),
    ] for r in sides))  # fmt: skip
    beside = [row for row in rows if row["kind"] == "augment beside step"]
    said = [f"{r['recipe']}: {_share(r.get('share of step'))} of a small-CNN step" for r in beside]
    return text + (f"\n\nOne view of a batch beside a cross-entropy step: {'; '.join(said)}." if said else "")


def _startup(rows: Sequence[Content]) -> str:
    return table(["", "what", "time (spread)"], ([r["kind"], r["what"], _seconds(r)] for r in rows))


def _bars(found: Sequence[Verdict]) -> str:
    def cells(one: Verdict) -> list[str]:
        sign = "at least" if one.bar.least else "at most"
        if one.measured is None:
            return [one.bar.text, f"{sign} {one.bar.limit:g}", "-", "not measured", "-", ""]
        beside = "; ".join(filter(None, [one.measured.beside, one.measured.fault]))
        return [one.bar.text, f"{sign} {one.bar.limit:g}", f"{one.measured.value:.2f}", one.state,
                _share(one.measured.share), beside]  # fmt: skip

    met = sum(one.state == "met" for one in found)
    text = table(["bar", "asked", "measured", "", "of the floor", "beside"], map(cells, found))
    return f"{met} of {len(found)} bars met.\n\n{text}"


def _precision(content: Content) -> str:
    """The file of precision.py; ``rows``, where it has them: what the command found with each of its choices."""
    paired, names = content["lines"], {"alone": "bfloat16 alone", "auto": "bfloat16, then float32 in doubt"}
    lines = [
        [
            name,
            names[how],
            f"{one['points_less']:+.2f} [{one['interval'][0]:+.2f}, {one['interval'][1]:+.2f}]",
            str(one["images"]),
            _number(one["time_ratio"]),
            "yes" if one["within"] else "no",
        ]
        for name, ways in content["families"].items()
        for how, one in ways.items()
    ]
    networks = ", ".join(dict.fromkeys(line["network"] for line in paired))
    text = f"Against float32: {networks}; {len({line['seed'] for line in paired})} networks of each.\n\n"
    text += table(["attack", "run in", "points less, 95 %", "images", "time over fp32", "within 0.2 points"], lines)
    asked: dict[tuple[str, str], list[Content]] = {}
    for row in content.get("rows", ()):
        asked.setdefault((row["attack"], row["asked"]), []).append(row)
    if asked:
        text += "\n\nWhat the command found with each choice, the mean over the same networks:\n\n"
        cells = (
            [attack, choice, rows[0]["ran"], f"{sum(r['robust_accuracy'] for r in rows) / len(rows):.4f}",
             _number(sum(r["seconds"] for r in rows))]
            for (attack, choice), rows in asked.items()
        )  # fmt: skip
        text += table(["attack", "asked", "ran in", "robust accuracy", "seconds"], cells)
    return text


_PARTS: dict[str, Callable[[Sequence[Content]], str]] = {
    "attacks": _attacks, "steps": _steps, "losses": _losses, "augment": _augment, "startup": _startup,
}  # fmt: skip
