"""Rows from the lines of a results file, and the tables: Markdown, CSV and LaTeX, each with what made it."""

import csv
import io
import statistics as stdlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scl_defense_benchmarks.statistics import Paired, holm, mean_sd, paired_by_image, paired_by_seed
from scl_defense_benchmarks.study.cells import Cell
from scl_defense_benchmarks.study.spec import Spec, arm_name

CLEAN, WORST = "clean", "worst case"
SHOWN_VERSIONS = ("scl-defense", "python", "torch", "torchattacks", "adversarial-robustness-toolbox")


@dataclass(frozen=True)
class About:
    """A study as far as it is done. failed: cell -> reason. missing: cells that nobody has run."""

    spec: Spec
    command: str
    lines: tuple[Mapping[str, Any], ...]
    failed: Mapping[str, str]
    missing: tuple[str, ...]

    def header(self) -> list[str]:
        """What made the numbers, so that they can be made again; one fact a line."""
        spec, lines = self.spec, self.lines
        versions = {tuple(f"{name} {line['versions'].get(name, '?')}" for name in SHOWN_VERSIONS) for line in lines}
        machines = {f"{m['processor']}, {m['cores']} cores, {m['threads']} threads a cell, {m['device']}"
                    for m in (line["machine"] for line in lines)}  # fmt: skip
        planned = len(lines) + len(self.failed) + len(self.missing)
        texts = [
            f"command: {self.command}",
            f"versions: {_listed(', '.join(found) for found in versions)}",
            f"seeds: {', '.join(str(seed) for seed in spec.seeds)}",
            f"test images: n = {_listed(line['n'] for line in lines)}",
            f"threat: {_listed(line['threat'] for line in lines)}",
            f"machine: {_listed(machines)}",
            f"batteries: {'; '.join(f'{battery.name}: {battery.attacks}' for battery in spec.batteries)}",
            f"cells: {len(lines)} of {planned} done, {len(self.failed)} failed, {len(self.missing)} not run",
        ]
        return [f"{spec.title}" + (f". {spec.question}" if spec.question else ""), *texts]


@dataclass(frozen=True)
class Comparison:
    """One arm against another, in worst-case accuracy. by_seed, by_image: ``None`` where nothing can be said."""

    better: str
    than: str
    difference: float
    by_seed: Paired | None
    by_image: Paired | None
    holm: float | None = None

    @property
    def shown(self) -> bool:
        """Both intervals lie above 0 and Holm's p is below 0.05: only then may the summary say "beats"."""
        both = self.by_seed is not None and self.by_image is not None
        return both and self.by_seed.positive and self.by_image.positive and self.holm is not None and self.holm < 0.05

    @property
    def shown_worse(self) -> bool:
        both = self.by_seed is not None and self.by_image is not None
        return both and self.by_seed.high < 0 and self.by_image.high < 0 and self.holm is not None and self.holm < 0.05


@dataclass
class Row:
    """One arm in one context. lines: seed -> its line of the results file."""

    context: str
    arm: str
    label: str
    role: str | None
    planned: int
    lines: dict[int, Mapping[str, Any]]
    against: Comparison | None = None

    def measures(self) -> dict[str, list[float]]:
        """Measure -> one number a seed, in order of seeds; seeds in which an attack failed are left out of its list."""
        found: dict[str, list[float]] = {}
        for line in self.lines.values():
            for name, value in _measured(line).items():
                found.setdefault(name, [])
                if value is not None:
                    found[name].append(value)
        return found

    def mean(self, measure: str) -> float | None:
        values = self.measures().get(measure)
        return stdlib.fmean(values) if values else None

    @property
    def generator(self) -> str | None:
        return next((line["generator"] for line in self.lines.values()), None)

    def costs(self) -> list[float]:
        """Backward image passes per training image over the whole run, fine-tuning too: one number a seed."""
        found = []
        for line in self.lines.values():
            parts = [line, *([line["finetune"]] if line["finetune"] else [])]
            if all(part["backwards"] is not None for part in parts):
                found.append(sum(part["backwards"] * part["epochs"] for part in parts))
        return found

    def cost_text(self) -> str:
        line = next(iter(self.lines.values()), None)
        if line is None or line["backwards"] is None:
            return "-"
        tuned = line["finetune"]
        extra = f" + {tuned['backwards'] or 0:g} ({tuned['protocol']})" if tuned else ""
        return f"{line['backwards']:.4g}{extra}"

    def plain(self) -> dict[str, Any]:
        """Numbers as numbers, shares in [0, 1]."""
        plain: dict[str, Any] = {"context": self.context, "arm": self.arm, "label": self.label, "role": self.role,
                                 "seeds": len(self.lines)}  # fmt: skip
        for name, values in self.measures().items():
            plain[name], plain[f"{name} sd"] = mean_sd(values) if values else (None, None)
        line = next(iter(self.lines.values()), {"backwards": None, "forwards": None})
        plain |= {"backwards an epoch": line["backwards"], "forwards an epoch": line["forwards"],
                  "backwards in all": stdlib.fmean(self.costs()) if self.costs() else None}  # fmt: skip
        return plain | _plain_comparison(self.against)


def make_rows(about: About, cells: Sequence[Cell]) -> list[Row]:
    """One row an arm and context, in the order of the grid, each compared with its baseline."""
    by_cell = {line["cell"]: line for line in about.lines}
    rows: dict[tuple[str, str], Row] = {}
    for cell in cells:
        row = rows.setdefault(
            (cell.context, cell.arm),
            Row(cell.context, cell.arm, cell.label, cell.role, len(about.spec.seeds), {}),
        )
        if cell.id in by_cell:
            row.lines[cell.seed] = by_cell[cell.id]
    if about.spec.baseline is not None:
        for context in dict.fromkeys(row.context for row in rows.values()):
            there = {row.arm: row for row in rows.values() if row.context == context}
            pairs = [(row, there.get(baseline_of(about.spec, row.arm))) for row in there.values()]
            found = compare_all([(a, b) for a, b in pairs if b is not None and a is not b])
            for comparison in found:
                there[comparison.better].against = comparison
    return list(rows.values())


def baseline_of(spec: Spec, arm: str) -> str:
    """The arm that an arm is compared with: the baseline, with the same generator where there is an axis of them."""
    generator = arm.partition("--")[2]
    return spec.baseline if spec.baseline in spec.arms else arm_name(str(spec.baseline), generator)


def compare_all(pairs: Iterable[tuple[Row, Row]]) -> list[Comparison]:
    """Paired comparisons of one family, corrected together (Holm). Pairs without a common seed are left out."""
    found = [made for better, than in pairs if (made := _compare(better, than)) is not None]
    p_values = {place: one.by_seed.p for place, one in enumerate(found) if one.by_seed is not None}
    adjusted = holm(p_values)
    return [Comparison(**{**vars(one), "holm": adjusted.get(place)}) for place, one in enumerate(found)]


def _compare(better: Row, than: Row) -> Comparison | None:
    known = [
        (better.lines[seed], than.lines[seed])
        for seed in better.lines
        if seed in than.lines and None not in (better.lines[seed]["worst"], than.lines[seed]["worst"])
    ]
    # The same balls and images, or the numbers are no pair.
    known = [(a, b) for a, b in known if (a["images"], a["threat"]) == (b["images"], b["threat"])]
    if not known:
        return None
    ours, theirs = [a["worst"] for a, _ in known], [b["worst"] for _, b in known]
    return Comparison(
        better=better.arm,
        than=than.arm,
        difference=stdlib.fmean(ours) - stdlib.fmean(theirs),
        by_seed=paired_by_seed(ours, theirs),
        by_image=paired_by_image([a["outcomes"] for a, _ in known], [b["outcomes"] for _, b in known]),
    )


def _measured(line: Mapping[str, Any]) -> dict[str, float | None]:
    main, *others = line["batteries"].items()
    found = {CLEAN: line["clean"]}
    labels = short_labels(main[1]["attacks"])
    found |= {labels[label]: row["robust"] for label, row in main[1]["attacks"].items()}
    found[WORST] = line["worst"]
    for name, battery in others:
        found[f"{name}, {WORST}"] = battery["worst"]
    return found


def short_labels(labels: Iterable[str]) -> dict[str, str]:
    """``pgd:steps=50:loss=margin`` -> ``pgd``, or with as many options as tell it from its namesakes."""
    split = {label: ([p for p in label.split(":") if "=" not in p], [p for p in label.split(":") if "=" in p])
             for label in labels}  # fmt: skip
    short = {}
    for label, (name, options) in split.items():
        others = [theirs for other, (same, theirs) in split.items() if other != label and same == name]
        own = [option for option in options if any(option not in theirs for theirs in others)]
        short[label] = " ".join([":".join(name), *own])
    return short


# -- files


def write(about: About, rows: Sequence[Row], out: Path) -> list[Path]:
    """table.md, table.csv and table.tex in ``out``."""
    from scl_defense.checkpoint import atomic_write_bytes

    made = []
    for name, text in (("md", markdown(about, rows)), ("csv", comma(about, rows)), ("tex", latex(about, rows))):
        atomic_write_bytes(out / f"table.{name}", text.encode())
        made.append(out / f"table.{name}")
    return made


def cells_of(about: About, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column titles and texts of the printed tables; accuracies in %."""
    measures = list(dict.fromkeys(name for row in rows for name in row.measures()))
    contexts = len({row.context for row in rows}) > 1
    titles = [*(["data, model"] if contexts else []), "method", *measures, "backward passes an image and epoch"]
    if about.spec.baseline is not None:
        titles += ["difference to baseline", "p (Holm)"]
    body = []
    for row in rows:
        short = len(row.lines) < row.planned
        label = row.label + (f" ({len(row.lines)} of {row.planned} seeds)" if short else "")
        cells = [*([row.context] if contexts else []), label]
        values = row.measures()
        cells += [_mean_text(values.get(name, []), len(row.lines)) for name in measures] + [row.cost_text()]
        if about.spec.baseline is not None:
            own = baseline_of(about.spec, row.arm) == row.arm
            cells += ["baseline", ""] if own else list(_difference_text(row.against))
        body.append(cells)
    return titles, body


def notes(about: About) -> list[str]:
    spec = about.spec
    battery = spec.batteries[0]
    texts = [
        f"Accuracy in %, mean ± standard deviation over seeds. Worst case: per image over the battery '{battery.name}'."
    ]
    for other in spec.batteries[1:]:
        seeds = "" if other.seeds is None else f", seeds {', '.join(map(str, other.seeds))} alone"
        texts.append(f"Battery '{other.name}': n = {other.n or spec.n or 'all'}{seeds}.")
    if spec.baseline is not None:
        texts.append(
            f"Difference: in worst-case accuracy to '{spec.baseline}', percentage points, with the 95 % interval over "
            "seeds (paired t) and over test images (paired, normal); p over seeds, Holm-corrected over the rows."
        )
    if len(spec.seeds) < 2:
        texts.append("One seed is an anecdote: there is no spread and no interval over seeds.")
    if any(
        row["robust"] is None for line in about.lines for row in line["batteries"][battery.name]["attacks"].values()
    ):
        texts.append("*: an attack failed or was invalid for some seeds, which are left out of its mean.")
    texts += [f"failed: {cell}: {why}" for cell, why in about.failed.items()]
    if about.missing:
        texts.append(f"not run: {', '.join(about.missing)}")
    return texts


def markdown(about: About, rows: Sequence[Row]) -> str:
    titles, body = cells_of(about, rows)
    lines = [f"# {about.header()[0]}", "", *(f"- {fact}" for fact in about.header()[1:]), ""]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |" for cells in body]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes(about))])


def comma(about: About, rows: Sequence[Row]) -> str:
    """Numbers as numbers (shares in [0, 1]); lines that begin with ``#`` say what made them."""
    plain = [row.plain() for row in rows]
    titles = list(dict.fromkeys(name for row in plain for name in row))
    stream = io.StringIO()
    stream.write("".join(f"# {fact}\n" for fact in [*about.header(), *notes(about)]))
    writer = csv.DictWriter(stream, titles, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in plain)
    return stream.getvalue()


_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$"}  # fmt: skip


def latex(about: About, rows: Sequence[Row]) -> str:
    titles, body = cells_of(about, rows)
    left = 2 if titles[0] != "method" else 1
    lines = [f"% {fact}" for fact in [*about.header(), *notes(about)]]
    lines += [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(titles) - left)}}}"]
    lines += [r"\toprule", _tex_line(titles), r"\midrule", *(_tex_line(cells) for cells in body)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex_line(cells: Sequence[str]) -> str:
    return " & ".join("".join(_TEX.get(sign, sign) for sign in text) for text in cells) + r" \\"


# -- texts


def percent(share: float, sign: bool = False) -> str:
    text = f"{100 * share:{'+' if sign else ''}.1f}"
    return text.replace("-0.0", "0.0") if text in ("-0.0",) else text


def interval_text(paired: Paired | None) -> str:
    return "[no interval]" if paired is None else f"[{percent(paired.low, True)}, {percent(paired.high, True)}]"


def _mean_text(values: Sequence[float], seeds: int) -> str:
    if not values:
        return "-"
    mean, sd = mean_sd(values)
    spread = "" if sd is None else f" ± {percent(sd)}"
    return f"{percent(mean)}{spread}{'*' if len(values) < seeds else ''}"


def _difference_text(found: Comparison | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    texts = [percent(found.difference, True), interval_text(found.by_seed)]
    if found.by_image is not None:
        texts.append(f"images {interval_text(found.by_image)}")
    return " ".join(texts), "-" if found.holm is None else p_text(found.holm)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _plain_comparison(found: Comparison | None) -> dict[str, Any]:
    seed, image = (None, None) if found is None else (found.by_seed, found.by_image)
    return {
        "difference": None if found is None else found.difference,
        **{f"seeds {name}": None if seed is None else getattr(seed, name) for name in ("low", "high", "p")},
        "p holm": None if found is None else found.holm,
        **{f"images {name}": None if image is None else getattr(image, name) for name in ("low", "high", "p")},
    }


def _listed(found: Iterable[Any]) -> str:
    """Distinct facts; more than one means that the cells were not made alike, and says so."""
    texts = sorted({str(one) for one in found})
    return " | ".join(texts) if texts else "-"
