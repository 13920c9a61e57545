"""The numbers of a page, from a result alone: no data set, no network, and nothing is drawn here."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from scl_defense.threat import parse_eps
from scl_defense_benchmarks.report.read import Source
from scl_defense_benchmarks.results import BROKEN, MISCLASSIFIED, ROBUST, AttackRow, EvaluationResult
from scl_defense_benchmarks.statistics import Interval, Paired, holm, paired_by_image, wilson

SETS = 20  # columns of the upset picture; the rest is summed up
STEPS = 200  # points of a curve over distances


def class_names(result: EvaluationResult) -> tuple[str, ...]:
    """The names of the classes; their numbers where the data has none."""
    names = (result.data or {}).get("classes") or (result.checkpoint or {}).get("classes")
    if isinstance(names, list | tuple) and len(names) == result.num_classes:
        return tuple(map(str, names))
    return tuple(map(str, range(result.num_classes)))


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}"


def spanned(interval: Interval | None) -> str:
    return "-" if interval is None else f"{percent(interval.low)} to {percent(interval.high)}"


def verdict_sentence(result: EvaluationResult) -> str:
    """The whole evaluation in one sentence: of what, how much is left, and what that number is worth."""
    data = f" of {result.data['name']}" if result.data and result.data.get("name") else ""
    case = result.worst_case
    start = f"Of {result.n} test images{data}, {percent(result.clean_accuracy)} % are classified rightly as they are"
    ball = f"{result.norm} {result.eps}"
    if case is None or case.robust_accuracy is None:
        return f"{start}; what is left under attack within {ball} is unknown: {result.conclusion.text}."
    many = f"the worst case over {len(case.attacks)} attacks" if len(case.attacks) > 1 else f"attack {case.attacks[0]}"
    low, high = case.interval or (None, None)
    span = "" if low is None else f", 95 % interval {percent(low)} to {percent(high)} %"
    left = f"{percent(case.robust_accuracy)} % under {many} within {ball}{span}"
    return f"{start} and {left}; this number is {result.conclusion.text}."


# -- accuracy against eps


@dataclass(frozen=True)
class Point:
    """radius: a number; eps: as it was written. Shares in [0, 1]; low, high: the 95 % interval."""

    radius: float
    eps: str
    accuracy: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """kind: ``worst``, ``attack`` (measured at each radius) or ``minimal`` (from the distances of one search)."""

    name: str
    kind: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One norm."""

    norm: str
    series: tuple[Series, ...]


def bare(label: str) -> str:
    """The label without its radius: ``pgd:steps=40:eps=0.1`` -> ``pgd:steps=40``."""
    return re.sub(r":eps=[^:]*", "", label)


def panels(result: EvaluationResult) -> list[Panel]:
    """Every norm with at least two radii above 0, or with an attack that looks for the nearest example."""
    start = Point(0.0, "0", result.clean_accuracy, *result.clean_interval)
    found = []
    for norm in dict.fromkeys([result.norm, *(row.norm for row in result.attacks)]):
        series = []
        cases = [case for case in result.worst_cases if case.norm == norm and case.robust_accuracy is not None]
        if len({parse_eps(case.eps) for case in cases}) > 1:
            series.append(Series("worst case", "worst", (start, *_sorted(cases))))
            groups: dict[str, list[AttackRow]] = {}
            for row in result.attacks:
                if row.norm == norm and not row.minimal and row.robust_accuracy is not None:
                    groups.setdefault(bare(row.label), []).append(row)
            series += [Series(name, "attack", (start, *_sorted(rows))) for name, rows in groups.items()
                       if len({parse_eps(row.eps) for row in rows}) > 1]  # fmt: skip
        # The same search is counted in several balls: one curve holds them all.
        searches = {bare(row.label): row for row in result.attacks if row.norm == norm and row.minimal and row.found}
        series += [Series(name, "minimal", _by_distance(result, row, start)) for name, row in searches.items()]
        if series:
            found.append(Panel(norm, tuple(series)))
    return found


def _sorted(parts: Sequence[Any]) -> Iterator[Point]:
    for part in sorted(parts, key=lambda part: parse_eps(part.eps)):
        yield Point(float(parse_eps(part.eps)), part.eps, part.robust_accuracy, *(part.interval or (None, None)))


def _by_distance(result: EvaluationResult, row: AttackRow, start: Point) -> tuple[Point, ...]:
    """Share of images still right when every example up to a radius counts: an upper bound at each radius."""
    fooled = [place for place, wrong in enumerate(row.predictions) if wrong >= 0] if row.predictions else [
        place for place, outcome in enumerate(row.outcomes) if outcome == BROKEN]  # fmt: skip
    found = np.sort([row.distances[place] for place in fooled if row.distances[place] is not None])
    if not len(found):
        return (start,)
    ends = np.unique(np.linspace(0, len(found) - 1, min(len(found), STEPS)).round().astype(int))
    points = [start]
    for end in ends:
        right = max(result.clean_correct - int(end) - 1, 0)
        points.append(Point(float(found[end]), f"{found[end]:.4g}", right / result.n))
    return tuple(points)


# -- which attack broke which image


@dataclass(frozen=True)
class Upset:
    """The images of one ball by the set of attacks that broke them.

    totals: label -> images it broke, and how many of them nothing else broke. sets: (labels, images), the largest
    first, at most :data:`SETS`. others: sets and images not listed. survived: right and unbroken. wrong: misclassified.
    """

    norm: str
    eps: str
    totals: Mapping[str, tuple[int, int]]
    sets: tuple[tuple[tuple[str, ...], int], ...]
    others: tuple[int, int]
    survived: int
    wrong: int


def upset(result: EvaluationResult, norm: str, eps: str) -> Upset | None:
    """``None`` where fewer than two attacks were run in this ball."""
    rows = [row for row in result.attacks if (row.norm, row.eps) == (norm, eps)]
    if len(rows) < 2:
        return None
    broke = np.array([row.outcomes for row in rows]) == BROKEN
    patterns, counts = np.unique(broke.T, axis=0, return_counts=True)
    alone = broke.sum(0) == 1
    totals = {row.label: (int(mine.sum()), int((mine & alone).sum())) for row, mine in zip(rows, broke, strict=True)}
    sets = [
        (tuple(row.label for row, member in zip(rows, pattern, strict=True) if member), int(count))
        for pattern, count in zip(patterns, counts, strict=True)
        if pattern.any()
    ]
    sets.sort(key=lambda one: (-one[1], len(one[0]), one[0]))
    wrong = sum(outcome == MISCLASSIFIED for outcome in rows[0].outcomes)
    return Upset(norm, eps, totals, tuple(sets[:SETS]), (len(sets[SETS:]), sum(count for _, count in sets[SETS:])),
                 int((~broke.any(0)).sum()) - wrong, wrong)  # fmt: skip


def upsets(result: EvaluationResult) -> list[Upset]:
    """The main ball first, then the others that have two attacks or more."""
    return [found for ball in balls(result) if (found := upset(result, *ball)) is not None]


def balls(result: EvaluationResult) -> list[tuple[str, str]]:
    """Every (norm, eps): the main ball first, then norm by norm, the smallest first."""
    main = (result.norm, result.eps)
    parts: tuple[Any, ...] = (*result.worst_cases, *result.attacks)
    there = {(part.norm, part.eps) for part in parts}
    return sorted(there, key=lambda ball: (ball != main, ball[0] != main[0], ball[0], parse_eps(ball[1])))


# -- classes


@dataclass(frozen=True)
class ClassRow:
    """One class. robust: of all its images, right in the worst case of the main ball; ``None``: unknown."""

    name: str
    n: int
    clean: float
    clean_interval: Interval
    robust: float | None
    robust_interval: Interval | None


def classes(result: EvaluationResult) -> list[ClassRow]:
    """The classes that have images, in their order."""
    labels, right = np.array(result.labels), np.array(result.labels) == np.array(result.predictions)
    case = result.worst_case
    known = case is not None and case.robust_accuracy is not None
    robust = np.array(case.outcomes) == ROBUST if case is not None and known else np.zeros(len(labels), bool)
    found = []
    for number, name in enumerate(class_names(result)):
        own = labels == number
        if n := int(own.sum()):
            clean, left = int(right[own].sum()), int(robust[own].sum())
            found.append(ClassRow(name, n, clean / n, wilson(clean, n), left / n if known else None,
                                  wilson(left, n) if known else None))  # fmt: skip
    return found


WORST = "worst case"


def confusion(result: EvaluationResult) -> dict[str, Counter[tuple[int, int]]]:
    """How often the images of a class are taken for another: attack -> (true, adversarial label) -> images.

    Only broken images count. The first entry, :data:`WORST`, has one label an image: the one that most attacks of the
    main ball gave it, and of equally many that of the earlier attack.
    """
    found: dict[str, Counter[tuple[int, int]]] = {WORST: Counter()}
    votes: dict[int, list[int]] = {}
    for row in result.attacks:
        if not row.predictions:
            continue
        own: Counter[tuple[int, int]] = Counter()
        main = (row.norm, row.eps) == (result.norm, result.eps)
        for image, outcome in enumerate(row.outcomes):
            if outcome == BROKEN and row.predictions[image] >= 0:
                own[result.labels[image], row.predictions[image]] += 1
                if main:
                    votes.setdefault(image, []).append(row.predictions[image])
        if own:
            found[row.label] = own
    for image, given in votes.items():
        found[WORST][result.labels[image], Counter(given).most_common(1)[0][0]] += 1
    return found


# -- several results


@dataclass(frozen=True)
class Pairing:
    """``better`` minus ``than`` in worst-case accuracy, image by image. p: exact McNemar, two-sided; holm: corrected.

    only_better, only_than: images that one withstands alone.
    """

    better: str
    than: str
    paired: Paired
    only_better: int
    only_than: int
    p: float
    holm: float


def pairings(sources: Sequence[Source]) -> list[Pairing]:
    """Every pair that was attacked on the same images in the same main ball, the larger accuracy first."""
    found = []
    for one, two in combinations(sources, 2):
        if not comparable(one.result, two.result):
            continue
        a, b = (_survivors(part.result) for part in (one, two))
        if a is None or b is None:
            continue
        if sum(a) < sum(b):
            one, two, a, b = two, one, b, a
        paired = paired_by_image(["".join(map(str, map(int, a)))], ["".join(map(str, map(int, b)))])
        if paired is not None:
            gained = sum(x and not y for x, y in zip(a, b, strict=True))
            lost = sum(y and not x for x, y in zip(a, b, strict=True))
            found.append((one.name, two.name, paired, gained, lost, mcnemar(gained, lost)))
    adjusted = holm({place: one[-1] for place, one in enumerate(found)})
    return [Pairing(*one, adjusted[place]) for place, one in enumerate(found)]


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test of ``gained`` against ``lost`` discordant pairs."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def comparable(one: EvaluationResult, two: EvaluationResult) -> bool:
    """The same images in the same order, and the same main ball."""
    balls = [(result.norm, parse_eps(result.eps)) for result in (one, two)]
    return balls[0] == balls[1] and _images(one) == _images(two)


def _images(result: EvaluationResult) -> tuple[Any, ...]:
    data = result.data or {}
    return data.get("fingerprint"), data.get("indices_sha256"), result.indices, result.labels


def _survivors(result: EvaluationResult) -> list[bool] | None:
    case = result.worst_case
    if case is None or case.robust_accuracy is None:
        return None
    return [outcome == ROBUST for outcome in case.outcomes]


def differences(sources: Sequence[Source]) -> list[str]:
    """What makes the numbers of several results hard to compare, in words."""
    results, found = [source.result for source in sources], []
    for what, values in (
        ("different data sets", [(result.data or {}).get("name") for result in results]),
        ("different main balls", [(result.norm, parse_eps(result.eps)) for result in results]),
        ("different test images", [_images(result) for result in results]),
        ("different batteries", [sorted(row.label for row in result.attacks) for result in results]),
        ("different modes", [result.mode for result in results]),
        ("different seeds of the attacks", [result.seed for result in results]),
    ):
        if any(value != values[0] for value in values[1:]):
            found.append(what)
    return found
