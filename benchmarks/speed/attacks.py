"""Part (a): the attacks, ours beside the peers', with the verified robust accuracy beside each time.

Ours is the command: :func:`scl_defense.benchmark` on the network and the images, with all that it does (frozen twin,
fooled images skipped, carry-over, workers, judging). A peer's time is its attack and a forward pass over what it made.
Everybody attacks the same rightly classified images with the same steps; every example is checked in float32 on the
original network by :func:`scl_defense_benchmarks.verdicts.judge`.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from scl_defense_benchmarks.attempt import CHUNK
from scl_defense_benchmarks.results import BROKEN
from scl_defense_benchmarks.statistics import paired_by_image
from scl_defense_benchmarks.verdicts import judge
from torch import Tensor

from scl_defense import benchmark
from scl_defense.plugins import PluginHost, default_host
from scl_defense.threat import ThreatModel
from speed.floor import cost, passes
from speed.networks import RECIPES, Case, Recipe, case
from speed.rivals import Rival, Task, offering
from speed.timing import Budget, NotInstalled, Timing, images_for, interleaved

TASKS = {
    "pgd-10": Task("pgd-10", "native:pgd:steps=10"),
    "restarts-5": Task("restarts-5", "native:pgd:steps=10:restarts=5", restarts=5),
    "curve-8": Task("curve-8", "native:pgd:steps=10", search="pgd-min:steps=10:refine=0", curve=8),
    "cw": Task("cw", "cw:c=1:steps=50", steps=50, minimal=True),
    "apgd-100": Task("apgd-100", "apgd-ce", steps=100),
    "standard": Task(
        "standard",
        "noise,fgsm,pgd,pgd-l2:eps={l2},cw:eps={l2},deepfool:eps={l2},apgd-ce,apgd-dlr,apgd-t,fab-t,square",
        steps=100,
    ),
    "autoattack": Task("autoattack", "autoattack", steps=100),
}
#: Passes of an image in a round of all sides, in forward-and-backward passes of the plain network: sizes the samples.
_WEIGHT = {
    "pgd-10": 90, "restarts-5": 250, "curve-8": 400, "cw": 300, "apgd-100": 600, "standard": 9000, "autoattack": 5000,
}  # fmt: skip
_SHORT = ("pgd-10", "restarts-5", "curve-8", "apgd-100")
#: What is run on which network.
PLAN: dict[str, tuple[str, ...]] = {
    "small-cnn plain": ("pgd-10", "restarts-5", "curve-8", "cw", "apgd-100"),
    "small-cnn robust": tuple(TASKS),
    "resnet18-w8 plain": ("pgd-10", "apgd-100"),
    "resnet18-w8 robust": tuple(TASKS),
    "resnet18-w64 robust": ("pgd-10", "restarts-5", "curve-8"),
}
QUICK: dict[str, tuple[str, ...]] = {
    "small-cnn robust": (*_SHORT, "cw", "autoattack"),
    "resnet18-w8 robust": ("pgd-10", "restarts-5", "curve-8"),
}
#: So many images at least, whatever the time: with fewer, what an evaluation costs before its first attack is all that
#: would be measured, and with one chunk of 128 one of two workers has nothing to do. Of a task on every network, or of
#: one on one network.
LEAST: dict[str | tuple[str, str], int] = {
    "pgd-10": 256, "restarts-5": 128, "curve-8": 64, "cw": 64, "apgd-100": 64, "autoattack": 128,
    ("small-cnn plain", "curve-8"): 256, ("small-cnn robust", "curve-8"): 256, ("small-cnn robust", "autoattack"): 2048,
    ("resnet18-w8 robust", "autoattack"): 256, ("resnet18-w64 robust", "restarts-5"): 256,
}  # fmt: skip
_DEAR = 32  # images on a network whose times alone count, of the peers that no bar names
_NAMED = ("torchattacks", "art", "pyautoattack")
_FLOOR_STEPS = 3
_EVEN = 2 * CHUNK  # as much for one worker as for the other


@dataclass
class Options:
    """seconds: for the whole part. most, least: images of a case; fewest: those of a task, or of (case, task). plan:
    case -> tasks; tasks: their options, fewer steps for tests.
    """

    work: Path
    root: str | None = None
    seconds: float = 600.0
    repeats: int = 3
    most: int = 2048
    least: int = 16
    plan: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(PLAN))
    tiny: bool = False
    fewest: Mapping[str | tuple[str, str], int] = field(default_factory=lambda: dict(LEAST))
    tasks: dict[str, Task] = field(default_factory=lambda: dict(TASKS))


Rows = list[dict[str, Any]]


def measure(
    options: Options,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[Rows], None] = lambda rows: None,
) -> Rows:
    """The rows of every (case, task, side), and before them a row about every case.

    The short tasks come first, on all networks: what the dear ones take over their share is taken from nobody. keep:
    given all rows so far after every task, so that a run that is stopped has lost one task.
    """
    host = default_host()
    recipes = [recipe for recipe in RECIPES if recipe.name in options.plan]
    rows: Rows = []
    cases = [_case(recipe, options, host, say) for recipe in recipes]
    rows += [{"kind": "case", **one.about()} for one in cases]
    groups = [(one, options.tasks[name]) for one in cases for name in options.plan[one.name]]
    groups.sort(key=lambda group: _WEIGHT[group[1].name])
    shares = Budget(options.seconds, len(groups)).shares()
    units: dict[str, dict[str, dict[str, float]]] = {}
    for one, task in groups:
        share = next(shares)
        if one.name not in units:
            units[one.name], floors = _floors(one, options)
            rows += floors
        per_image = units[one.name]["loop fp32"]["both"] * _WEIGHT[task.name]
        least = max(options.least, *(options.fewest.get(key, 0) for key in (task.name, (one.name, task.name))))
        n = images_for(share / options.repeats, per_image, least=least, most=options.most)
        n = max(n - n % _EVEN, _EVEN) if n > CHUNK else n
        say(f"{one.name}: {task.name}, {min(n, len(one.images))} images")
        rows += _group(one, task, n, share, options, units[one.name])
        keep(rows)
    return rows


def merged(before: Rows, again: Rows) -> Rows:
    """``before`` with the comparisons (case and task) of ``again`` in the place of the same ones, else at the end.

    Floors stay those of ``before``; the shares of a comparison are of the floors of its own run.
    """
    cases = {row["case"] for row in before}
    new: dict[tuple[str, str], Rows] = {}
    for row in again:
        if row["kind"] == "attack":
            new.setdefault((row["case"], row["task"]), []).append(row)
    rows: Rows = []
    for row in before:
        key = (row["case"], row.get("task", ""))
        if key not in new:
            rows.append(row)
        elif new[key][0] not in rows:
            rows += new[key]
    rows += [row for row in again if row["kind"] != "attack" and row["case"] not in cases]
    return rows + [row for group in new.values() if group[0] not in rows for row in group]


def _case(recipe: Recipe, options: Options, host: PluginHost, say: Callable[[str], None]) -> Case:
    say(f"{recipe.name}: network")
    return case(recipe, work=options.work, root=options.root, host=host, most=options.most, tiny=options.tiny)


def _floors(one: Case, options: Options) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Seconds of a forward and of a forward-and-backward pass of one image: kind and precision -> unit costs."""
    images, labels = one.first(min(256, len(one.images)))
    calls, names = {}, []
    for kind in ("loop", "side by side"):
        for precision in ("fp32", "bf16"):
            for what, gradient in (("both", True), ("forward", False)):
                names.append((f"{kind} {precision}", what))
                calls[f"{kind} {precision} {what}"] = passes(
                    one.network, images, labels, steps=_FLOOR_STEPS, precision=precision, kind=kind, gradient=gradient
                )
    found = interleaved(calls, repeats=max(3, options.repeats), warm=True)
    units: dict[str, dict[str, float]] = {}
    rows = []
    for (place, what), timing in zip(names, found.values(), strict=True):
        if timing.ok:
            units.setdefault(place, {})[what] = (timing.median or 0.0) / _FLOOR_STEPS / len(images)
        about = {"case": one.name, "floor": place, "pass": what, "images": len(images), "steps": _FLOOR_STEPS}
        rows.append({"kind": "floor", **about, **timing.row()})
    return units, rows


def _group(
    one: Case, task: Task, n: int, seconds: float, options: Options, units: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    images, labels = one.first(n)
    balls = task.balls(one.recipe.eps, one.recipe.l2)
    rivals = {kind.name: _Lazy(kind, one) for kind in offering(task)}
    given = {name: min(len(images), lazy.most(task)) for name, lazy in rivals.items()}
    if not one.recipe.accurate:
        given = {name: few if name in _NAMED else min(few, _DEAR) for name, few in given.items()}
    ways = {"": task, **({", one search": replace(task, ours=task.search)} if task.search else {})}
    calls: dict[str, Callable[[], Any]] = {
        f"ours {precision}{way}": lambda how=how, precision=precision: _ours(one, how, images, labels, balls, precision)
        for way, how in ways.items()
        for precision in ("auto", "fp32")
    }
    for name, lazy in rivals.items():
        few = given[name]
        calls[name] = lambda lazy=lazy, few=few: lazy().run(task, images[:few], labels[:few], balls)
    for lazy in rivals.values():
        lazy.prepare()  # imports are no part of an attack
    if "autoattack" in task.ours or task.minimal:
        del calls["ours auto"]  # nothing of it runs in bfloat16 of its own accord: the same as fp32
    found = interleaved(calls, repeats=options.repeats, until=perf_counter() + seconds)
    judged = {name: _outcomes(name, timing, one, images, labels, balls) for name, timing in found.items()}
    rows = []
    for name, timing in found.items():
        few = given.get(name, len(images))
        row: dict[str, Any] = {"kind": "attack", "case": one.name, "task": task.name, "side": name, "images": few}
        row |= timing.row()
        if timing.ok:
            row["images_per_s"] = round(few / (timing.median or 1), 3)
            row |= _accuracy(judged[name])
            for other in judged:
                if other.startswith("ours") and other != name:
                    row |= {f"{other} minus this": _paired(judged[other], judged[name], few)}
            if name.startswith("ours"):
                row |= _shares(timing, few, units)
                row["alone"] = len(images) == few
        rows.append(row)
    return rows


class _Lazy:
    """A rival that is built when it is first asked for; where it is not installed it says so then."""

    def __init__(self, kind: type[Rival], one: Case):
        self.kind, self.one, self.made = kind, one, None

    def most(self, task: Task) -> int:
        return self.kind.most.get(task.name.partition("-")[0], 10**9)

    def prepare(self) -> None:
        with contextlib.suppress(NotInstalled):
            self()

    def __call__(self) -> Rival:
        if self.made is None:
            self.made = self.kind(self.one.network, self.one.classes)
        return self.made


def _ours(one: Case, task: Task, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel], precision: str) -> Any:
    ball = balls[0]
    return benchmark(
        one.network,
        images,
        labels,
        attacks=task.ours.format(l2=one.recipe.l2),
        norm=ball.norm,
        eps=[ball.eps for ball in balls] if task.curve > 1 else ball.eps,
        mode="cascade" if "," in task.ours else "independent",
        probes="none",
        precision=precision,
    )


def _outcomes(
    name: str, timing: Timing, one: Case, images: Tensor, labels: Tensor, balls: Sequence[ThreatModel]
) -> list[str]:
    """For every ball a text, a character an image: ``1`` robust, ``0`` fooled by an example that we have checked."""
    if not timing.ok:
        return []
    if name.startswith("ours"):
        cases = {
            (found.norm, float(ThreatModel(found.norm, found.eps).radius)): found for found in timing.value.worst_cases
        }
        return [
            "".join("0" if code == BROKEN else "1" for code in cases[(ball.norm, ball.radius)].outcomes)
            for ball in balls
        ]
    texts = []
    with torch.no_grad():
        for ball, sets in zip(balls, timing.value, strict=True):
            fooled = torch.zeros(len(sets[0]), dtype=torch.bool)
            for examples in sets:
                few = len(examples)
                verdict = judge(one.network, images[:few], labels[:few], examples, ball, minimal=True)
                fooled |= verdict.fooled & (verdict.distance <= ball.tolerance())
            texts.append("".join("0" if one else "1" for one in fooled.tolist()))
    return texts


def _accuracy(texts: list[str]) -> dict[str, Any]:
    each = [text.count("1") / len(text) for text in texts]
    return {
        "robust": round(sum(each) / len(each), 4),
        **({"robust_by_ball": [round(x, 4) for x in each]} if len(each) > 1 else {}),
    }


def _paired(ours: list[str], theirs: list[str], few: int) -> list[float] | None:
    """Ours minus theirs in robust accuracy, the mean over balls, and its 95 % interval over images."""
    if not ours or not theirs:
        return None
    found = paired_by_image([text[:few] for text in ours], [text[:few] for text in theirs])
    return None if found is None else [round(x, 4) for x in (found.difference, found.low, found.high)]


def _shares(timing: Timing, n: int, units: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Passes done an image, and the time they cost at the floor as a share of the time taken."""
    ran = [row for row in timing.value.attacks if row.seconds]  # one search is counted in every ball, and ran in one
    precision = "bf16" if any(row.precision.startswith("bf16") for row in ran) else "fp32"
    # What looks for the smallest radius takes gradients alone in bfloat16.
    without = "fp32" if any(row.minimal for row in ran) else precision
    forwards = sum(row.forwards * max(sum(q > 0 for q in row.queries), 1) for row in ran)
    backwards = sum(row.backwards * max(sum(q > 0 for q in row.queries), 1) for row in ran)
    shares: dict[str, Any] = {
        "precision": precision, "forwards": round(forwards / n, 2), "backwards": round(backwards / n, 2),
    }  # fmt: skip
    for kind, name in (("loop", "share"), ("side by side", "share_side_by_side")):
        gradients, passed = units.get(f"{kind} {precision}"), units.get(f"{kind} {without}")
        if gradients and passed and timing.median:
            unit = {"both": gradients["both"], "forward": passed["forward"]}
            shares[name] = round(cost(forwards, backwards, unit) / timing.median, 3)
    return shares


def shrunk(task: Task, **fewer: Any) -> Task:
    """A task with fewer steps, for tests; our battery is told too."""
    task = replace(task, **fewer)
    ours = task.ours.replace(
        "autoattack", f"autoattack:steps={task.steps}:targets={task.targets}:queries={task.queries}"
    )
    return replace(
        task, ours=ours.replace("apgd-ce", f"apgd-ce:steps={task.steps}") if task.name == "apgd-100" else ours
    )
