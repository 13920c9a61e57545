"""Static drawings as inline SVG: what is read without JavaScript, and what is printed.

Colours are classes of the page's style sheet (light, dark, print); what tells two things apart is never colour alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from scl_defense_benchmarks.report.gather import Upset, bare

COLOURS = 8  # s0 to s7 of the style sheet
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKS = ("circle", "square", "triangle", "diamond")


def turn(place: int) -> int:
    """Which dash and mark a series has: a second round of the colours comes with others."""
    return (place + place // COLOURS) % len(MARKS)


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """``<name ...>children</name>``; everything that is not Markup is escaped. ``klass`` is class, ``_`` is a dash."""
    given = {("class" if key == "klass" else key.replace("_", "-")): value for key, value in attributes.items()}
    texts = Markup("").join(
        Markup(' {}="{}"').format(Markup(key), f"{value:.5g}" if isinstance(value, float) else value)
        for key, value in given.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), texts, Markup("").join(children))


def picture(width: float, height: float, title: str, *children: Any, described: str = "", klass: str = "") -> Markup:
    """A drawing that a screen reader announces by ``title`` and ``described``."""
    parts = [tag("title", title), *([tag("desc", described)] if described else []), *children]
    return tag("svg", *parts, viewBox=f"0 0 {width:.5g} {height:.5g}", role="img", klass=f"drawing {klass}".strip(),
               aria_label=title, preserveAspectRatio="xMidYMid meet", xmlns="http://www.w3.org/2000/svg")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """points: (x, y, low, high), the last two ``None`` without a band. step: the value holds until the next point.
    joined: a line goes through the points; otherwise each stands by itself, and the span is a whisker.
    """

    name: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    step: bool = False
    strong: bool = False
    joined: bool = True


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def room(values: Sequence[float]) -> tuple[float, float]:
    """An axis for points that stand by themselves: air on both sides, and no small difference that fills the page."""
    low, high = min(values), max(values)
    span = max(high - low, 0.05 * abs(high), 1e-6)
    middle = (low + high) / 2
    return middle - 0.6 * span, middle + 0.6 * span


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    described: str = "",
) -> Markup:
    """Lines with bands, and a legend below."""
    width, left, right, top, plot = 640.0, 54.0, 12.0, 10.0, 250.0
    xs = [point[0] for line in lines for point in line.points]
    ys = [value for line in lines for point in line.points for value in point[1:] if value is not None]
    x0, x1 = x_range or ((min(xs), max(xs)) if xs else (0.0, 1.0))
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = y_range or ((min(ys), max(ys)) if ys else (0.0, 1.0))
    y1 = y1 if y1 > y0 else y0 + 1

    def x(value: float) -> float:
        return left + (width - left - right) * (value - x0) / (x1 - x0)

    def y(value: float) -> float:
        return top + plot * (1 - (value - y0) / (y1 - y0))

    parts: list[Markup] = []
    for value in ticks(y0, y1):
        parts.append(tag("line", x1=left, x2=width - right, y1=y(value), y2=y(value), klass="grid"))
        parts.append(tag("text", f"{value:g}", x=left - 6, y=y(value) + 4, text_anchor="end", klass="tick"))
    last = -math.inf
    for value, text in x_ticks or [(value, f"{value:g}") for value in ticks(x0, x1, 8)]:
        parts.append(tag("line", x1=x(value), x2=x(value), y1=top + plot, y2=top + plot + 4, klass="axis"))
        if x(value) - last > 7.0 * len(text):
            last = x(value)
            parts.append(tag("text", text, x=x(value), y=top + plot + 18, text_anchor="middle", klass="tick"))
    parts.append(tag("path", d=f"M{left} {top}V{top + plot}H{width - right}", klass="axis", fill="none"))
    parts.append(tag("text", x_label, x=(left + width - right) / 2, y=top + plot + 36, text_anchor="middle",
                     klass="label"))  # fmt: skip
    parts.append(tag("text", y_label, x=-(top + plot / 2), y=13.0, text_anchor="middle", klass="label",
                     transform="rotate(-90)"))  # fmt: skip
    for place, line in enumerate(lines):
        parts += _drawn(line, place, x, y)
    legend, height = _legend([line.name for line in lines], width, top + plot + 52)
    return picture(width, height, title, *parts, *legend, described=described)


def _drawn(line: Line, place: int, x: Any, y: Any) -> list[Markup]:
    colour, parts = f"s{place % COLOURS}", []
    if not line.joined:
        for across, up, low, high in line.points:
            if low is not None and high is not None:
                parts.append(
                    tag("path", d=f"M{x(across):.5g} {y(low):.5g}V{y(high):.5g}", fill="none", klass=f"line {colour}")
                )
            parts.append(mark(x(across), y(up), place, 4.5))
        return parts
    banded = [point for point in line.points if point[2] is not None and point[3] is not None]
    if len(banded) > 1:
        there = " ".join(f"{x(p[0]):.5g},{y(p[3]):.5g}" for p in banded)
        back = " ".join(f"{x(p[0]):.5g},{y(p[2]):.5g}" for p in reversed(banded))
        parts.append(tag("polygon", points=f"{there} {back}", klass=f"band {colour}"))
    path = ""
    for number, point in enumerate(line.points):
        px, py = f"{x(point[0]):.5g}", f"{y(point[1]):.5g}"
        path += f"M{px} {py}" if not number else (f"H{px}V{py}" if line.step else f"L{px} {py}")
    parts.append(tag("path", d=path, fill="none", klass=f"line {colour}{' strong' if line.strong else ''}",
                     stroke_dasharray=DASHES[turn(place)] or None))  # fmt: skip
    if not line.step and len(line.points) <= 40:
        parts += [mark(x(point[0]), y(point[1]), place) for point in line.points]
    return parts


def mark(x: float, y: float, place: int, size: float = 3.5) -> Markup:
    """The marker of series ``place``."""
    shape, klass = MARKS[turn(place)], f"mark s{place % COLOURS}"
    if shape == "circle":
        return tag("circle", cx=float(x), cy=float(y), r=size, klass=klass)
    corners = {"square": ((-1, -1), (1, -1), (1, 1), (-1, 1)), "triangle": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
               "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0))}[shape]  # fmt: skip
    return tag("polygon", points=" ".join(f"{x + size * a:.5g},{y + size * b:.5g}" for a, b in corners), klass=klass)


def _legend(names: Sequence[str], width: float, top: float) -> tuple[list[Markup], float]:
    """Keys in as many columns as the longest name leaves room for; and the height below which nothing is drawn."""
    longest = max((len(name) for name in names), default=0)
    columns = max(1, min(4, int((width - 40) // (48 + 7 * min(longest, 80)))))
    parts, room = [], int(((width - 40) / columns - 48) / 7)
    for place, name in enumerate(names):
        x, y = 40 + (width - 40) / columns * (place % columns), top + 20 * (place // columns)
        parts.append(tag("line", x1=x, x2=x + 28, y1=y, y2=y, klass=f"line s{place % COLOURS}",
                         stroke_dasharray=DASHES[turn(place)] or None))  # fmt: skip
        parts.append(mark(x + 14, y, place))
        parts.append(tag("text", cut(name, room), x=x + 34, y=y + 4, klass="tick"))
    return parts, top + 20 * math.ceil(len(names) / columns)


def cut(text: str, longest: int) -> str:
    """At most ``longest`` signs, the last of them an ellipsis where something is missing."""
    return text if len(text) <= longest else text[: max(longest - 1, 1)] + "…"


def interval_bar(value: float | None, low: float | None, high: float | None) -> Markup:
    """A share with its interval, for a cell of a table: the number stands beside it."""
    if value is None:
        return Markup("")
    parts = [tag("rect", x=0.0, y=3.0, width=100.0, height=8.0, klass="rail"),
             tag("rect", x=0.0, y=3.0, width=100.0 * value, height=8.0, klass="bar")]  # fmt: skip
    if low is not None and high is not None:
        parts.append(tag("path", d=f"M{100 * low:.5g} 7H{100 * high:.5g}M{100 * low:.5g} 3V11M{100 * high:.5g} 3V11",
                         klass="whisker", fill="none"))  # fmt: skip
    return tag("svg", *parts, viewBox="0 0 100 14", klass="inline", aria_hidden="true", preserveAspectRatio="none")


def upset_chart(found: Upset, *, title: str) -> Markup:
    """Columns: sets of attacks and how many images exactly they broke; rows: the attacks with their totals."""
    labels, sets = list(found.totals), found.sets
    left, top, plot, row, column = 250.0, 40.0, 140.0, 22.0, 26.0
    width = max(left + column * max(len(sets), 1) + 16, 560)
    highest = max((count for _, count in sets), default=1)
    most = max((total for total, _ in found.totals.values()), default=1) or 1
    parts = []
    for number, label in enumerate(labels):
        y = top + plot + 14 + row * number
        total, _ = found.totals[label]
        if number % 2 == 0:
            parts.append(tag("rect", x=0.0, y=y, width=float(width), height=row, klass="stripe"))
        parts.append(tag("rect", x=0.0, y=y + row - 5, width=200.0 * total / most, height=3.0, klass="bar"))
        parts.append(tag("text", cut(bare(label), 28), x=2.0, y=y + 13, klass="tick"))
        parts.append(tag("text", total, x=left - 12, y=y + 14, text_anchor="end", klass="tick"))
    for number, (members, count) in enumerate(sets):
        x = left + column * number + column / 2
        tall = plot * count / highest
        inside = [tag("title", f"{count} images: {' and '.join(map(bare, members))}, no other"),
                  tag("rect", x=x - column / 2, y=0.0, width=column, height=top + plot + 14 + row * len(labels),
                      klass="hit"),
                  tag("rect", x=x - 8, y=top + plot - tall, width=16.0, height=tall, klass="bar"),
                  tag("text", count, x=x, y=top + plot - tall - 4, text_anchor="middle", klass="tick")]  # fmt: skip
        ends = [labels.index(member) for member in members]
        if len(ends) > 1:
            y1, y2 = (top + plot + 14 + row * end + row / 2 for end in (min(ends), max(ends)))
            inside.append(tag("line", x1=x, x2=x, y1=y1, y2=y2, klass="joint"))
        for place, label in enumerate(labels):
            inside.append(tag("circle", cx=x, cy=top + plot + 14 + row * place + row / 2, r=6.0,
                              klass="dot on" if label in members else "dot"))  # fmt: skip
        parts.append(tag("g", *inside, klass="set"))
    parts.append(tag("text", "images broken by exactly these attacks", x=left, y=12.0, klass="label"))
    parts.append(tag("text", "attack, and images it broke", x=2.0, y=top + plot + 4, klass="label"))
    return picture(width, top + plot + 18 + row * len(labels), title, *parts, klass="upset")


def class_chart(rows: Sequence[Any], *, title: str) -> Markup:
    """Clean and worst-case accuracy of each class: a thin and a thick bar with intervals."""
    left, width, line = 150.0, 640.0, 26.0
    span, parts = width - left - 60, []
    for value in (0, 25, 50, 75, 100):
        x = left + span * value / 100
        parts.append(tag("line", x1=x, x2=x, y1=4.0, y2=8 + line * len(rows), klass="grid"))
        parts.append(tag("text", value, x=x, y=22 + line * len(rows), text_anchor="middle", klass="tick"))
    for number, row in enumerate(rows):
        y = 6 + line * number
        parts.append(tag("text", cut(row.name, 20), x=left - 8, y=y + 15, text_anchor="end", klass="tick"))
        parts.append(tag("rect", x=left, y=y + 2, width=span * row.clean, height=5.0, klass="bar s7"))
        if row.robust is not None:
            low, high = row.robust_interval
            parts.append(tag("rect", x=left, y=y + 8, width=span * row.robust, height=10.0, klass="bar"))
            parts.append(tag("path", d=f"M{left + span * low:.5g} {y + 13:.5g}H{left + span * high:.5g}",
                             klass="whisker", fill="none"))  # fmt: skip
            parts.append(tag("text", f"{100 * row.robust:.0f}", x=left + span + 8, y=y + 17, klass="tick"))
    parts.append(tag("text", "accuracy (%): thin clean, thick worst case with its 95 % interval", x=left,
                     y=40 + line * len(rows), klass="label"))  # fmt: skip
    return picture(width, 46 + line * len(rows), title, *parts)


def scatter(clouds: Sequence[tuple[str, Sequence[tuple[float, float]], Sequence[int]]], names: Sequence[str], *,
            title: str, x_label: str, y_label: str) -> Markup:  # fmt: skip
    """Points by class. clouds: (``clean`` or ``adversarial``, points, classes); crosses are the adversarial ones."""
    size, pad = 460.0, 24.0
    xs = [point[0] for _, points, _ in clouds for point in points]
    ys = [point[1] for _, points, _ in clouds for point in points]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = (point[0] - x0) / ((x1 - x0) or 1), (point[1] - y0) / ((y1 - y0) or 1)
        return pad + (size - 2 * pad) * across, size - pad - (size - 2 * pad) * up

    parts = [tag("rect", x=1.0, y=1.0, width=size - 2, height=size - 2, klass="frame", fill="none")]
    means: dict[int, list[tuple[float, float]]] = {}
    for kind, points, owners in clouds:
        for point, owner in zip(points, owners, strict=True):
            x, y = place(point)
            if kind == "clean":
                parts.append(tag("circle", cx=x, cy=y, r=2.4, klass=f"mark s{owner % COLOURS}"))
                means.setdefault(owner, []).append((x, y))
            else:
                d = f"M{x - 2.6:.4g} {y - 2.6:.4g}l5.2 5.2m0 -5.2l-5.2 5.2"
                parts.append(tag("path", d=d, fill="none", klass=f"cross s{owner % COLOURS}"))
    if len(means) <= 20:
        for owner, own in means.items():
            x, y = (sum(axis) / len(own) for axis in zip(*own, strict=True))
            parts.append(tag("text", cut(names[owner], 12), x=x, y=y, text_anchor="middle", klass="halo"))
    parts.append(tag("text", x_label, x=size / 2, y=size + 16, text_anchor="middle", klass="label"))
    parts.append(tag("text", y_label, x=-size / 2, y=-6.0, text_anchor="middle", klass="label",
                     transform="rotate(-90)"))  # fmt: skip
    return tag("svg", tag("title", title), *parts, viewBox=f"-18 0 {size + 20:g} {size + 22:g}", role="img",
               aria_label=title, klass="drawing square", xmlns="http://www.w3.org/2000/svg")  # fmt: skip
