"""``study``: from a recipe to finished cells, results, tables, figures and a summary."""

import json
import os
import platform
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from scl_defense.errors import Interrupted, UserError, nearest
from scl_defense.plugins import PluginHost, default_host
from scl_defense_benchmarks.study import executors
from scl_defense_benchmarks.study.cells import Cell, check_components, grid
from scl_defense_benchmarks.study.outcome import StudyResult
from scl_defense_benchmarks.study.spec import Spec, read_spec
from scl_defense_benchmarks.study.store import Store

Event = Callable[[Mapping[str, Any]], None]
MEMORY_A_CELL = 2 << 30  # what "room" means when nobody says how many cells may run side by side


@overload
def study(
    recipe: str | Path,
    *,
    size: str | None = None,
    out: str | Path | None = None,
    seeds: Iterable[int] | None = None,
    only: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    jobs: int | None = None,
    executor: str = "local",
    cpus: int | None = None,
    gpus: float | None = None,
    slurm: Mapping[str, str] | None = None,
    ray_address: str | None = None,
    plugins: Sequence[str | Path] = (),
    dry_run: Literal[False] = False,
    redo: bool = False,
    tables_only: bool = False,
    on_event: Event | None = None,
) -> StudyResult: ...
@overload
def study(recipe: str | Path, *, dry_run: Literal[True], **settings: Any) -> dict[str, Any]: ...
@overload
def study(recipe: str | Path, *, dry_run: bool, **settings: Any) -> Any: ...
def study(
    recipe: str | Path,
    *,
    size: str | None = None,
    out: str | Path | None = None,
    seeds: Iterable[int] | None = None,
    only: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    jobs: int | None = None,
    executor: str = "local",
    cpus: int | None = None,
    gpus: float | None = None,
    slurm: Mapping[str, str] | None = None,
    ray_address: str | None = None,
    plugins: Sequence[str | Path] = (),
    dry_run: bool = False,
    redo: bool = False,
    tables_only: bool = False,
    on_event: Event | None = None,
) -> StudyResult | dict[str, Any]:
    """Train and attack every cell of a study that is not done yet; the command ``scl-defense study`` is this call.

    recipe: a TOML file, as ``benchmarks/studies/smoke.toml`` shows. out: default ``studies/<file stem>[-size]``. only:
    methods to run now; tables show what is there. overrides: of ``[base]``. jobs: cells side by side (default: what
    cores and memory give; on a cluster all of them, it has a queue). executor: ``local``, ``slurm`` or ``ray``; the
    others need their extra, and a folder that all machines share. cpus, gpus: of a cell. slurm: options of ``sbatch``.
    ray_address: of the cluster's head. The threads of a cell are its cpus, else what jobs leaves it (1 on a cluster);
    they are settled once and stay, so that a restart rounds alike.
    Returns a :class:`StudyResult`; with ``dry_run`` a dict with the grid and an estimate, and nothing is written.
    Cells that fail are in ``failed``; the others go on, and one whose worker was lost is tried again. SIGINT and
    SIGTERM let the cells save, cancel what was submitted, and raise :class:`Interrupted`. Raises :class:`UserError`
    before anything runs for a recipe that cannot be.

    >>> import scl_defense
    >>> plan = scl_defense.study("benchmarks/studies/smoke.toml", only=["none"], dry_run=True)
    >>> [cell["cell"] for cell in plan["cells"]]
    ['none--s0', 'none--s1']
    """
    say = on_event or (lambda event: None)
    spec = read_spec(recipe, size=size, seeds=seeds, overrides=overrides)
    cells = grid(spec, None if data_root is None else str(data_root))
    only = tuple(only)
    chosen = _chosen(spec, cells, only)
    usual = Path("studies") / "-".join(filter(None, (spec.file.stem, spec.size)))
    store = Store(out or usual)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    resources = executors.Resources(cpus=cpus, gpus=gpus, slurm=slurm or {}, ray_address=ray_address)
    executors.check(executor, resources)
    if tables_only:
        return _finish(spec, store, cells, store.read_results(), {})
    host = default_host(plugins)
    check_components(spec, chosen, host)
    threads = store.read_about().get("threads") or cpus
    if executor == "local":
        cores = _cores()
        if jobs is None:
            jobs = room(chosen, threads or 1)
        threads = threads or max(1, cores // jobs)
    else:
        jobs = len(chosen) if jobs is None else jobs
        threads = threads or 1
        cores = cpus or threads  # what a cell is given, on whatever node
    if dry_run:
        return _plan(store, chosen, host, jobs, threads)
    command = _command(spec, seeds, only, overrides, plugins)
    again = command + (f" --out {shlex.quote(str(store.out))}" if store.out != usual else "")
    settings = {"plugins": [str(path) for path in plugins], "threads": threads, "cores": cores}
    where = partial(executors.make, executor, resources, threads=threads, out=store.out)
    if executor != "local":
        again += f" --executor {executor}"
    return _run(spec, store, cells, chosen, settings, where=where, jobs=jobs, redo=redo, command=command, again=again,
                say=say)  # fmt: skip


def _run(
    spec: Spec,
    store: Store,
    cells: Sequence[Cell],
    chosen: Sequence[Cell],
    settings: Mapping[str, Any],
    *,
    where: Callable[[], executors.Executor],
    jobs: int,
    redo: bool,
    command: str,
    again: str,
    say: Event,
) -> StudyResult:
    from scl_defense.runtime import stop_on_signal
    from scl_defense_benchmarks.study.pool import run_cells

    failed: dict[str, str] = {}
    with store.locked():
        store.check(chosen, redo)
        store.write_about(
            {"title": spec.title, "command": command, "threads": settings["threads"], "machine": _machine(settings)}
        )
        left = [cell for cell in chosen if store.record(cell) is None]
        # Seed by seed: all methods can be compared after the first round.
        left.sort(key=lambda cell: spec.seeds.index(cell.seed))
        say({"event": "grid", "cells": len(chosen), "left": len(left), "jobs": jobs, "out": str(store.out)})

        def prepare(cell: Cell) -> Path:
            own = {"embed": cell.seed == spec.seeds[0], "device": cell.recipe["train"]["device"]}
            return store.prepare(cell, {**settings, **own})

        def on_done(cell: Cell, reason: str | None) -> str | None:
            if reason is None and store.record(cell) is None:
                reason = "it ended without a record"
            if reason is not None:
                failed[cell.id] = reason
                store.fail(cell, reason)
            store.write_results(cells)
            return reason

        lines = store.write_results(cells)
        work = [(cell, partial(prepare, cell)) for cell in left]
        with where() if work else nullcontext() as executor, stop_on_signal() as stop:
            if work:
                run_cells(work, executor=executor, jobs=jobs, stop=stop, on_done=on_done, on_event=say)
        lines = store.write_results(cells)
        if stop:
            raise Interrupted(
                f"stopped; {len(lines)} of {len(cells)} cells are done, what ran has saved; go on with: {again}",
                stop.signum or 15,
            )
        return _finish(spec, store, cells, lines, failed)


def _finish(
    spec: Spec, store: Store, cells: Sequence[Cell], lines: Sequence[Mapping[str, Any]], failed: Mapping[str, str]
) -> StudyResult:
    """Tables, figures and the summary, from the lines of the results file and the folders of the cells."""
    from scl_defense_benchmarks.study import figures, summary, tables

    there = {line["cell"] for line in lines}
    reasons = {cell.id: why for cell in cells if cell.id not in there and (why := store.failure(cell))} | dict(failed)
    missing = tuple(cell.id for cell in cells if cell.id not in there and cell.id not in reasons)
    about = tables.About(spec=spec, command=store.read_about().get("command", _command(spec)), lines=tuple(lines),
                         failed=reasons, missing=missing)  # fmt: skip
    rows = tables.make_rows(about, cells)
    files = tables.write(about, rows, store.out)
    drawn = figures.draw(about, rows, cells, store) if lines else []
    files += [*drawn, summary.write(about, rows, store.out)]
    return StudyResult(store.out, tuple(lines), reasons, missing, tuple(files), tuple(rows))


def _chosen(spec: Spec, cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    names = {cell.method for cell in cells} | {cell.arm for cell in cells}
    for name in only:
        if name not in names:
            methods = ", ".join(method.name for method in spec.methods)
            raise UserError(f"--only {name}: there is no such method{nearest(name, names)} (methods: {methods})")
    return [cell for cell in cells if not only or cell.method in only or cell.arm in only]


def _plan(store: Store, cells: Sequence[Cell], host: PluginHost, jobs: int, threads: int) -> dict[str, Any]:
    """The grid, and the time of training from measured steps: one measurement per distinct method, data and model."""
    import torch

    from scl_defense.config import train_config
    from scl_defense.errors import SclDefenseError
    from scl_defense.train import train

    seconds: dict[str, dict[str, Any]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        for cell in cells:
            recipe = {**cell.recipe["train"], "seed": 0}
            key = json.dumps(recipe, sort_keys=True)
            if key not in seconds:
                try:
                    config = train_config({**recipe, **cell.settings})
                    plan = train(config, host=host, dry_run=True)
                    seconds[key] = {"seconds": plan["estimated_seconds"], "fault": None}
                except SclDefenseError as error:
                    seconds[key] = {"seconds": None, "fault": str(error)}
            done = store.record(cell) is not None
            rows.append({"cell": cell.id, "label": cell.label, "done": done, "finetune": "finetune" in cell.recipe,
                         "changed": store.difference(cell), **seconds[key]})  # fmt: skip
    finally:
        torch.set_num_threads(before)
    left = [row["seconds"] or 0.0 for row in rows if not row["done"]]
    estimate = max([sum(left) / jobs, *left], default=0.0)
    return {"out": str(store.out), "jobs": jobs, "threads": threads, "cells": rows, "left": len(left),
            "training_seconds": sum(left), "estimated_seconds": estimate}  # fmt: skip


def room(cells: Sequence[Cell], threads: int) -> int:
    """How many cells may run side by side: one on a GPU, else what cores and memory allow."""
    devices = {cell.recipe["train"]["device"] for cell in cells}
    if devices - {"cpu"}:
        from scl_defense.runtime import select_device

        if any(select_device(device).type != "cpu" for device in devices):
            return 1
    jobs = _cores() // threads
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        jobs = min(jobs, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEMORY_A_CELL)
    return max(1, min(jobs, len(cells)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine(settings: Mapping[str, Any]) -> str:
    return f"{platform.machine()}, {settings['cores']} cores, {settings['threads']} threads a cell"


def _command(
    spec: Spec,
    seeds: Iterable[int] | None = None,
    only: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    plugins: Sequence[str | Path] = (),
) -> str:
    """The command that makes the same numbers; where it writes and how many cells run side by side changes none."""
    parts = ["scl-defense", "study", str(spec.file)]
    parts += ["--size", spec.size] if spec.size else []
    parts += ["--seeds", ",".join(str(seed) for seed in spec.seeds)] if seeds is not None else []
    parts += ["--only", ",".join(only)] if only else []
    for name, value in (overrides or {}).items():
        parts += ["--set", f"{name}={value}"]
    for path in plugins:
        parts += ["--plugin", str(path)]
    return shlex.join(parts)
