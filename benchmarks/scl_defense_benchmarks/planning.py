"""What a command asks for beyond one battery in one ball: several radii (a curve), and our own restarts."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scl_defense.errors import UserError
from scl_defense.plugins import PluginHost
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks.battery import (
    TIERS,
    Plan,
    PlannedAttack,
    Request,
    expanded,
    parse_battery,
    plan_attacks,
)

MOST_RESTARTS, MOST_POINTS = 1000, 1000


@dataclass(frozen=True)
class Repeated(PlannedAttack):
    """A planned attack and how often it starts, each time on what it has not broken yet."""

    restarts: int = 1


def plan_battery(
    attacks: str | Iterable[str],
    *,
    host: PluginHost,
    threats: Sequence[ThreatModel],
    budgets: Mapping[str, str] | None = None,
    classes: int | None = None,
    curve: int | None = None,
    **more: Any,
) -> Plan:
    """:func:`scl_defense_benchmarks.battery.plan_attacks` for one ball or several of one norm.

    The largest ball is the main one. With several, an attack is planned once in each, the smallest first, and its
    label says which (``pgd:eps=2/255``); one that names a ball of its own is planned once. ``restarts=K`` of any attack
    that has no such option itself is ours. curve: so many radii up to the one ball; every attack of its norm that looks
    for the smallest perturbation is counted in each of them, and ``pgd-min``, which is added if it is not there.
    """
    requests, repeats = _without_restarts(attacks, host)
    order = sorted(dict.fromkeys(threats), key=lambda threat: threat.radius)
    if len(order) < len(threats):
        raise UserError("a radius is given twice; leave one out")
    if curve is not None:
        return _with_curve(attacks, curve, order, host, {"budgets": budgets, "classes": classes, **more})
    found: list[PlannedAttack] = []
    left_out: list[Any] = []
    for threat in order:
        plan = plan_attacks(requests, host=host, threat=threat, budgets=budgets, classes=classes, **more)
        for planned in plan.attacks:
            if planned.threat == threat and getattr(planned.attack, "radii", None) == ():
                radii = tuple(one.eps for one in order) if len(order) > 1 else ()
                planned = dataclasses.replace(planned, attack=dataclasses.replace(planned.attack, radii=radii))
            for label, restarts in repeats.get(planned.label, [(planned.label, 1)]):
                one = planned
                if restarts > 1 or label != planned.label:
                    shared = {field.name: getattr(planned, field.name) for field in dataclasses.fields(planned)}
                    one = Repeated(**{**shared, "label": label}, restarts=restarts)
                if _among(one, found):
                    continue
                if len(order) > 1 and one.threat == threat and ":eps=" not in label:
                    one = dataclasses.replace(one, label=f"{label}:eps={threat.eps}")
                found.append(one)
        left_out += plan.left_out
    return dataclasses.replace(plan, attacks=tuple(found), left_out=tuple(dict.fromkeys(left_out)), threat=order[-1])


def _with_curve(
    attacks: str | Iterable[str], points: int, order: Sequence[ThreatModel], host: PluginHost, about: Mapping[str, Any]
) -> Plan:
    from scl_defense_benchmarks.pgd_min import evenly  # imports torch's attacks

    if not 2 <= points <= MOST_POINTS:
        raise UserError(f"curve is {points}; it must be from 2 to {MOST_POINTS} radii")
    if len(order) > 1:
        raise UserError("eps holds several radii already, which are a curve; leave the others or curve (--curve) out")
    (main,) = order
    if main.radius == 0:
        raise UserError("a curve needs a largest radius above 0; give one with eps (--eps 8/255)")
    searches = [one.name for one in parse_battery(attacks) if hasattr(_target(one.name, host), "radii")]
    plan = plan_battery(
        [*parse_battery(attacks), *([] if searches else parse_battery("pgd-min"))], host=host, threats=order, **about
    )
    radii = evenly(main.eps, points)
    found: list[PlannedAttack] = []
    for planned in plan.attacks:
        if planned.threat == main and getattr(planned.attack, "radii", None) == ():
            planned = dataclasses.replace(planned, attack=dataclasses.replace(planned.attack, radii=radii))
        found.append(planned)
    for planned in tuple(found):
        if planned.attack.minimal and planned.threat == main:
            for eps in radii[:-1]:
                label = f"{planned.label}:eps={eps}"
                found.append(dataclasses.replace(planned, label=label, threat=ThreatModel(main.norm, eps)))
    return dataclasses.replace(plan, attacks=tuple(found))


def _target(name: str, host: PluginHost) -> Any:
    return host["attack"].get(name) if name in host["attack"] else None


def same_attack(one: PlannedAttack, other: PlannedAttack) -> bool:
    """The same code with the same options in the same norm, whatever the radius."""
    return (
        type(one.attack) is type(other.attack)
        and one.attack == other.attack
        and one.threat.norm == other.threat.norm
        and getattr(one, "restarts", 1) == getattr(other, "restarts", 1)
    )


def _among(one: PlannedAttack, others: Iterable[PlannedAttack]) -> bool:
    return any(same_attack(one, other) and one.threat == other.threat for other in others)


def _without_restarts(
    attacks: str | Iterable[str], host: PluginHost
) -> tuple[list[Request], dict[str, list[tuple[str, int]]]]:
    """The battery without our option, and for each label without it: the labels as written, with the counts."""
    bare: dict[str, Request] = {}
    repeats: dict[str, list[tuple[str, int]]] = {}
    for request in (expanded(request, host) for request in parse_battery(attacks)):
        value = request.options.get("restarts")
        own = request.name in host["attack"] and "restarts" in getattr(
            host["attack"].get(request.name), "__dataclass_fields__", {}
        )
        if value is None or own or request.name in TIERS:  # a tier takes no options: the planner says so
            label, restarts, options = request.label, 1, request.options
        elif not value.isdecimal() or not 1 <= int(value) <= MOST_RESTARTS:
            raise UserError(
                f"attack '{request.label}': restarts '{value}' must be a whole number from 1 to {MOST_RESTARTS}"
            )
        else:
            pieces = [piece.strip() for piece in request.label.split(":")]
            label = ":".join(piece for piece in pieces if piece.partition("=")[0].strip() != "restarts")
            restarts = int(value)
            options = {name: text for name, text in request.options.items() if name != "restarts"}
        if label in bare and restarts in [count for _, count in repeats[label]]:
            raise UserError(f"attack '{label}' is in the battery twice; leave one out or give it another option")
        bare.setdefault(label, dataclasses.replace(request, label=label, options=options))
        repeats.setdefault(label, []).append((request.label, restarts))
    return list(bare.values()), repeats
