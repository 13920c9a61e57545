"""The same attack of several libraries on the same images: what should be equal is, and chance explains the rest."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from scl_defense.config import make
from scl_defense.errors import ComponentError, UserError
from scl_defense.guard import frozen
from scl_defense.plugins import PluginHost, default_host
from scl_defense.runtime import repeatable, stream
from scl_defense.threat import ThreatModel
from scl_defense.types import Attack
from scl_defense_benchmarks.attempt import Progress
from scl_defense_benchmarks.battery import parse_battery
from scl_defense_benchmarks.forward import decide, logits_of
from scl_defense_benchmarks.question import ask
from scl_defense_benchmarks.subject import check_fit
from scl_defense_benchmarks.verdicts import Verdict, check_returned, judge

SAME = 1e-5  # a pixel of two images that are equal up to the order of float32 sums
SHARE = 0.02  # of images that may differ more: there a rounding has turned the sign of a gradient
LEVEL = 0.01  # of the two-sided binomial test
NEAR = 0.05  # two medians of smallest distances

#: What is compared when nothing is named.
DEFAULT = ("fgsm", "pgd:random_start=false", "pgd")


@dataclass(frozen=True)
class Side:
    """One library's attack. broken: rightly classified images that it breaks inside the ball. reason: why it did not
    run, else empty. median: of the distances of its examples, for attacks that look for the smallest.
    """

    name: str
    library: str
    broken: int | None
    median: float | None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two libraries on one attack. verdict: ``equal``, ``agree`` or ``disagree``; why: in one sentence.

    deterministic: nothing is drawn, so the images themselves must be equal. differing: images that are not.
    only_first, only_second: images that only one of them breaks. p: of that division if both are equally strong.
    """

    attack: str
    threat: ThreatModel
    first: str
    second: str
    deterministic: bool
    differing: int
    only_first: int
    only_second: int
    p: float
    verdict: str
    why: str


@dataclass(frozen=True)
class AgreementResult:
    """attacked: images classified rightly, which are those attacked."""

    attacked: int
    sides: Mapping[str, tuple[Side, ...]]
    comparisons: tuple[Comparison, ...]

    @property
    def agree(self) -> bool:
        """Whether there is a comparison and none disagrees."""
        return bool(self.comparisons) and all(one.verdict != "disagree" for one in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        return {
            "attacked": self.attacked,
            "sides": {attack: [dataclasses.asdict(side) for side in sides] for attack, sides in self.sides.items()},
            "comparisons": [{**dataclasses.asdict(one), "threat": str(one.threat)} for one in self.comparisons],
            "agree": self.agree,
        }


def agree(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    attacks: str | Iterable[str] = DEFAULT,
    host: PluginHost,
    budgets: Mapping[str, str] | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> AgreementResult:
    """Run each attack from every library that has it and compare all with the first one.

    network: (N, C, H, W) in [0, 1] -> logits; given back unchanged. attacks: names without a library, with options
    that every library's version has. threat: the ball; an attack that does not know its norm is counted in its own, at
    the radius of ``budgets``. progress: told of every batch (attack, images done, images in all). Every library gets
    the same images, batches and seeds; what is returned is judged as in an evaluation. Raises :class:`UserError` for an
    attack that fewer than two libraries have.
    """
    plans = [_versions(request, host, threat, budgets or {}) for request in parse_battery(attacks)]
    labels = labels.to(images.device, torch.int64)
    sides: dict[str, tuple[Side, ...]] = {}
    found: list[Comparison] = []
    with frozen(network), repeatable("fp32"), torch.no_grad():
        right = decide(logits_of(network, images)) == labels
        given, truth = images[right], labels[right]
        if len(given) == 0:
            raise UserError("the network gets none of these images right; give it the data it was trained on")
        for attack, ball, versions in plans:
            ran: list[tuple[Side, Attack, Verdict]] = []
            rows = []
            for name, component in versions:
                told = None if progress is None else functools.partial(progress, f"{name} ({ball})")
                side, verdict = _run(network, given, truth, ball, name, component, seed, batch_size, told)
                rows.append(side)
                if verdict is not None:
                    ran.append((side, component, verdict))
            sides[attack] = tuple(rows)
            found += [_compare(attack, ball, ran[0], other) for other in ran[1:]]
    return AgreementResult(int(right.sum()), sides, tuple(found))


def _versions(
    request: Any, host: PluginHost, threat: ThreatModel, budgets: Mapping[str, str]
) -> tuple[str, ThreatModel, list[tuple[str, Attack]]]:
    if ":" in request.name:
        raise UserError(
            f"'{request.name}' names its library; give the attack alone, like {request.name.split(':')[-1]}"
        )
    names = sorted(entry.name for entry in host["attack"] if entry.name.split(":")[-1] == request.name)
    named = [name for name in names if ":" in name]
    if len(named) < 2:
        known = {entry.name.split(":")[-1] for entry in host["attack"] if ":" in entry.name}
        several = sorted(
            one for one in known if sum(e.name.endswith(":" + one) and ":" in e.name for e in host["attack"]) > 1
        )
        raise UserError(
            f"attack '{request.name}' comes from {len(named)} libraries; compare one of {', '.join(several)}"
        )
    versions = []
    for name in sorted(named, key=lambda name: (not name.startswith("native:"), name)):
        attack = make(host, "attack", name, request.options)
        if not isinstance(attack, Attack):
            raise ComponentError(f"attack '{name}' must be callable and have norms, minimal and access")
        if getattr(attack, "early_stop", False) and dataclasses.is_dataclass(attack):
            attack = dataclasses.replace(attack, early_stop=False)  # the libraries go on with a fooled image too
        versions.append((name, attack))
    norm = request.norm or threat.norm
    common = frozenset.intersection(*(frozenset(attack.norms) for _, attack in versions))
    if norm not in common:
        if request.norm or not common:
            raise UserError(f"attack '{request.name}' cannot work in {norm} everywhere, only in {', '.join(common)}")
        norm = min(common)
    eps = request.eps or (threat.eps if norm == threat.norm else budgets.get(norm))
    if eps is None:
        raise UserError(f"attack '{request.name}' works in {norm}, which needs a radius: {request.label}:eps=...")
    return request.label, ThreatModel(norm, eps), versions


def _run(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    name: str,
    attack: Attack,
    seed: int,
    batch_size: int,
    told: Callable[[int, int], None] | None,
) -> tuple[Side, Verdict | None]:
    library = str(getattr(attack, "library", name.partition(":")[0]))
    returned = []
    for number, batch in enumerate(torch.arange(len(images)).split(batch_size)):
        if told is not None:
            told(number * batch_size, len(images))
        try:
            with torch.enable_grad():
                made = attack(network, images[batch], labels[batch], threat, stream(seed, "attack", number))
            returned.append(check_returned(made, images[batch]))
        except Exception as error:  # the others can still be compared
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Side(name, library, None, None, fault), None
    verdict = judge(network, images, labels, torch.cat(returned), threat, minimal=bool(attack.minimal))
    broken = verdict.fooled & (verdict.distance <= threat.tolerance())
    median = float(verdict.distance[verdict.fooled].median()) if attack.minimal and verdict.fooled.any() else None
    return Side(name, library, int(broken.sum()), median), verdict


def _compare(
    attack: str, threat: ThreatModel, one: tuple[Side, Attack, Verdict], other: tuple[Side, Attack, Verdict]
) -> Comparison:
    (side, first, mine), (rival, _, theirs) = one, other
    deterministic = not first.minimal and _draws_nothing(first)
    apart = (mine.examples - theirs.examples).abs().flatten(1).amax(1) > SAME
    inside = [verdict.fooled & (verdict.distance <= threat.tolerance()) for verdict in (mine, theirs)]
    only_first, only_second = int((inside[0] & ~inside[1]).sum()), int((inside[1] & ~inside[0]).sum())
    divided = only_first + only_second
    p = float(binomtest(only_first, divided).pvalue) if divided else 1.0
    differing, n = int(apart.sum()), len(apart)
    if deterministic:
        verdict = "equal" if differing <= SHARE * n else "disagree"
        why = f"{differing} of {n} images differ by more than {SAME:g} in a pixel"
    elif side.median is not None and rival.median is not None:
        gap = abs(side.median - rival.median) / max(min(side.median, rival.median), 1e-12)
        verdict = "agree" if gap <= NEAR else "disagree"
        why = f"median distances {side.median:.4g} and {rival.median:.4g} are {gap:.1%} apart"
    else:
        verdict = "agree" if p >= LEVEL else "disagree"
        why = f"{only_first} images fall to the first alone, {only_second} to the second (p = {p:.2g})"
    return Comparison(
        attack, threat, side.name, rival.name, deterministic, differing, only_first, only_second, p, verdict, why
    )


def _draws_nothing(attack: Attack) -> bool:
    family = str(getattr(attack, "family", ""))
    return family == "fgsm" or (family == "pgd" and getattr(attack, "random_start", True) is False)


def agreement(
    checkpoint: str | Path | nn.Module,
    *,
    attacks: str | Iterable[str] = DEFAULT,
    data: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm: str | None = None,
    eps: str | float | None = None,
    n: int | None = 200,
    seed: int = 0,
    batch_size: int = 128,
    device: str = "auto",
    plugins: Iterable[str | Path] = (),
    progress: Progress | None = None,
    **foreign: Any,
) -> AgreementResult:
    """Compare the libraries on a trained network and the test split; see :func:`agree`.

    The arguments are those of :func:`scl_defense.benchmark`.
    """
    host = default_host(plugins)
    asked = ask(
        checkpoint,
        data=data,
        data_options=data_options,
        data_root=data_root,
        norm=norm,
        eps=eps,
        n=n,
        device=device,
        host=host,
        foreign={"model": model, "model_options": model_options, "mean": mean, "std": std, **foreign},
    )
    if len(asked.threats) > 1:
        raise UserError("libraries are compared in one ball at a time; give one eps")
    check_fit(asked.subject.network, asked.images[:1], asked.classes, asked.name)
    return agree(
        asked.subject.network,
        asked.images,
        asked.labels,
        asked.threats[0],
        attacks=attacks,
        host=host,
        budgets=asked.budgets,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )


def render(result: AgreementResult) -> Any:
    """The result as a small table for a terminal."""
    from rich.table import Table

    table = Table(title=f"{result.attacked} rightly classified images", title_justify="left")
    for column in ("attack", "ball", "libraries", "broken", "verdict", "why"):
        table.add_column(column)
    broken = {(attack, side.name): side.broken for attack, sides in result.sides.items() for side in sides}
    for one in result.comparisons:
        counts = f"{broken[one.attack, one.first]} / {broken[one.attack, one.second]}"
        names = f"{one.first} / {one.second}"
        table.add_row(one.attack, str(one.threat), names, counts, one.verdict, one.why)
    for attack, sides in result.sides.items():
        for side in sides:
            if side.reason:
                table.add_row(attack, "", side.name, "", "failed", side.reason)
    return table
