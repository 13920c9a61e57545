"""The battery: from ``"standard,pgd:steps=40,cw:c=1+10:eps=0.5"`` to attacks, each with its label and its ball."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scl_defense.config import make
from scl_defense.errors import ComponentError, UserError, nearest
from scl_defense.plugins import PluginHost
from scl_defense.threat import ALL_NORMS, ThreatModel, parse_eps
from scl_defense.types import Attack

RESERVED = ("norm", "eps")  # the attack's own ball; never options of a component

#: Names under which an attack with certain options is known: what each one stands for.
ALIASES: Mapping[str, str] = {
    "pgd-20": "pgd:steps=20",
    "pgd-100": "pgd:steps=100:rel_step=0.1:restarts=5",
    "pgd-l2": "pgd:steps=40:rel_step=0.2:norm=l2",
    "cw-art": "art:cw",
    "hopskipjump": "hsj",
}
_QUICK = ("noise", "fgsm", "pgd", "pgd-l2")
_STANDARD = (*_QUICK, "cw", "deepfool", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")
#: Ready batteries: a name in a battery that stands for several attacks.
TIERS: Mapping[str, tuple[str, ...]] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "full": (
        *_STANDARD,
        *("mifgsm", "native:pgd:loss=margin", "apgd-l1:norm=l1", "ead"),
        *("sparsefool", "jsma", "onepixel:norm=l0", "pixle", "simba", "hsj", "boundary", "spatial", "transfer"),
        *("art:pgd", "art:cw", "autoattack"),
    ),
}
# In a norm that a tier's attack cannot work in: the first of these that can.
_STAND_INS = {"pgd": ("native:pgd", "sparsefool"), "apgd-ce": ("apgd-l1",), "square": ("onepixel",)}


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
class LeftOut:
    """An attack that is skipped. tier: that it came with; empty: it was named. reason: as in "skipped because ..."."""

    label: str
    tier: str
    reason: str


class CannotRun(UserError):
    """An attack that cannot work here, which is no mistake of who asked for it. reason: as in "skipped because ..."."""

    def __init__(self, label: str, reason: str):
        super().__init__(f"attack '{label}' {reason}")
        self.reason = f"it {reason}"


@dataclass(frozen=True)
class Plan:
    """What is to be run. threat: the main one; an attack that cannot work in its norm has another.

    left_out: attacks that cannot work in this norm, on such images, or with so few classes.
    """

    threat: ThreatModel
    attacks: tuple[PlannedAttack, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        if not self.attacks:
            raise UserError("the battery is empty; name at least one attack, like --attacks fgsm,pgd,cw")
        labels = [planned.label for planned in self.attacks]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise UserError(f"attack '{twice}' is in the battery twice; leave one out or give it another option")

    def threats(self) -> list[ThreatModel]:
        """The distinct balls: those of the main norm from the smallest on, then the others, each norm from the smallest
        on (``8/255`` and ``16/510`` are the same ball).
        """
        found: dict[tuple[str, Any], ThreatModel] = {}
        for threat in (self.threat, *(planned.threat for planned in self.attacks)):
            found.setdefault((threat.norm, parse_eps(threat.eps)), threat)
        used = {(planned.threat.norm, parse_eps(planned.threat.eps)) for planned in self.attacks}
        norms = list(dict.fromkeys(norm for norm, _ in found))
        return [found[key] for key in sorted(used, key=lambda key: (norms.index(key[0]), key[1]))]


def parse_battery(attacks: str | Iterable[str | Request]) -> list[Request]:
    """Split a battery. A piece with ``=`` is an option, the pieces before the first one are the name.

    attacks: comma-separated text, or one text (or what was split already) per attack. Lists in an option are written
    ``c=1+10+100``. Raises :class:`UserError` for an empty piece, a name after an option, or an option given twice.
    """
    texts = attacks.split(",") if isinstance(attacks, str) else list(attacks)
    if not any(isinstance(text, Request) or text.strip() for text in texts):
        raise UserError("no attack is given; write names separated by commas, like fgsm,pgd,cw")
    return [text if isinstance(text, Request) else _parse_attack(text) for text in texts]


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


def expanded(request: Request, host: PluginHost) -> Request:
    """What an alias stands for (see :data:`ALIASES`), under the label as written; what is written beside it wins.

    A plugin's attack of that name goes first. Raises :class:`UserError` for another norm than the alias names.
    """
    text = None if request.name in host["attack"] else ALIASES.get(request.name)
    if text is None:
        return request
    stands_for = _parse_attack(text)
    if stands_for.norm and request.norm and ThreatModel(request.norm, "0").norm != stands_for.norm:
        raise UserError(
            f"attack '{request.label}': '{request.name}' works in {stands_for.norm} alone; use {stands_for.name}"
        )
    options = {**stands_for.options, **request.options}
    norm = stands_for.norm or request.norm
    return dataclasses.replace(request, name=stands_for.name, options=options, norm=norm)


def plan_attacks(
    attacks: str | Iterable[str | Request],
    *,
    host: PluginHost,
    threat: ThreatModel,
    budgets: Mapping[str, str] | None = None,
    classes: int | None = None,
    image_shape: Sequence[int] | None = None,
    n: int | None = None,
    surrogate: str | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Plan:
    """Build every attack of a battery and decide its ball; nothing is run.

    attacks: see :func:`parse_battery`; the name of a tier (see :data:`TIERS`) stands for its attacks. threat: the main
    ball. budgets: norm -> usual eps of the data, for attacks that look for the smallest perturbation and cannot do so
    in the main norm (Carlini-Wagner under Linf is counted at the L2 budget). ``norm`` and ``eps`` of a single attack
    win over both. classes: how many the network tells apart; image_shape: (C, H, W); n: how many images; each where it
    is known. surrogate: the checkpoint for attacks that work on another network and name none; reading: how it is
    read, for their fields of these names (see :class:`scl_defense_benchmarks.transfer.Transfer`).

    Raises :class:`UserError` for an unknown attack, option or norm, a norm that was named and the attack cannot do, a
    surrogate that cannot be read, or the same attack twice. What cannot work here is left out: in the main norm, on
    such images, with so few classes, on more images than its limit, in a norm without a budget, without a surrogate. An
    error is raised when nothing else is left to run. One that was named beside its tier is run once, as it was named.
    """
    shape = image_shape and tuple(image_shape)
    about = _About(host, threat, budgets or {}, classes, shape, n, surrogate, reading or {})
    named: list[PlannedAttack] = []
    order: list[tuple[Request, PlannedAttack | LeftOut | None]] = []
    unable: list[CannotRun] = []
    for request in parse_battery(attacks):
        planned: PlannedAttack | LeftOut | None = None
        if request.name in TIERS:
            if request.options or request.norm or request.eps:
                raise UserError(
                    f"'{request.label}': '{request.name}' stands for several attacks and takes no options; name the "
                    "attack that should have them beside it"
                )
        else:
            try:
                planned = _plan_one(request, about)
            except CannotRun as reason:
                unable.append(reason)
                planned = LeftOut(request.label, "", reason.reason)
            else:
                if other := _same(planned, named):
                    raise UserError(
                        f"attack '{request.label}' is the same as '{other.label}' (code, options, ball); leave one out"
                    )
                named.append(planned)
        order.append((request, planned))
    found: list[PlannedAttack] = []
    left_out = [one for _, one in order if isinstance(one, LeftOut)]
    for request, planned in order:
        if isinstance(planned, PlannedAttack):
            found.append(planned)
        for member in TIERS[request.name] if planned is None else ():
            one = _plan_member(member, request.name, left_out, about)
            if one is not None and not _same(one, [*named, *found]):
                found.append(one)
    if unable and not found:
        raise unable[0]
    first = {one.label: one for one in reversed(left_out)}  # of a name and a tier, or two tiers, the first says it
    return Plan(threat, tuple(found), tuple(one for one in left_out if first.pop(one.label, None) is one))


@dataclass(frozen=True)
class _About:
    """What a battery is planned for."""

    host: PluginHost
    threat: ThreatModel
    budgets: Mapping[str, str]
    classes: int | None
    image_shape: tuple[int, ...] | None
    n: int | None
    surrogate: str | None
    reading: Mapping[str, Any]


def _plan_member(member: str, tier: str, left_out: list[LeftOut], about: _About) -> PlannedAttack | None:
    try:
        return _plan_one(_parse_attack(member), about)
    except CannotRun as error:
        reason, planned = error.reason, None
        for instead in _STAND_INS.get(member, ()):
            try:
                planned = _plan_one(_parse_attack(instead), about)
            except CannotRun as neither:
                if about.threat.norm in about.host["attack"].get(instead).norms:
                    reason += f" ({instead}, in its place, is left out because {neither.reason})"
                continue
            reason += f" ({instead} takes its place)"
            break
    left_out.append(LeftOut(member, tier, reason))
    return planned


def _same(planned: PlannedAttack, others: Iterable[PlannedAttack]) -> PlannedAttack | None:
    attack, ball = planned.attack, planned.threat
    return next(
        (one for one in others if type(one.attack) is type(attack) and one.attack == attack and one.threat == ball),
        None,
    )


def _plan_one(request: Request, about: _About) -> PlannedAttack:
    host, request = about.host, expanded(request, about.host)
    if request.name not in host["attack"]:
        hint = nearest(request.name, [*TIERS, *ALIASES, *(entry.name for entry in host["attack"])])
        if any(f"'{name}'" in hint for name in (*TIERS, *ALIASES)):
            raise UserError(f"there is no attack or battery named '{request.name}'{hint}")
    attack = make(host, "attack", request.name, request.options)
    if not isinstance(attack, Attack):
        raise ComponentError(f"attack '{request.name}' must be callable and have norms, minimal and access")
    if about.surrogate is not None and getattr(attack, "surrogate", None) == "":
        own = {field.name for field in dataclasses.fields(attack)}
        given = {name: value for name, value in about.reading.items() if name in own and name not in request.options}
        attack = dataclasses.replace(attack, surrogate=about.surrogate, **given)
    ball = _ball_of(request, attack, about.threat, about.budgets)
    if reason := _unable(attack, about):
        raise CannotRun(request.label, reason)
    return PlannedAttack(request.label, request.name, attack, ball)


def _unable(attack: Attack, about: _About) -> str | None:
    """Why ``attack`` cannot work on such classes or images, or on so many; ``None`` where it can.

    Read from the attack's optional ``min_classes``, ``channels`` (a set), ``square_images``, ``limit`` (an option) and
    ``unable(classes, image_shape)``.
    """
    classes, shape, n = about.classes, about.image_shape, about.n
    needed = int(getattr(attack, "min_classes", 2))
    if classes is not None and classes < needed:
        return f"needs {needed} classes, the network has {classes}; use apgd-ce or autoattack"
    if shape is not None:
        channels = getattr(attack, "channels", None)
        if channels is not None and shape[0] not in channels:
            wanted = " or ".join(map(str, sorted(channels)))
            return f"needs images of {wanted} channels, these have {shape[0]}; leave it out"
        if getattr(attack, "square_images", False) and shape[1] != shape[2]:
            return f"needs square images, these are {shape[1]}x{shape[2]}; leave it out"
    limit = getattr(attack, "limit", None)
    if n is not None and isinstance(limit, int) and n > limit:
        return f"is slow and takes at most {limit} images, not {n}; use fewer (n) or allow it: limit={n}"
    unable = getattr(attack, "unable", None)
    return None if unable is None else unable(classes, shape)


def _ball_of(request: Request, attack: Attack, threat: ThreatModel, budgets: Mapping[str, str]) -> ThreatModel:
    can = [norm for norm in ALL_NORMS if norm in attack.norms]
    if request.norm is not None:
        norm = ThreatModel(request.norm, "0").norm  # raises for an unknown norm
        if norm not in can:
            raise UserError(f"attack '{request.label}' cannot work in {norm}; '{request.name}' does {', '.join(can)}")
    elif own := getattr(attack, "own_ball", None):  # it bounds its examples in a way of its own
        whole = ThreatModel.parse(own)
        return whole if request.eps is None else ThreatModel(whole.norm, request.eps)
    elif threat.norm in can:
        norm = threat.norm
    elif not attack.minimal:  # never another ball than the one that was asked for
        instead = {"l1": "apgd-l1 or native:pgd", "l0": "sparsefool"}.get(threat.norm, "native:pgd")
        raise CannotRun(
            request.label,
            f"cannot work in {threat.norm}, only in {', '.join(can)}; use {instead}, or give it its own ball: "
            f"{request.label}:norm={can[0]}",
        )
    else:
        norm = next((norm for norm in can if norm in budgets), can[0])
    if request.eps is not None:
        return ThreatModel(norm, request.eps)
    if norm == threat.norm:
        return threat
    if norm not in budgets:
        raise CannotRun(
            request.label,
            f"works in {norm} and no usual {norm} budget is known for this data; give its own: {request.label}:eps=...",
        )
    return ThreatModel(norm, budgets[norm])
