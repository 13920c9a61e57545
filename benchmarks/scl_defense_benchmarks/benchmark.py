"""The command ``scl-defense benchmark`` as a call: open the network and its data, attack, report."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scl_defense import runtime
from scl_defense.checkpoint import sweep
from scl_defense.errors import UserError
from scl_defense.plugins import default_host
from scl_defense.runtime import LONG, joined, ranks
from scl_defense_benchmarks.attempt import Progress
from scl_defense_benchmarks.diagnostics import check_recorded, merged
from scl_defense_benchmarks.evaluate import Mode, evaluate
from scl_defense_benchmarks.planning import plan_battery
from scl_defense_benchmarks.question import Question, ask
from scl_defense_benchmarks.results import Report, write, write_per_image
from scl_defense_benchmarks.state import identity_of, locked, open_state, state_path
from scl_defense_benchmarks.subject import check_fit
from scl_defense_benchmarks.targets import check_targets, files_named, not_a_source
from scl_defense_benchmarks.twin import Choice


def _together(call: Callable[..., Report]) -> Callable[..., Report]:
    """The processes of a ``torchrun`` make the call as one; how long they are apart depends on the attacks."""

    @functools.wraps(call)
    def called(*arguments: Any, **keywords: Any) -> Report:
        with joined(torch.device("cpu"), patience=LONG):  # what they exchange are verdicts, not tensors of a card
            return call(*arguments, **keywords)

    return called


@_together
def benchmark(
    checkpoint: str | Path | nn.Module,
    images: Any = None,
    labels: Any = None,
    *,
    attacks: str | Iterable[str] = "fgsm,pgd,cw",
    data: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm: str | None = None,
    eps: str | float | Iterable[str | float] | None = None,
    curve: int | None = None,
    n: int | None = None,
    mode: Mode = "independent",
    time_limit: float | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = 128,
    device: str = "auto",
    plugins: Iterable[str | Path] = (),
    out: str | Path | None = None,
    per_image: str | Path | None = None,
    save_examples: str | Path | None = None,
    examples_most: int | None = None,
    restart: bool | Literal["if-stale"] = False,
    probes: Literal["quick", "deep", "none"] = "quick",
    surrogate: str | Path | None = None,
    surrogate_model: str | None = None,
    precision: Choice = "fp32",
    workers: int | None = None,
    deterministic: bool = False,
    progress: Progress | None = None,
    on_open: Callable[[nn.Module, Tensor], None] | None = None,
    command: str | None = None,
    **foreign: Any,
) -> Report:
    """Evaluate a trained checkpoint, or a network of your own, on the test split or on images of your own.

    checkpoint: a file, or an ``nn.Module`` from images in [0, 1] to logits; the latter needs ``images`` or ``data``, is
    attacked on its own device unless ``device`` names another (a copy goes there), and comes back as it was. images,
    labels: tensors or arrays, (N, C, H, W) in [0, 1], or uint8 from 0 to 255, and (N,) integers; they take the place
    of ``data``.

    attacks: see :func:`scl_defense_benchmarks.battery.parse_battery`; every attack takes ``restarts=K``. data,
    data_options, data_root: default: what the checkpoint was trained on. model, model_options, mean, std and what else
    ``foreign`` holds (head, weights, channels, label_map, trust_pickle): for a file that this project did not write;
    ``data`` is then needed too, and a checkpoint that knows its own refuses them.

    norm, eps: the main ball; default: the checkpoint's, else Linf at the data's usual radius. Several eps, as a list or
    ``"2/255,4/255,8/255"``, are a curve, and the largest is the main one. curve: so many radii up to the main one, from
    one search (see :func:`scl_defense_benchmarks.planning.plan_battery`): a curve for little more than one attack. n: a
    fixed stratified subset of so many images. deterministic: the same numbers bit by bit on CUDA too, slower. mode,
    time_limit (seconds), batch_size, probes, precision, workers: see
    :func:`scl_defense_benchmarks.evaluate.evaluate`. surrogate: the checkpoint for attacks that transfer from another
    network; surrogate_model: its network, if it is a file of bare weights (default: as ``model``). It is normalised as
    this network.

    out: where the result is written as JSON. Beside it, until the battery is complete, lies what was found so far: the
    same call goes on there after a kill or a time limit, another one is refused, and ``restart`` throws it away
    (``"if-stale"``: only when it belongs to another question). per_image: ``FILE.csv``, a line an attack and image.
    save_examples: ``FILE.safetensors``, the examples as float32; with ``examples_most`` only if they take no more bytes
    than that. A file that is read, or that somebody else wrote, is never replaced. on_open: told, before the first
    attack, the network (-> logits of the data's classes) and the images that are attacked. command: recorded as it is.

    Under ``torchrun`` every process makes this call, with the same arguments: they share out the images, one of them
    writes, and all return the result (see docs/distributed.md).

    Raises :class:`UserError` before anything is attacked: no data, a checkpoint that does not fit the data, a
    battery that cannot be planned. An attack that cannot work here is left out, and the result says why; one that
    fails later becomes a row of it.

    >>> import scl_defense, torch
    >>> images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> labels = network(images).argmax(1)
    >>> result = scl_defense.benchmark(network, images, labels, attacks="native:fgsm", eps=0.1, probes="none")
    >>> result.clean_accuracy, result.worst_case.robust_accuracy < 1, result.row("native:fgsm").status
    (1.0, True, 'ok')
    """
    if surrogate_model is not None and surrogate is None:
        raise UserError("surrogate_model is the network of a surrogate; name its file too (--surrogate)")
    said = {"model": model, "model_options": model_options, "mean": mean, "std": std, **foreign}
    host = default_host(plugins)
    everybody = ranks()
    asked = everybody.in_turn(
        lambda: ask(
            checkpoint,
            images,
            labels,
            data=data,
            data_options=data_options,
            data_root=data_root,
            norm=norm,
            eps=eps,
            n=n,
            device=device,
            host=host,
            foreign=said,
        )
    )
    subject = asked.subject
    read_from = {
        "the checkpoint": None if isinstance(checkpoint, nn.Module) else checkpoint,
        "the head (--head)": foreign.get("head"),
        "the surrogate": surrogate,
        "the data": data,
        **files_named(
            [foreign.get("label_map"), model, surrogate_model, data, *(data_options or {}).values(), *plugins]
        ),
    }
    check_targets({"--out": out, "--per-image": per_image, "--save-examples": save_examples}, read_from)
    plan = plan_battery(
        attacks,
        host=host,
        threats=asked.threats,
        budgets=asked.budgets,
        curve=curve,
        classes=asked.classes,
        n=len(asked.images),
        image_shape=tuple(asked.images.shape[1:]),
        surrogate=None if surrogate is None else str(surrogate),
        reading=None if surrogate is None else _reading(said, surrogate_model),
    )
    for planned in plan.attacks:
        for option, path in (("--per-image", per_image), ("--save-examples", save_examples), ("--out", out)):
            if path is not None:
                not_a_source(option, path, {"a surrogate": getattr(planned.attack, "surrogate", None)})
    check_fit(subject.network, asked.images[:1], asked.classes, asked.name)
    if on_open is not None:
        on_open(subject.network, asked.images)
    state_file = None if out is None else state_path(out)
    known = {key: subject.about[key] for key in ("sha256",) if key in subject.about}
    writes = everybody.leads
    one_process = locked(out) if out is not None and writes else contextlib.nullcontext()
    with one_process, runtime.deterministic(deterministic):
        if out is not None and per_image is not None and writes:
            sweep(Path(per_image).parent, Path(per_image).name)
        if restart == "if-stale" and state_file is not None:
            identity = identity_of(
                subject.network,
                asked.images,
                asked.labels.long(),
                plan.attacks,
                seed=seed,
                mode=mode,
                precision=precision,
                about=known,
            )
            restart = everybody.from_first(lambda: _is_stale(state_file, identity))
        found = evaluate(
            subject.network,
            asked.images,
            asked.labels,
            plan,
            seed=seed,
            batch_size=batch_size,
            mode=mode,
            time_limit=time_limit,
            state_file=state_file,
            restart=bool(restart),
            examples_file=save_examples,
            examples_most=examples_most,
            probes=probes,
            precision=precision,
            workers=workers,
            about=known,
            progress=progress,
        )
        recorded = _recorded(asked)
        as_recorded = [] if recorded is None else check_recorded(found.clean_correct, found.n, *recorded)
        result = dataclasses.replace(
            found,
            flags=tuple(merged([*found.flags, *as_recorded])),
            data=None if asked.opened is None else _about_data(asked),
            indices=tuple(asked.indices.tolist()),
            checkpoint=subject.about,
            plugins=tuple(host.provenance()),
            versions=runtime.versions(),
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if per_image is not None and writes:
            write_per_image(result, per_image)
        if out is not None and writes:
            write(result, out)
        if state_file is not None and result.complete and writes:
            state_file.unlink(missing_ok=True)
    return result


def _recorded(asked: Question) -> tuple[float, int] | None:
    """Clean validation accuracy of the very network in the file, and of how many images, on the data it belongs to."""
    about = asked.subject.about
    best = about.get("best") or {}
    if asked.opened is None or not best.get("images") or about.get("epoch") != best["epoch"] + 1:
        return None  # last.pt holds the accuracies of another epoch's network
    return (best["clean"], best["images"]) if json.loads(about["data"]) == asked.opened.provenance else None


def _about_data(asked: Question) -> dict[str, Any]:
    return {
        "name": asked.opened.name,
        "split": "test",
        "fingerprint": asked.opened.fingerprint("test"),
        "indices_sha256": hashlib.sha256(asked.indices.numpy().astype("<i8").tobytes()).hexdigest(),
        "classes": list(asked.opened.classes),
    }


def _reading(said: Mapping[str, Any], surrogate_model: str | None) -> dict[str, Any]:
    from scl_defense_benchmarks.transfer import reading  # imports torchattacks

    return reading(said, surrogate_model)


def _is_stale(path: Path, identity: Mapping[str, Any]) -> bool:
    if not path.exists():
        return False
    try:
        open_state(path, identity)
    except UserError:
        return True
    return False
