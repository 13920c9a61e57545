"""``scl-defense study``: names the benchmark layer, never knows it; draws the one screen of a running study."""

import time
import tomllib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import click

from scl_defense.cli import common
from scl_defense.errors import UserError


@click.command("study")
@click.argument("recipe", metavar="FILE.toml")
@click.option("--size", metavar="NAME", help="One of the recipe's sizes; default: its default_size.")
@click.option("--out", metavar="DIR", help="Folder of the study; default: studies/<file>[-size].")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cells side by side; default: what cores and memory allow, one on a GPU; all on a cluster.",
)
@click.option("--executor", metavar="NAME", default="local", show_default=True,
              help="Where cells run: local, slurm or ray; for these two --out must be a shared folder.")  # fmt: skip
@click.option("--cpus", type=click.IntRange(min=1), metavar="N", help="CPUs, and threads, of a cell.")
@click.option("--gpus", type=click.FloatRange(min=0), metavar="N", help="GPUs of a cell (slurm, ray).")
@click.option("--slurm", "slurm", multiple=True, metavar="NAME=VALUE",
              help="Option of sbatch, repeatable: partition=gpu, time=4:00:00, mem=16G, account=me.")  # fmt: skip
@click.option("--ray-address", metavar="HOST:PORT", help="Head of the Ray cluster; default: the one found here.")
@click.option("--seeds", metavar="LIST", help="Seeds instead of the recipe's, like 0,1,2.")
@click.option("--only", metavar="LIST", help="Run these methods alone; tables show whatever is there.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="Training option of [base], repeatable: epochs=3, generator_options.steps=5.")  # fmt: skip
@click.option("--data-root", metavar="DIR", help="Folder where data sets lie or are downloaded to.")
@click.option("--dry-run", is_flag=True, help="Print the grid and an estimate from measured steps, write nothing.")
@click.option("--redo", is_flag=True, help="Cells whose recipe changed are made again; the old ones are moved aside.")
@click.option("--tables-only", is_flag=True, help="Tables, figures and summary again, from results.jsonl.")
@common.report_option
@common.plugin_option
@common.json_option
@common.quiet_option
def command(
    recipe: str,
    seeds: str | None,
    only: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    plugins: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    report: bool | None,
    slurm: tuple[str, ...],
    **rest: Any,
) -> None:
    """Train and attack a grid of methods and seeds; finished cells are not done again.

    \b
    scl-defense study benchmarks/studies/smoke.toml
    scl-defense study benchmarks/studies/q1-generators.toml --size digits --jobs 2
    scl-defense study benchmarks/studies/q2-methods.toml --size mnist --dry-run
    scl-defense study q1.toml --executor slurm --cpus 4 --gpus 1 --slurm partition=gpu
    """
    from scl_defense import study

    with Screen(quiet=quiet or as_json or dry_run) as screen:
        result = study(
            recipe,
            seeds=None if seeds is None else _integers(seeds),
            only=_names(only),
            overrides=_settings(settings),
            slurm=common.key_values(slurm, "--slurm"),
            plugins=plugins,
            dry_run=dry_run,
            on_event=screen,
            **rest,
        )
    if dry_run:
        _show_plan(result, as_json)
        return
    page = None
    if report or (report is None and not quiet and not as_json):
        page = common.write_page(result.out)
    if as_json:
        common.print_json(result.to_json())
    else:
        _show(result)
        if page is not None:
            click.echo(f"report: {page} (opens in any browser)")
    if result.failed:
        raise click.exceptions.Exit(1)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r} must be integers joined by commas, like 0,1,2") from None


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Values as the recipe would hold them: ``5`` is a number there, ``random-conv`` a text."""
    return {name: _value(text) for name, text in common.key_values(pairs, "--set").items()}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _show_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        common.print_json(plan)
        return
    width = max(len(row["cell"]) for row in plan["cells"])
    for row in plan["cells"]:
        if row["done"]:
            about = "done"
        elif row["fault"] is not None:
            about = f"would fail: {row['fault']}"
        else:
            about = f"training about {common.duration(row['seconds'])}" + (
                ", then fine-tuning" if row["finetune"] else ""
            )
        if row["changed"] is not None:
            about += f"; recipe changed: {row['changed']}"
        click.echo(f"{row['cell']:<{width}}  {about}")
    click.echo(
        f"{plan['left']} of {len(plan['cells'])} cells to do in {plan['out']}, {plan['jobs']} side by side with "
        f"{plan['threads']} threads each: about {common.duration(plan['estimated_seconds'])} of training, "
        "without validation, fine-tuning and attacks"
    )
    click.echo("nothing was written (--dry-run)")


def _show(result: Any) -> None:
    """A short table on the screen; everything else is in the files."""
    click.echo(result.table(common.console().width), nl=False)
    click.echo(f"results: {result.out / 'table.md'}, {result.out / 'summary.md'}, {result.out / 'figures'}")


class Screen:
    """Told of everything that happens in a study: one live view on a terminal, a line a finished cell elsewhere."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._live: Any = None  # rich is imported where there is something to draw
        self._console = common.console(stderr=True)
        self._running: dict[str, dict[str, Any]] = {}
        self._cells = self._before = self._left = self._done = self._failed = self._jobs = 0
        self._spent: list[float] = []
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind, cell = event["event"], event.get("cell", "")
        if kind == "grid":
            self._begin(event)
        elif kind == "start":
            self._running[cell] = {"since": time.monotonic(), "said": {}}
        elif kind == "progress" and cell in self._running:
            one = self._running[cell]
            before, now = phase_of(one), event.get("phase")
            if "queued" in (before, now) and before != now:
                one["since"] = time.monotonic()  # waiting is not working
                if before is not None and now == "queued":
                    self._say(f"requeued {cell}: {event['why']}; it will go on from what it saved")
            one["said"] = event
        elif kind == "lost":
            self._running.pop(cell, None)
            self._say(f"lost    {cell}: {event['reason']}; try {event['tried'] + 1} of {event['tries']} follows")
        elif kind in ("done", "failed"):
            self._running.pop(cell, None)
            self._ended(event)
        if self._live is not None:
            self._live.update(self._view())

    def _begin(self, event: Mapping[str, Any]) -> None:
        self._cells, self._left, self._jobs = event["cells"], event["left"], event["jobs"]
        self._before = event["cells"] - event["left"]
        self._say(f"{self._cells} cells in {event['out']}: {self._before} done before, {self._left} to do, "
                  f"{self._jobs} side by side")  # fmt: skip
        if not self._quiet and self._console.is_terminal and self._left:
            from rich.live import Live

            self._live = Live(console=self._console, transient=True, refresh_per_second=4)
            self._live.start()

    def _ended(self, event: Mapping[str, Any]) -> None:
        self._left -= 1
        if event["event"] == "done":
            self._done += 1
            self._spent.append(event["seconds"])
            text = f"done    {event['cell']}  {common.duration(event['seconds'])}"
        else:
            self._failed += 1
            text = f"FAILED  {event['cell']}: {event['reason']} (log: {event['log']})"
        rest = self._time_left()
        self._say(f"{text}  [{self._before + self._done} done, {self._failed} failed, {self._left} left{rest}]")

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, soft_wrap=True, markup=False)

    def _time_left(self) -> str:
        if not self._spent or not self._left:
            return ""
        mean = sum(self._spent) / len(self._spent)
        working = [one for one in self._running.values() if phase_of(one) != "queued"]
        rest = self._left * mean - sum(time.monotonic() - one["since"] for one in working)
        # What a cluster does at the same time is not jobs, but what it has begun.
        together = min(self._jobs, self._left) if len(working) == len(self._running) else len(working)
        return f", about {common.duration(max(rest, 0.0) / max(1, together))} more"

    def _view(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        waiting = self._left - len(self._running)
        queued = sum(phase_of(one) == "queued" for one in self._running.values())
        running = f"{len(self._running) - queued} running" + (f", {queued} in the cluster's queue" if queued else "")
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left",
                      title=f"{self._before + self._done} of {self._cells} cells done, {self._failed} failed, "
                            f"{running}, {waiting} waiting{self._time_left()}")  # fmt: skip
        table.add_column("running", overflow="fold")
        table.add_column("at", overflow="fold")
        table.add_column("since", justify="right", no_wrap=True)
        for cell, one in self._running.items():
            table.add_row(cell, phase_text(one["said"]), common.duration(time.monotonic() - one["since"]))
        return table


def phase_of(one: Mapping[str, Any]) -> str | None:
    phase: str | None = one["said"].get("phase")
    return phase


def phase_text(said: Mapping[str, Any]) -> str:
    """What a cell last said of itself, in a few words."""
    phase = said.get("phase")
    if phase is None:
        return "starting"
    if phase == "queued":
        return f"queued, {said['why']}"
    if phase == "attack":
        if "attack" not in said:
            return f"{said['battery']}: planning"
        return f"{said['battery']}: {said['attack']}  {said['done']}/{said['total']} images"
    if "epoch" in said:
        loss = f"  loss {said['loss']:.3f}" if "loss" in said else ""
        robust = f"  val robust {said['val_robust']:.1%}" if "val_robust" in said else ""
        return f"{phase}: epoch {said['epoch'] + 1}/{said['epochs']}{loss}{robust}"
    return str(phase)
