"""The battery: from ``"fgsm,pgd:steps=40,cw:c=1+10:eps=0.5"`` to attacks, each with its label and its ball."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scl_defense.config import make
from scl_defense.errors import ComponentError, UserError
from scl_defense.plugins import PluginHost
from scl_defense.threat import NORMS, ThreatModel, parse_eps
from scl_defense.types import Attack

RESERVED = ("norm", "eps")  # the attack's own ball; never options of a component


@dataclass(frozen=True)
class Request:
    """One attack as the user wrote it: registered name, component options, and its own norm or eps (or ``None``)."""

    label: str
    name: str
    options: Mapping[str, str]
    norm: str | None
    eps: str | None


@dataclass(frozen=True)
class PlannedAttack:
    """One attack of a battery. label: unique within the plan. threat: the ball it attacks in, or is counted at."""

    label: str
    name: str
    attack: Attack
    threat: ThreatModel

    @property
    def options(self) -> dict[str, Any]:
        """Every hyper-parameter, also those left at their default."""
        return dataclasses.asdict(self.attack) if dataclasses.is_dataclass(self.attack) else {}


@dataclass(frozen=True)
class Plan:
    """What is to be run. threat: the main one; an attack that cannot work in its norm has another."""

    threat: ThreatModel
    attacks: tuple[PlannedAttack, ...]

    def __post_init__(self) -> None:
        if not self.attacks:
            raise UserError("the battery is empty; name at least one attack, like --attacks fgsm,pgd,cw")
        labels = [planned.label for planned in self.attacks]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise UserError(f"attack '{twice}' is in the battery twice; leave one out or give it another option")

    def threats(self) -> list[ThreatModel]:
        """The distinct balls, the main one first (``8/255`` and ``16/510`` are the same ball)."""
        found: dict[tuple[str, Any], ThreatModel] = {}
        for threat in (self.threat, *(planned.threat for planned in self.attacks)):
            found.setdefault((threat.norm, parse_eps(threat.eps)), threat)
        used = {(planned.threat.norm, parse_eps(planned.threat.eps)) for planned in self.attacks}
        return [threat for key, threat in found.items() if key in used]


def parse_battery(attacks: str | Iterable[str]) -> list[Request]:
    """Split a battery. A piece with ``=`` is an option, the pieces before the first one are the name.

    attacks: comma-separated text, or one text per attack. Lists in an option are written ``c=1+10+100``. Raises
    :class:`UserError` for an empty piece, a name after an option, or an option given twice.
    """
    texts = attacks.split(",") if isinstance(attacks, str) else list(attacks)
    if not any(text.strip() for text in texts):
        raise UserError("no attack is given; write names separated by commas, like fgsm,pgd,cw")
    return [_parse_attack(text) for text in texts]


def _parse_attack(text: str) -> Request:
    label = text.strip()
    pieces = [piece.strip() for piece in label.split(":")]
    if not all(pieces):
        raise UserError(f"attack '{label}' has an empty part; write NAME or NAME:OPTION=VALUE, like pgd:steps=40")
    first = next((place for place, piece in enumerate(pieces) if "=" in piece), len(pieces))
    name = ":".join(pieces[:first])
    if not name:
        raise UserError(f"attack '{label}' has no name; write NAME:OPTION=VALUE, like pgd:steps=40")
    options: dict[str, str] = {}
    for piece in pieces[first:]:
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not equals:
            raise UserError(f"attack '{label}': '{piece}' stands after an option; write NAME:OPTION=VALUE")
        if not key or not value:
            raise UserError(f"attack '{label}': '{piece}' is no option; write OPTION=VALUE, like steps=40")
        if key in options:
            raise UserError(f"attack '{label}': option '{key}' is given twice; leave one out")
        options[key] = value
    norm, eps = (options.pop(key, None) for key in RESERVED)
    return Request(label, name, options, norm, eps)


def plan_attacks(
    attacks: str | Iterable[str], *, host: PluginHost, threat: ThreatModel, budgets: Mapping[str, str] | None = None
) -> Plan:
    """Build every attack of a battery and decide its ball; nothing is run.

    threat: the main ball. budgets: norm -> usual eps of the data, for attacks that look for the smallest
    perturbation and cannot do so in the main norm (Carlini-Wagner under Linf is counted at the L2 budget). ``norm``
    and ``eps`` of a single attack win over both. Raises :class:`UserError` for an unknown attack, option or norm, a
    norm the attack cannot do, a norm without a budget, or the same attack twice.
    """
    planned: list[PlannedAttack] = []
    for request in parse_battery(attacks):
        attack = make(host, "attack", request.name, request.options)
        if not isinstance(attack, Attack):
            raise ComponentError(f"attack '{request.name}' must be callable and have norms, minimal and access")
        ball = _ball_of(request, attack, threat, budgets or {})
        for other in planned:
            if type(other.attack) is type(attack) and other.attack == attack and other.threat == ball:
                raise UserError(
                    f"attack '{request.label}' is the same as '{other.label}' (code, options, ball); leave one out"
                )
        planned.append(PlannedAttack(request.label, request.name, attack, ball))
    return Plan(threat, tuple(planned))


def _ball_of(request: Request, attack: Attack, threat: ThreatModel, budgets: Mapping[str, str]) -> ThreatModel:
    can = [norm for norm in NORMS if norm in attack.norms]
    if request.norm is not None:
        norm = ThreatModel(request.norm, "0").norm  # raises for an unknown norm
        if norm not in can:
            raise UserError(f"attack '{request.label}' cannot work in {norm}; '{request.name}' does {', '.join(can)}")
    elif threat.norm in can:
        norm = threat.norm
    elif not attack.minimal:  # never another ball than the one that was asked for
        raise UserError(
            f"attack '{request.label}' cannot work in {threat.norm}, only in {', '.join(can)}; use native:pgd, or give "
            f"it its own ball: {request.label}:norm={can[0]}"
        )
    else:
        norm = next((norm for norm in can if norm in budgets), can[0])
    if request.eps is not None:
        return ThreatModel(norm, request.eps)
    if norm == threat.norm:
        return threat
    if norm not in budgets:
        raise UserError(
            f"attack '{request.label}' works in {norm} and no usual {norm} budget is known for this data; "
            f"give its own: {request.label}:eps=..."
        )
    return ThreatModel(norm, budgets[norm])
