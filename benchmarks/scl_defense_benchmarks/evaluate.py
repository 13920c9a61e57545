"""Attack a network with a battery, on tensors, and check every example ourselves."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.guard import frozen
from scl_defense.memory import SHARE, choose, free_bytes, peak_bytes
from scl_defense.memory import Choice as Fit
from scl_defense.runtime import derive_seed, ranks, repeatable, stream
from scl_defense.threat import parse_eps
from scl_defense_benchmarks import diagnostics
from scl_defense_benchmarks.attempt import CHUNK, Progress, attempt
from scl_defense_benchmarks.battery import Plan
from scl_defense_benchmarks.catalogue import flagged
from scl_defense_benchmarks.chunks import Budget, Target
from scl_defense_benchmarks.counting import Attempt, counted_in, worst_case
from scl_defense_benchmarks.examples import ExampleFile
from scl_defense_benchmarks.forward import decide, logits_of
from scl_defense_benchmarks.library_guard import seeded_globals
from scl_defense_benchmarks.planning import same_attack
from scl_defense_benchmarks.results import BROKEN, EvaluationResult, WorstCase
from scl_defense_benchmarks.state import State, identity_of, open_state
from scl_defense_benchmarks.statistics import wilson
from scl_defense_benchmarks.twin import CHECKED, Choice, bf16_pays, twin_of

_BUFFERS = 32
WORTH_PROBING = 0.03  # robust accuracy below which there is nothing left to be suspicious of

#: ``independent``: every attack gets every rightly classified image. ``cascade``: what no attack before it has broken.
Mode = Literal["independent", "cascade"]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    plan: Plan,
    *,
    seed: int,
    batch_size: int | Literal["auto"] = 128,
    mode: Mode = "independent",
    time_limit: float | None = None,
    state_file: str | Path | None = None,
    restart: bool = False,
    examples_file: str | Path | None = None,
    examples_most: int | None = None,
    probes: Literal["quick", "deep", "none"] = "none",
    precision: Choice = "fp32",
    workers: int | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Run a planned battery on tensors and judge every example it returns.

    network: (N, C, H, W) in [0, 1] -> logits (N, K), evaluated in eval mode and given back unchanged. images: (N, C,
    H, W) float32 in [0, 1], on the network's device; labels: (N,) integers in [0, K). Every attack gets the images
    that are classified rightly, in chunks of :data:`scl_defense_benchmarks.attempt.CHUNK` with a seed of their own, and
    a frozen twin of the network to work on (see :mod:`scl_defense_benchmarks.twin`). Examples are judged in float32 on
    ``network`` itself, in chunks of one size. batch_size: the most images at a time, from 1 to a chunk; it reaches no
    number, except through a library that draws for a part of what it was given. ``auto``: as many as the
    free memory allows (see :func:`fitting`). It is halved, and the result says so, when memory runs out.

    mode: see :data:`Mode`; a control spares no image. The same attack in several balls runs in the smallest first and
    hands on what it broke; one that looks for the smallest perturbation runs once and is counted in each. time_limit:
    seconds from now; an attack that does not fit is a row ``not run``. state_file: where finished chunks are kept; what
    is there already is not attacked again, and one of another question is refused unless ``restart`` throws it away;
    the caller takes it away. examples_file: ``FILE.safetensors`` for the examples; examples_most: they may be left out,
    and are where they would take more bytes than that or the state holds chunks without them. probes: how much is tried
    beside the battery (see :mod:`scl_defense_benchmarks.probes`). precision: what attacks may run in (see
    :func:`scl_defense_benchmarks.twin.rounds`); every verdict is float32. workers: chunks attacked side by side, where
    the attack draws from its own generator alone and the network draws nothing; default: torch's number of threads on
    a CPU, else 1; it reaches no number. Processes under ``torchrun`` share out the chunks and exchange what they found;
    the first writes and is told of progress. about: what tells this network from others beside its weights.

    Raises :class:`UserError` for images or labels that cannot be; an attack's fault never leaves this function.
    """
    started = time.monotonic()
    if mode not in get_args(Mode):
        raise UserError(f"mode '{mode}' is unknown; it must be one of {', '.join(get_args(Mode))}")
    if precision not in get_args(Choice):
        raise UserError(f"precision '{precision}' is unknown; it must be one of {', '.join(get_args(Choice))}")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    if time_limit is not None and not time_limit > 0:
        raise UserError(f"time limit {time_limit} must be above 0 seconds")
    _check_inputs(network, images, labels, batch_size)
    labels = labels.to(images.device, torch.int64)
    with (
        frozen(network),
        seeded_globals(derive_seed(seed, "network")),
        repeatable("fp32"),
        torch.autocast(images.device.type, enabled=False),
    ):
        logits = logits_of(network, images)
        if int(labels.max()) >= logits.shape[1]:
            raise UserError(f"label {int(labels.max())} has no logit: the network has {logits.shape[1]} classes")
        flags = diagnostics.check_network(network, images, labels, logits)
        draws = any(flag.id in ("random-forward", "batch-dependent-forward") for flag in flags)
        target = Target(network, images, labels, decide(logits) == labels, repeatable=not draws)
        side_by_side = workers or (torch.get_num_threads() if images.device.type == "cpu" else 1)
        deadline = None if time_limit is None else started + time_limit
        fitted = None
        if batch_size == "auto":
            with seeded_globals(derive_seed(seed, "memory")):
                fitted = fitting(target, side_by_side)
            batch_size = fitted.images
        budget = Budget(batch_size, deadline, precision=precision, workers=side_by_side)
        everybody = ranks()

        def opened() -> State:
            ran = "bf16" if bf16_pays(images.device) else "fp32"  # a state may be carried to another machine
            how = {"seed": seed, "mode": mode, "precision": f"auto, {ran}" if precision == "auto" else precision}
            asked = identity_of(network, images, labels, plan.attacks, **how, about=about)
            return open_state(Path(state_file), asked, restart=restart)  # type: ignore[arg-type]

        state = State(None, {}) if state_file is None else everybody.from_first(opened)
        if not everybody.leads:
            state.path, examples_file, progress = None, None, None
        if examples_most is not None:
            saved = len(plan.attacks) * images.numel() * 4 <= examples_most and state.with_examples
            examples_file = examples_file if saved else None
        examples = None if examples_file is None else ExampleFile(examples_file, images)
        if examples is not None and state.fresh:
            examples.clear()
        attempts = _all_attempts(target, plan, seed, mode, budget, state, examples, progress)
        if examples is not None:
            cut_short = any(attempt.tally.unfinished for attempt in attempts)
            examples.finish({planned.label: str(planned.threat) for planned in plan.attacks}, keep=cut_short)
        cases = tuple(worst_case(place, threat, target, attempts) for place, threat in enumerate(plan.threats()))
        place = _worth_probing(plan, cases)
        if probes != "none" and place is not None:
            robust = torch.tensor([code != BROKEN for code in cases[place].outcomes])
            ball, rng = plan.threats()[place], stream(seed, "probes")
            if progress is not None:
                progress("probes for masked gradients", 0, 0)
            found = everybody.from_first(
                lambda: diagnostics.probe(network, images, labels, ball, rng, probes, robust)  # type: ignore[arg-type]
            )
            flags += diagnostics.answered(found, [one.row for one in attempts if one.row.label in cases[place].attacks])
    for one in attempts:
        flags += diagnostics.check_row(one.row)
        if one.tally.wrote_input:
            flags.append(diagnostics.input_was_written(one.row.label))
    flags += _limits(attempts, budget, batch_size)
    rows = tuple(one.row for one in attempts)
    families = [str(getattr(planned.attack, "family", "")) for planned in plan.attacks]
    flags += diagnostics.check_battery(rows, families)
    clean, n = int(target.correct.sum()), len(images)
    return EvaluationResult(
        n=n,
        num_classes=logits.shape[1],
        seed=seed,
        batch_size=batch_size,
        memory=None if fitted is None else dataclasses.asdict(fitted),
        norm=plan.threat.norm,
        eps=plan.threat.eps,
        clean_correct=clean,
        clean_accuracy=clean / n,
        clean_interval=wilson(clean, n),
        attacks=rows,
        worst_cases=cases,
        flags=tuple(diagnostics.merged(flags)),
        left_out=tuple(dataclasses.asdict(one) for one in plan.left_out),
        device=str(images.device),
        probes=probes,
        precision=precision,
        workers=side_by_side,
        threads=torch.get_num_threads(),
        ranks=everybody.world,
        mode=mode,
        labels=tuple(labels.tolist()),
        predictions=tuple(decide(logits).tolist()),
    )


def fitting(target: Target, side_by_side: int, share: float = SHARE) -> Fit:
    """How many images at a time fit into ``share`` of the free memory, ``side_by_side`` batches at once.

    Measured on the twin, by a gradient of the cross-entropy with 2 images and with 8; to that come ``_BUFFERS`` copies
    of the images, which is what attacks hold beside it.
    """
    twin, device = twin_of(target.network, target.images[:CHECKED]), target.images.device
    size = target.images[0].numel() * target.images.element_size()

    def measure(count: int) -> int:
        images, labels = target.images[:1].repeat(count, 1, 1, 1), target.labels[:1].repeat(count)

        def pass_through() -> None:
            with torch.enable_grad():
                points = images.clone().requires_grad_()
                loss = F.cross_entropy(twin(points), labels)
                torch.autograd.grad(loss, points, allow_unused=True) if loss.requires_grad else None

        return peak_bytes(pass_through, device) + _BUFFERS * count * size

    return choose(measure, free_bytes(device), CHUNK, side_by_side=side_by_side, share=share)


def _all_attempts(
    target: Target,
    plan: Plan,
    seed: int,
    mode: Mode,
    budget: Budget,
    state: State,
    examples: ExampleFile | None,
    progress: Progress | None,
) -> list[Attempt]:
    balls, attempts = plan.threats(), []
    for number, planned in enumerate(plan.attacks):
        again = [one for one in attempts if same_attack(one.planned, planned)]
        if planned.attack.minimal and again:
            attempts.append(counted_in(planned, again[0], target, number))
            if examples is not None:
                examples.copy(again[0].number, number, again[0].tally.tried.nonzero().squeeze(1))
            continue
        spared = None
        if mode == "cascade":
            spared = torch.zeros(len(target.correct), dtype=torch.bool)
            for one in attempts:
                if one.row.access != "control":  # or nothing would show that a control beats the attacks
                    spared |= one.tally.inside[balls.index(planned.threat)]
        attempts.append(
            attempt(
                target,
                planned,
                number=number,
                balls=balls,
                seed=seed,
                budget=budget,
                state=state,
                spared=spared,
                smaller=sorted(
                    (one for one in again if one.planned.threat.radius < planned.threat.radius),
                    key=lambda one: one.planned.threat.radius,
                ),
                examples=examples,
                progress=progress,
            )
        )
    return attempts


def _limits(attempts: list[Attempt], budget: Budget, batch_size: int) -> list[diagnostics.Flag]:
    flags = []
    stopped = tuple(one.row.label for one in attempts if one.row.status == "not run")
    if stopped:
        what = f"The time limit came before {len(stopped)} of {len(attempts)} attacks were done."
        flags.append(flagged("time-limit", what, attacks=stopped))
    if budget.halved:
        what = f"Memory ran out with {batch_size} images at a time; it went on with {budget.batch_size}."
        flags.append(flagged("out-of-memory", what))
    return flags


def _worth_probing(plan: Plan, cases: tuple[WorstCase, ...]) -> int | None:
    """The largest ball of the main norm that the battery has left something of: what is broken hides nothing."""
    left = [
        (parse_eps(case.eps), place)
        for place, case in enumerate(cases)
        if case.norm == plan.threat.norm and (case.robust_accuracy is None or case.robust_accuracy > WORTH_PROBING)
    ]
    return max(left)[1] if left else None


def _check_inputs(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int | str) -> None:
    if not isinstance(network, nn.Module):
        raise UserError(f"the network must be a torch.nn.Module from images to logits, not {type(network).__name__}")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise UserError(f"batch size {batch_size} must be at least 1, or auto")
    if images.dim() != 4 or images.dtype != torch.float32 or len(images) == 0:
        raise UserError(f"images must be float32 (N, C, H, W) with N >= 1, not {images.dtype} {tuple(images.shape)}")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise UserError(f"labels must be integers ({len(images)},), not {labels.dtype} {tuple(labels.shape)}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"images must lie in [0, 1], they lie in [{low:g}, {high:g}]; divide by 255 and leave normalisation to the "
            "network's first layer, or eps means something else"
        )
    if int(labels.min()) < 0:
        raise UserError(f"label {int(labels.min())} is negative; labels count from 0")
