"""What an evaluation found: typed, as JSON, as a file, and as a table for the screen."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scl_defense.errors import UserError
from scl_defense.shown import Table, to_frame
from scl_defense_benchmarks.diagnostics import Flag
from scl_defense_benchmarks.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "scl-defense-result/1"

Status = Literal["ok", "doubtful", "invalid", "failed", "not run"]

# What became of one image, as stored per attack and per ball.
MISCLASSIFIED = 0  # wrong before any attack: counts against robust accuracy and is not attacked
ROBUST = 1  # a real attempt was made and our check still finds the right label
BROKEN = 2  # a checked example inside box and ball with another label
UNMOVED = 3  # right, but no real attempt was made on it: no evidence of robustness
UNTRIED = 4  # right, but the attack failed or was stopped before it gave an example
SPARED = 5  # in a cascade: right, but an earlier attack has broken it, so that this one did not get it
OUTCOMES = {"misclassified": 0, "robust": 1, "broken": 2, "unmoved": 3, "untried": 4, "spared": 5}

# What differs between two runs of the same question, a resumed and an unbroken one too; nothing else does.
TIMES = ("created", "seconds", "memory")


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """One attack. Counts are of images; shares are of all n images.

    status: ``ok``; ``doubtful`` or ``invalid``: too many images were not moved; ``failed``: it raised or broke its
    contract; ``not run``: the time limit came first. robust_accuracy: the share of images that were right, really
    attacked and not broken; ``None`` for an invalid, failed or unfinished attack, whose number would mean nothing. In
    a cascade it is what is left after this attack and all before it.
    broken: verified examples inside its ball. found: verified wrong labels at any distance (differs from ``broken``
    for ``minimal`` attacks alone). unmoved: right images without a real attempt: left where they were (closer than
    1e-3 eps; for minimal attacks 1e-6), or, by a white-box attack, never a gradient that was finite and not zero.
    violations: examples outside box or ball (pulled back and judged again) or not finite (judged as none).
    median_distance: of the found, in the row's norm. forwards, backwards: per attacked image.
    outcomes: one code an image (see ``OUTCOMES``). distances: one an image, ``None`` where there is no example.
    restarts: how often we started it. carried: of ``broken``, those broken by the same attack in a smaller ball and
    not attacked again; made: the others; rounded: of ``made``, those that still fool as an 8-bit image. spared: broken
    by an earlier attack of the cascade and not attacked. predictions: the wrong label, -1 where there is none.
    queries: forward passes of each image; those that cannot be told apart are shared equally. precision: what the
    attack ran in, ``fp32``, ``bf16``, or ``bf16+fp32``: the second on what had survived the first. The verdicts are
    float32 always.
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
    restarts: int = 1
    carried: int = 0
    made: int = 0
    rounded: int | None = None
    spared: int = 0
    predictions: tuple[int, ...] = field(default=(), repr=False)
    queries: tuple[float, ...] = field(default=(), repr=False)
    precision: str = "fp32"

    @property
    def survive_rounding(self) -> float | None:
        """The share of its examples that still fool after rounding to 8 bits; ``None`` without an example."""
        return None if self.rounded is None else self.rounded / self.made


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
    """One evaluation of one network: the report. norm, eps: the main threat. data, checkpoint: ``None`` if unknown.

    mode: ``independent``: every attack gets every rightly classified image; ``cascade``: what no attack before it has
    broken. probes: how much was tried beside the battery. precision: as asked for. workers, threads: chunks side by
    side, torch's threads; ranks: processes under torchrun; none reaches a number. labels, predictions: of the clean
    images. indices: their places in the data's test split, if it has one.
    """

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
    probes: str = "none"
    precision: str = "fp32"
    workers: int = 1
    threads: int = 1
    ranks: int = 1
    memory: Mapping[str, Any] | None = None  # of batch_size=auto: what was measured and what was free, in bytes
    command: str | None = None
    created: str | None = None
    mode: str = "independent"
    labels: tuple[int, ...] = field(default=(), repr=False)
    predictions: tuple[int, ...] = field(default=(), repr=False)
    indices: tuple[int, ...] | None = field(default=None, repr=False)

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

    @property
    def conclusion(self) -> Any:
        """What the worst case is worth (see :func:`scl_defense_benchmarks.diagnostics.verdict`)."""
        from scl_defense_benchmarks import diagnostics

        return diagnostics.verdict(self)

    @property
    def complete(self) -> bool:
        """No attack was stopped by the time limit."""
        return all(row.status != "not run" for row in self.attacks)

    def table(self, width: int = 100) -> Table:
        """The table and the flags, as text ``width`` columns wide (80 or more); HTML in a notebook."""
        from scl_defense_benchmarks.display import table

        return table(self, width)

    def figure(self) -> "Figure":
        """Accuracy under each attack with its interval and, where a curve was measured, accuracy against eps."""
        from scl_defense_benchmarks.display import figure

        return figure(self)

    def _repr_html_(self) -> str:
        from scl_defense_benchmarks.display import html

        return html(self)

    def to_frame(self) -> Any:
        """A pandas ``DataFrame`` with a row an attack. Raises :class:`UserError` without pandas, which is optional."""
        lists = ("outcomes", "distances", "predictions", "queries", "options", "violations", "interval")
        rows = []
        for row in self.attacks:
            plain = {name: value for name, value in dataclasses.asdict(row).items() if name not in lists}
            low, high = row.interval or (None, None)
            violations = {f"outside_{name}": count for name, count in row.violations.items()}
            rows.append({**plain, "low": low, "high": high, **violations})
        return to_frame(rows)

    @staticmethod
    def load(path: str | Path) -> "EvaluationResult":
        """The result in a file that ``benchmark`` wrote. Raises :class:`UserError` for any other file."""
        from scl_defense_benchmarks.report.read import read_result

        return read_result(path)

    def save(self, path: str | Path) -> None:
        """Write ``FILE.json``, the whole result, or ``FILE.csv``, a line an attack and image (:func:`per_image`)."""
        if Path(path).suffix == ".csv":
            write_per_image(self, path)
        elif Path(path).suffix == ".json":
            check_writable(path)
            write(self, path)
        else:
            raise UserError(f"'{path}' must end in .json (the whole result) or .csv (a line an attack and image)")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with the schema's name and the meaning of the outcome codes."""
        conclusion = dataclasses.asdict(self.conclusion)
        plain = {"schema": SCHEMA, "outcome_codes": OUTCOMES, **dataclasses.asdict(self), "conclusion": conclusion}
        return json.loads(json.dumps(plain, allow_nan=False))


Report = EvaluationResult  # the name by which the Python API speaks of it

COLUMNS = ("image", "index", "label", "clean_prediction", "attack", "norm", "eps", "outcome", "success", "distance",
           "queries", "adversarial_label")  # fmt: skip


def per_image(result: EvaluationResult) -> Iterator[dict[str, Any]]:
    """One line an attack and image, in the battery's order.

    image: counts from 0 within the evaluation; index: the place in the test split. label, clean_prediction: before the
    attack. outcome: a name of ``OUTCOMES``. success: 1 where a checked example inside box and ball has another label;
    empty where nothing is known (the attack failed or was stopped, or an earlier attack had broken the image).
    distance: of the example, in ``norm``, empty without one. queries: forward passes, mean of the image's chunk.
    adversarial_label: what the network says of the example, empty where that is the true label or there is none.
    """
    names = {code: name for name, code in OUTCOMES.items()}
    for row in result.attacks:
        for image, outcome in enumerate(row.outcomes):
            known = outcome not in (UNTRIED, SPARED)
            wrong = row.predictions[image] if row.predictions else -1
            yield {
                "image": image,
                "index": result.indices[image] if result.indices else image,
                "label": result.labels[image],
                "clean_prediction": result.predictions[image],
                "attack": row.label,
                "norm": row.norm,
                "eps": row.eps,
                "outcome": names[outcome],
                "success": int(outcome == BROKEN) if known else None,
                "distance": row.distances[image],
                "queries": row.queries[image] if row.queries else None,
                "adversarial_label": wrong if wrong >= 0 else None,
            }


def write_per_image(result: EvaluationResult, path: str | Path) -> None:
    """Write :func:`per_image` as CSV with a header line: the whole file or none. Raises :class:`UserError`."""
    import csv
    import io

    from scl_defense.checkpoint import atomic_write_bytes

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(per_image(result))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, text.getvalue().encode())


def without_times(value: Any) -> Any:
    """A result as JSON without what differs between two runs of the same question (see ``TIMES``)."""
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def check_writable(path: str | Path) -> None:
    """Raise :class:`UserError` when a result cannot be written to ``path``, or would replace something else."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"'{path}' is a directory; give the result a file name, like {path / 'result.json'}")
    if path.exists():
        if not path.is_file():  # reading a device or a pipe would never end
            raise UserError(f"'{path}' is no regular file; choose another --out")
        try:
            schema = json.loads(path.read_text(encoding="utf-8"))["schema"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
