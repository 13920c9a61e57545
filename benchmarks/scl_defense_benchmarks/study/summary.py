"""summary.md: sentences from rules over numbers. What they do not support is said as plainly as what they do."""

import statistics as stdlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from scl_defense_benchmarks.study.tables import (
    CLEAN,
    WORST,
    About,
    Comparison,
    Row,
    baseline_of,
    compare_all,
    interval_text,
    p_text,
    percent,
    short_labels,
)

RULE = (
    "Beats means here: the 95 % interval of the paired difference over seeds and the one over test images both lie "
    "above 0, and p over seeds, corrected by Holm over the comparisons of that list, is below 0.05. Everything else is "
    "not shown, which is not the same as equal."
)


def write(about: About, rows: Sequence[Row], out: Path) -> Path:
    from scl_defense.checkpoint import atomic_write_bytes

    atomic_write_bytes(out / "summary.md", text(about, rows).encode())
    return out / "summary.md"


def text(about: About, rows: Sequence[Row]) -> str:
    title, *facts = about.header()
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in facts)]
    parts += _limits(about)
    for context in dict.fromkeys(row.context for row in rows):
        own = [row for row in rows if row.context == context and row.lines]
        if context:
            parts.append(f"## {context}")
        if not own:
            parts.append("No cell of this part is done: nothing can be said.")
            continue
        for heading, lines in (
            ("Ranking by worst case", _ranking(own)),
            ("Against the baseline", _baseline(about, own)),
            ("Model-free generators against noise", _controls(own)),
            ("Contrasts", _contrasts(about, own)),
            ("How far a short PGD overstates", _overstated(about, own)),
            ("What robustness cost in clean accuracy", _clean(about, own)),
            ("Flags", _flags(own)),
        ):
            found = list(lines)
            if found:
                parts.append(f"{'###' if context else '##'} {heading}")
                parts.append("\n".join(f"- {line}" for line in found))
    parts += _undone(about)
    return "\n\n".join(parts) + "\n"


def _limits(about: About) -> list[str]:
    seeds = len(about.spec.seeds)
    if seeds == 1:
        return [
            "**One seed is an anecdote.** There is no spread and no interval over seeds; no sentence below may be read "
            "as a finding."
        ]
    few = f"With {seeds} seeds, intervals over seeds are wide: small differences cannot be shown by this study. "
    return [(few if seeds < 5 else "") + RULE]


def _ranking(rows: Sequence[Row]) -> Iterator[str]:
    known = [row for row in rows if row.mean(WORST) is not None]
    for row in sorted(known, key=lambda row: -row.mean(WORST)):
        values = row.measures()[WORST]
        spread = f" ± {percent(stdlib.stdev(values))}" if len(values) > 1 else ""
        yield (
            f"{row.label}: {percent(row.mean(WORST))}{spread} % worst case, {percent(row.mean(CLEAN))} % clean "
            f"({len(values)} seed{'s' * (len(values) != 1)})"
        )
    for row in rows:
        if row.mean(WORST) is None:
            yield f"{row.label}: no valid attack in the main ball, so nothing is known of its robustness"


def sentence(found: Comparison, better: str, than: str) -> str:
    """One comparison in words, with both intervals."""
    numbers = f"{percent(found.difference, True)} points"
    if found.by_seed is None:
        return f"{better} against {than}: {numbers}, one seed: an anecdote, not shown"
    numbers += f", over {found.by_seed.n} seeds {interval_text(found.by_seed)}"
    numbers += f", over images {interval_text(found.by_image)}" if found.by_image is not None else ""
    numbers += f", p {p_text(found.holm)} (Holm)" if found.holm is not None else ""
    if found.shown:
        return f"{better} **beats** {than}: {numbers}"
    if found.shown_worse:
        return f"{better} is **worse** than {than}: {numbers}"
    return f"not shown that {better} differs from {than}: {numbers}"


def _baseline(about: About, rows: Sequence[Row]) -> Iterator[str]:
    if about.spec.baseline is None:
        return
    there = {row.arm: row for row in rows}
    for row in rows:
        if row.against is not None:
            yield sentence(row.against, row.label, there[row.against.than].label)
        elif baseline_of(about.spec, row.arm) != row.arm:
            yield f"{row.label}: its baseline '{about.spec.baseline}' has no finished cell to compare with"


def control_of(rows: Sequence[Row]) -> Row | None:
    """The noise that a model-free method must beat: corner noise where there is one, else the strongest control."""
    controls = [row for row in rows if row.role == "control" and row.mean(WORST) is not None]
    corner = [row for row in controls if "corner-noise" in (row.generator, row.arm)]
    return max(corner or controls, key=lambda row: row.mean(WORST), default=None)


def _controls(rows: Sequence[Row]) -> Iterator[str]:
    free = [row for row in rows if row.role == "model-free"]
    if not free:
        return
    control = control_of(rows)
    if control is None:
        yield "There is no finished control (role = 'control'): whether the model-free methods beat noise is not known."
        return
    found = compare_all((row, control) for row in free)
    labels = {row.arm: row.label for row in rows}
    for one in sorted(found, key=lambda one: -one.difference):
        yield sentence(one, labels[one.better], control.label)
    winners = [labels[one.better] for one in found if one.shown]
    if winners:
        rest = "; the others did not" if len(winners) < len(found) else ""
        yield f"So {', '.join(winners)} earned the cost of looking for examples{rest}."
    else:
        yield (
            f"So no strictly model-free generator of this study is shown to beat {control.label}, which costs nothing "
            "to make: by these numbers none has earned its cost."
        )


def _contrasts(about: About, rows: Sequence[Row]) -> Iterator[str]:
    there = {row.arm: row for row in rows}
    named = [(one, there.get(one.better), there.get(one.than)) for one in about.spec.contrasts]
    known = [(one, a, b) for one, a, b in named if a is not None and b is not None]
    found = {(made.better, made.than): made for made in compare_all((a, b) for _, a, b in known)}
    for one, a, b in named:
        made = found.get((one.better, one.than))
        if a is None or b is None or made is None:
            yield f"{one.says}: cannot be said, '{one.better}' or '{one.than}' has no finished cell to pair"
        else:
            yield f"{one.says}: {sentence(made, a.label, b.label)}"


def _overstated(about: About, rows: Sequence[Row]) -> Iterator[str]:
    """Short attacks minus the AutoAttack part of their battery, on the same networks and images."""
    said = False
    for battery in about.spec.batteries:
        lines = [
            line["batteries"][battery.name]["attacks"]
            for row in rows
            for line in row.lines.values()
            if battery.name in line["batteries"]
        ]
        if not lines:
            continue
        strong = [label for label in lines[0] if "apgd" in label or "autoattack" in label]
        weak = [label for label in lines[0] if ("pgd" in label or "fgsm" in label) and label not in strong]
        if not strong:
            continue
        short = short_labels(lines[0])
        full = " and ".join(short[label] for label in strong)
        for name in weak:
            gaps = {row.label: gap for row in rows if (gap := _gap(row, battery.name, name, strong)) is not None}
            if gaps:
                said, largest = True, max(gaps, key=lambda label: gaps[label])
                n = f", n = {battery.n}" if battery.n else ""
                yield (
                    f"{short[name]} reports {percent(stdlib.fmean(gaps.values()), True)} points more than {full} on "
                    f"average over methods, at most {percent(gaps[largest], True)} ({largest}; battery "
                    f"{battery.name}{n})"
                )
    if not said:
        yield "No battery has an AutoAttack part (apgd, autoattack): how far a short PGD overstates is not known."


def _gap(row: Row, battery: str, weak: str, strong: Sequence[str]) -> float | None:
    """Mean over seeds of the weak attack's robust accuracy minus the lowest of the strong ones'."""
    gaps = []
    for line in row.lines.values():
        if battery not in line["batteries"]:
            continue
        found = {label: entry["robust"] for label, entry in line["batteries"][battery]["attacks"].items()}
        if any(found.get(label) is None for label in (weak, *strong)):
            return None
        gaps.append(found[weak] - min(found[label] for label in strong))
    return stdlib.fmean(gaps) if gaps else None


def _clean(about: About, rows: Sequence[Row]) -> Iterator[str]:
    there = {row.arm: row for row in rows}
    for row in rows:
        base = there.get(baseline_of(about.spec, row.arm)) if about.spec.baseline is not None else None
        if base is None or base is row or not set(row.lines) & set(base.lines):
            continue
        common = [seed for seed in row.lines if seed in base.lines]
        price = stdlib.fmean(row.lines[seed]["clean"] - base.lines[seed]["clean"] for seed in common)
        robust = "" if row.against is None else f" for {percent(row.against.difference, True)} in the worst case"
        yield f"{row.label}: {percent(price, True)} points clean{robust}, against {base.label}"


def _flags(rows: Sequence[Row]) -> Iterator[str]:
    seen: dict[str, list[str]] = {}
    for row in rows:
        for seed, line in row.lines.items():
            for flag in line["flags"]:
                seen.setdefault(flag, []).append(f"{row.label} s{seed}")
    for flag, where in sorted(seen.items()):
        yield f"{flag}: {', '.join(where)} (what it means and what to do: in that cell's result file)"
    if not seen:
        yield "No diagnostic was raised in any cell."


def _undone(about: About) -> list[str]:
    parts = []
    if about.failed:
        parts.append("## Failed cells")
        parts.append("\n".join(f"- {cell}: {why}" for cell, why in about.failed.items()))
    if about.missing:
        parts.append("## Not run")
        parts.append("\n".join(f"- {cell}" for cell in about.missing))
    return parts
