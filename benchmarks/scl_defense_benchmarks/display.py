"""What an evaluation found, to be looked at: on the screen, in a notebook."""

import io
from html import escape
from typing import TYPE_CHECKING, Any

from scl_defense import shown
from scl_defense_benchmarks.results import EvaluationResult
from scl_defense_benchmarks.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group
    from rich.table import Table as RichTable

COLUMNS = ("attack", "ball", "accuracy %", "95 % interval", "broken", "status")


def table(result: EvaluationResult, width: int = 100) -> shown.Table:
    """A line for the clean images, each attack and each worst case; the text has the flags below it."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=False, color_system=None)
    console.print(render(result))
    wrong = result.n - result.clean_correct
    lines: list[tuple[str, str, float | None, Interval | None, int, str]] = [
        ("none (clean)", "", result.clean_accuracy, result.clean_interval, wrong, "")
    ]
    lines += [(row.label, f"{row.norm}:{row.eps}", row.robust_accuracy, row.interval, row.broken, row.status)
              for row in result.attacks]  # fmt: skip
    lines += [("worst case", f"{case.norm}:{case.eps}", case.robust_accuracy, case.interval, case.broken,
               "" if case.robust_accuracy is not None else "unknown") for case in result.worst_cases]  # fmt: skip
    rows = [
        {"attack": label, "ball": ball, "accuracy": accuracy, "low": interval.low if interval else None,
         "high": interval.high if interval else None, "broken": broken, "status": status}
        for label, ball, accuracy, interval, broken, status in lines
    ]  # fmt: skip
    cells = [(label, ball, *_numbers(accuracy, interval), str(broken), status)
             for label, ball, accuracy, interval, broken, status in lines]  # fmt: skip
    return shown.Table(COLUMNS, cells, rows, notes=_about(result), text=stream.getvalue())


def figure(result: EvaluationResult) -> "Figure":
    """Left: accuracy under each attack, with its interval. Right: accuracy against eps, a panel a norm, if measured."""
    from scl_defense_benchmarks.report.exports import curve_lines, draw_curves
    from scl_defense_benchmarks.report.gather import bare
    from scl_defense_benchmarks.report.read import Source

    curves = curve_lines([Source("", result)])
    lines = [("clean", result.clean_accuracy, result.clean_interval, 0)]
    lines += [(f"{bare(row.label)}  {row.norm} {row.eps}", row.robust_accuracy, row.interval, 1)
              for row in result.attacks]  # fmt: skip
    lines += [(f"worst case  {case.norm} {case.eps}", case.robust_accuracy, case.interval, 2)
              for case in result.worst_cases]  # fmt: skip
    known = [line for line in lines if line[1] is not None][::-1]
    panels = 1 + len(curves)
    with shown.styled():
        drawn = shown.new_figure(shown.WIDTH * (0.4 + panels), max(2.2 if curves else 1.0, 0.5 + 0.16 * len(known)))
        axes, *panes = drawn.subplots(1, panels, squeeze=False, width_ratios=[1.4, *[1] * len(curves)])[0]
        for place, (_, accuracy, interval, kind) in enumerate(known):
            low, high = interval or (accuracy, accuracy)
            look = {"color": shown.COLOURS[(6, 0, 1)[kind]], "marker": shown.MARKERS[(3, 0, 1)[kind]]}
            spans = [[100 * max(0.0, accuracy - low)], [100 * max(0.0, high - accuracy)]]
            axes.errorbar([100 * accuracy], [place], xerr=spans, linestyle="", elinewidth=0.8, **look)
        axes.set_yticks(range(len(known)), [label for label, *_ in known])
        axes.set_xlim(0, 101)
        axes.set_ylim(-0.7, len(known) - 0.3)
        axes.set_xlabel(f"accuracy (% of {result.n} test images, 95 % intervals)")
        draw_curves(panes, curves)
    return drawn


def html(result: EvaluationResult) -> str:
    """The verdict, the table and the figure, as a notebook shows them."""
    from scl_defense_benchmarks.report.gather import verdict_sentence

    flags = "".join(
        f"<li><b>{escape(flag.id)}</b> ({escape(', '.join([flag.severity, *flag.attacks]))}): "
        f"{escape(f'{flag.what} {flag.why} {flag.remedy}')}</li>"
        for flag in result.flags
    )
    listed = f"<ul>{flags}</ul>" if flags else ""
    picture = shown.img(figure(result), "accuracy under each attack")
    return f"<p><b>{escape(verdict_sentence(result))}</b></p>{table(result)._repr_html_()}{listed}{picture}"


def _about(result: EvaluationResult) -> list[str]:
    how = ", a cascade: each attack on what is left" if result.mode == "cascade" else ""
    about = f"n = {result.n} test images{how}, seed {result.seed}, 95 % Wilson intervals, worst case per image"
    return [f"{result.data['name']}: {about}" if result.data else about]


def render(result: EvaluationResult) -> "Group":
    """The table and the flags, for a rich console of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [_table(result)]
    parts += [Text(about, style="dim") for about in _about(result)]
    conclusion = result.conclusion
    style = {"trustworthy": "bold green", "upper-bound": "bold yellow"}.get(conclusion.kind, "bold red")
    parts.append(Text("The worst case is ").append(f"{conclusion.text}.", style=style))
    first = {repr((row.name, row.options, row.norm)): row.label for row in reversed(result.attacks) if row.minimal}
    again = {row.label for row in result.attacks if row.minimal} - set(first.values())  # one search, counted again
    for row in result.attacks:
        if row.minimal and row.median_distance is not None and row.label not in again:
            parts.append(
                Text(
                    f"{row.label}: finds a wrong label for {row.found} of {row.attacked}, "
                    f"median {row.norm} distance {row.median_distance:.3g}",
                    style="dim",
                )
            )
    shares = [(row.label, row.survive_rounding) for row in result.attacks if row.label not in again]
    told = ", ".join(f"{label} {share:.0%}" for label, share in shares if share is not None)
    if told:
        parts.append(Text(f"examples that still fool after rounding to 8 bits: {told}", style="dim"))
    for row in result.attacks:
        if row.status == "not run":
            parts.append(Text(f"{row.label}: not run: {row.note}", style="yellow"))
    for one in result.left_out:
        parts.append(Text(f"{one['label']} is left out of '{one['tier']}': {one['reason']}", style="dim"))
    from scl_defense_benchmarks import diagnostics

    for flag in (*result.flags, *diagnostics.notes(result)):
        about = ", ".join([flag.severity, *flag.attacks])
        style = {"error": "bold red", "warning": "yellow"}.get(flag.severity, "dim")
        line = Text(f"flag {flag.id} ({about}): ", style=style)
        parts.append(line.append(f"{flag.what} {flag.why} {flag.remedy}", style="default"))
    return Group(*parts)


def _table(result: EvaluationResult) -> "RichTable":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("attack", overflow="fold", min_width=10)
    table.add_column("ball", overflow="fold", min_width=8)
    table.add_column("accuracy %", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("broken", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    wrong = result.n - result.clean_correct
    table.add_row("none (clean)", "", *_numbers(result.clean_accuracy, result.clean_interval), str(wrong), "")
    style = {"ok": "green", "doubtful": "yellow", "invalid": "bold red", "failed": "bold red", "not run": "yellow"}
    for row in result.attacks:
        table.add_row(
            Text(row.label),
            f"{row.norm}:{row.eps}",
            *_numbers(row.robust_accuracy, row.interval),
            str(row.broken),
            Text(row.status, style=style[row.status]),
        )
    table.add_section()
    for case in result.worst_cases:
        numbers = _numbers(case.robust_accuracy, case.interval)
        status = Text("" if case.robust_accuracy is not None else "unknown", style="bold red")
        ball = f"{case.norm}:{case.eps}"
        table.add_row("worst case", ball, *numbers, str(case.broken), status, style="bold")
    return table


def _numbers(accuracy: float | None, interval: Interval | None) -> tuple[str, str]:
    if accuracy is None or interval is None:
        return "-", "-"
    return f"{100 * accuracy:.1f}", f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
