"""What an evaluation found: typed, as JSON, as a file, and as a table for the screen."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scl_defense.errors import UserError
from scl_defense_benchmarks.diagnostics import Flag
from scl_defense_benchmarks.statistics import Interval

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

SCHEMA = "scl-defense-result/1"

Status = Literal["ok", "doubtful", "invalid", "failed"]

# What became of one image, as stored per attack and per ball.
MISCLASSIFIED = 0  # wrong before any attack: counts against robust accuracy and is not attacked
ROBUST = 1  # a real attempt was made and our check still finds the right label
BROKEN = 2  # a checked example inside box and ball with another label
UNMOVED = 3  # right, but no real attempt was made on it: no evidence of robustness
UNTRIED = 4  # right, but the attack failed before it gave an example
OUTCOMES = {"misclassified": 0, "robust": 1, "broken": 2, "unmoved": 3, "untried": 4}


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """One attack. Counts are of images; shares are of all n images.

    status: ``ok``; ``doubtful`` or ``invalid``: too many images were not moved; ``failed``: it raised or broke its
    contract. robust_accuracy: the share of images that were right, really attacked and not broken; ``None`` for an
    invalid or failed attack, whose number would mean nothing.
    broken: verified examples inside its ball. found: verified wrong labels at any distance (differs from ``broken``
    for ``minimal`` attacks alone). unmoved: right images without a real attempt: left where they were (closer than
    1e-3 eps; for minimal attacks 1e-6), or, by a white-box attack, never a gradient that was finite and not zero.
    violations: examples outside box or ball (pulled back and judged again) or not finite (judged as none).
    median_distance: of the found, in the row's norm. forwards, backwards: per attacked image.
    outcomes: one code an image (see ``OUTCOMES``). distances: one an image, ``None`` where there is no example.
    """

    label: str
    name: str
    library: str
    access: str
    norm: str
    eps: str
    minimal: bool
    options: Mapping[str, Any]
    status: Status
    note: str
    attacked: int
    broken: int
    found: int
    unmoved: int
    violations: Mapping[str, int]
    robust_accuracy: float | None
    interval: Interval | None
    median_distance: float | None
    seconds: float
    forwards: float
    backwards: float
    outcomes: tuple[int, ...] = field(repr=False)
    distances: tuple[float | None, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """All attacks together, image by image, for one ball.

    Robust is an image that was right, that no verified example inside the ball breaks (whichever attack made it), and
    that at least one valid attack in this ball, no control, really moved. attacks: those valid ones. unmoved: right
    and unbroken images on which none of them made an attempt. ``None``: no valid attack, so nothing is known.
    """

    norm: str
    eps: str
    attacks: tuple[str, ...]
    broken: int
    unmoved: int
    robust_accuracy: float | None
    interval: Interval | None
    note: str
    outcomes: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One evaluation of one network. norm, eps: the main threat. data, checkpoint: ``None`` for bare tensors."""

    n: int
    num_classes: int
    seed: int
    batch_size: int
    norm: str
    eps: str
    clean_correct: int
    clean_accuracy: float
    clean_interval: Interval
    attacks: tuple[AttackRow, ...]
    worst_cases: tuple[WorstCase, ...]
    flags: tuple[Flag, ...]
    left_out: tuple[Mapping[str, str], ...] = ()  # attacks of a tier that cannot work here: label, tier, reason
    data: Mapping[str, Any] | None = None
    checkpoint: Mapping[str, Any] | None = None
    plugins: tuple[Mapping[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    command: str | None = None
    created: str | None = None

    def row(self, label: str) -> AttackRow:
        """The row of one attack. Raises ``KeyError``."""
        for row in self.attacks:
            if row.label == label:
                return row
        raise KeyError(label)

    @property
    def worst_case(self) -> WorstCase | None:
        """The worst case in the main ball; ``None`` when no attack worked in it."""
        return next((case for case in self.worst_cases if (case.norm, case.eps) == (self.norm, self.eps)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with the schema's name and the meaning of the outcome codes."""
        plain = {"schema": SCHEMA, "outcome_codes": OUTCOMES, **dataclasses.asdict(self)}
        return json.loads(json.dumps(plain, allow_nan=False))


def check_writable(path: str | Path) -> None:
    """Raise :class:`UserError` when a result cannot be written to ``path``, or would replace something else."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"'{path}' is a directory; give the result a file name, like {path / 'result.json'}")
    if path.exists():
        try:
            schema = json.loads(path.read_text(encoding="utf-8"))["schema"]
        except (OSError, ValueError, KeyError, TypeError):
            schema = None
        if not str(schema).startswith("scl-defense-result/"):
            raise UserError(f"'{path}' exists and is no benchmark result; it is kept, choose another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{path.parent}': {error.strerror}; choose another --out") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write in '{path.parent}'; choose another --out")


def write(result: EvaluationResult, path: str | Path) -> None:
    """Write the result as JSON: the old file or the whole new one, never a part. Raises :class:`UserError`."""
    from scl_defense.checkpoint import atomic_write_bytes

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, ("".join(_lines(result.to_json())) + "\n").encode())


def _lines(value: Any, indent: str = "") -> Iterator[str]:
    """JSON with one key a line, but a list of plain values (one per image) on a single line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        yield "{"
        for place, (key, item) in enumerate(value.items()):
            yield f"{',' if place else ''}\n{inner}{json.dumps(key)}: "
            yield from _lines(item, inner)
        yield f"\n{indent}}}"
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield "["
        for place, item in enumerate(value):
            yield f"{',' if place else ''}\n{inner}"
            yield from _lines(item, inner)
        yield f"\n{indent}]"
    else:
        yield json.dumps(value, separators=(",", ":"), allow_nan=False)


def render(result: EvaluationResult) -> "Group":
    """The table and the flags, for a rich console of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [_table(result)]
    about = f"n = {result.n} test images, seed {result.seed}, 95 % Wilson intervals, worst case per image"
    if result.data:
        about = f"{result.data['name']}: {about}"
    parts.append(Text(about, style="dim"))
    for row in result.attacks:
        if row.minimal and row.median_distance is not None:
            parts.append(
                Text(
                    f"{row.label}: finds a wrong label for {row.found} of {row.attacked}, "
                    f"median {row.norm} distance {row.median_distance:.3g}",
                    style="dim",
                )
            )
    for one in result.left_out:
        parts.append(Text(f"{one['label']} is left out of '{one['tier']}': {one['reason']}", style="dim"))
    for flag in result.flags:
        about = ", ".join([flag.severity, *flag.attacks])
        style = "bold red" if flag.severity == "error" else "yellow"
        line = Text(f"flag {flag.id} ({about}): ", style=style)
        parts.append(line.append(f"{flag.what} {flag.why} {flag.remedy}", style="default"))
    return Group(*parts)


def _table(result: EvaluationResult) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("attack", overflow="fold", min_width=10)
    table.add_column("ball", overflow="fold", min_width=8)
    table.add_column("accuracy %", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("broken", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    wrong = result.n - result.clean_correct
    table.add_row("none (clean)", "", *_numbers(result.clean_accuracy, result.clean_interval), str(wrong), "")
    style = {"ok": "green", "doubtful": "yellow", "invalid": "bold red", "failed": "bold red"}
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
