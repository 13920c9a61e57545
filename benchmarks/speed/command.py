"""The command behind ``python benchmarks/speed/run.py``."""

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from scl_defense.errors import UserError
from speed import attacks, augmentation, bars, losses, page, records, startup, steps

ROOT = Path(__file__).resolve().parents[2]
OUT, PAGE = ROOT / "benchmarks" / "results" / "speed", ROOT / "docs" / "speed.md"
PRECISION = ROOT / "benchmarks" / "results" / "precision" / "precision.json"
#: Of the minutes given, what each part takes; training the networks comes on top, once.
_SHARES = {"attacks": 0.6, "steps": 0.18, "losses": 0.1, "augment": 0.06, "startup": 0.06}

Say, Keep = Callable[[str], None], Callable[[list[dict[str, Any]]], None]
Measure = Callable[[Say, Keep], list[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        return _run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/speed/run.py",
        description="Every comparison of speed, side by side with the peers that are installed: "
        'pip install "scl-defense[speed]".',
    )
    parser.add_argument("--only", default=",".join(records.PARTS), help="parts, separated by commas; default: all")
    anew = 'comparisons of attacks to be measured anew, "CASE: TASK", a CASE or a TASK, separated by commas'
    parser.add_argument("--again", help=f"{anew}; all others stay in the file")
    parser.add_argument("--quick", action="store_true", help="a look in 2 or 3 minutes: fewer networks, sizes, images")
    parser.add_argument("--minutes", type=float, help="time to be spent; default: 60, or 2.5 with --quick")
    parser.add_argument("--repeats", type=int, help="rounds at most; default: what each part needs")
    parser.add_argument("--threads", type=int, help="torch's threads and our workers; default: torch's own")
    parser.add_argument(
        "--out", help="folder of the results; default: benchmarks/results/speed, quick: runs/speed-quick"
    )
    parser.add_argument("--page", help="page whose tables are rewritten; default: docs/speed.md, quick: none")
    parser.add_argument("--work", default="runs/speed", help="folder where the trained networks are kept")
    data = "folder of MNIST and cifar10-jpeg75; default: SCL_DEFENSE_DATA_ROOT, without it the digits"
    parser.add_argument("--data-root", default=os.environ.get("SCL_DEFENSE_DATA_ROOT"), help=data)
    parser.add_argument(
        "--bars", action="store_true", help="measure nothing: judge what lies in --out, rewrite the page"
    )
    return parser


def _run(given: argparse.Namespace) -> int:
    parts = [part.strip() for part in given.only.split(",") if part.strip()]
    for part in parts:
        if part not in records.PARTS:
            raise UserError(f"part '{part}' is unknown; it must be one of {', '.join(records.PARTS)}")
    minutes = given.minutes if given.minutes is not None else 2.5 if given.quick else 60.0
    if not minutes > 0:
        raise UserError(f"minutes {minutes:g} must be above 0")
    for name in ("repeats", "threads"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    again = None if given.again is None else _comparisons(given.again)
    if again is not None and "attacks" not in parts:
        raise UserError("--again is about the attacks; leave out --only, or --again")
    parts = parts if again is None else ["attacks"]
    if given.threads:
        torch.set_num_threads(given.threads)
    out = Path(given.out) if given.out else Path("runs/speed-quick") if given.quick else OUT
    shown = Path(given.page) if given.page else None if given.quick or given.out else PAGE
    if shown is not None and not shown.is_file():
        raise UserError(f"page '{shown}' does not exist; give the page that has the markers")
    warnings.filterwarnings("ignore")  # the libraries' own, at import and in every call
    if not given.bars:
        whole = sum(_SHARES[part] for part in parts)
        for part in parts:
            _measure(part, given, minutes, _SHARES[part] / whole, out, again)
    results = records.read_all(out)
    if not results:
        raise UserError(f"there is no result in '{out}'; measure something first")
    if shown is not None:
        page.rewrite(shown, results, PRECISION)
    for one in bars.verdicts({part: content["rows"] for part, content in results.items()}):
        print(one.line())
    return 0


def _comparisons(text: str) -> dict[str, tuple[str, ...]]:
    """``small-cnn robust: curve-8, cw`` -> {case: tasks}; a task alone is meant on every network that has it."""
    wanted = [one.strip() for one in text.split(",") if one.strip()]
    plan: dict[str, tuple[str, ...]] = {}
    for one in wanted:
        case, _, task = (part.strip() for part in one.rpartition(":")) if ":" in one else ("", "", one)
        case, task = (task, "") if task in attacks.PLAN else (case, task)
        found = {
            name: tuple(each for each in tasks if task in ("", each))
            for name, tasks in attacks.PLAN.items()
            if case in ("", name)
        }
        if not any(found.values()):
            raise UserError(
                f"'{one}' is no comparison; networks: {', '.join(attacks.PLAN)}; tasks: {', '.join(attacks.TASKS)}"
            )
        for name, tasks in found.items():
            plan[name] = tuple(dict.fromkeys((*plan.get(name, ()), *tasks)))
    if not wanted:
        raise UserError("--again names no comparison; leave it out to measure all")
    return {name: tasks for name, tasks in plan.items() if tasks}


def _measure(
    part: str,
    given: argparse.Namespace,
    minutes: float,
    share: float,
    out: Path,
    again: dict[str, tuple[str, ...]] | None = None,
) -> None:
    """Measure a part, and write it after every step: a part that was stopped says so. again: some of it, anew."""
    measure, settings = prepared(part, given, 60 * minutes * share, again)
    about, started = records.machine(), perf_counter()
    before = records.to_renew(out, part) if again else None
    began = datetime.now(UTC).isoformat(timespec="seconds")

    def say(text: str) -> None:
        print(f"[{perf_counter() - started:5.0f} s] {text}", flush=True)

    def keep(rows: list[dict[str, Any]], **how: Any) -> None:
        ran = {"quick": given.quick, "minutes": minutes, "took": round(perf_counter() - started, 1), **how}
        if before is None:
            records.write(out, part, rows, settings | ran, about)
            return
        done = sorted({f"{row['case']}: {row['task']}" for row in rows if row["kind"] == "attack"})
        anew = {"started": began, "comparisons": done, "load_before": about["load_before"], **ran}
        records.renew(out, before, attacks.merged(before["rows"], rows), anew)

    keep(measure(say, lambda rows: keep(rows, stopped=True)))


def prepared(
    part: str, given: argparse.Namespace, seconds: float, plan: dict[str, tuple[str, ...]] | None = None
) -> tuple[Measure, dict[str, Any]]:
    """What measures a part, and its settings as JSON types."""
    root, repeats = given.data_root, {} if given.repeats is None else {"repeats": given.repeats}
    options: Any
    if part == "attacks":
        quick = {"plan": attacks.QUICK, "repeats": 2, "most": 128} if given.quick else {}
        quick |= {} if plan is None else {"plan": plan}
        options = attacks.Options(work=Path(given.work), root=root, seconds=seconds, **{**quick, **repeats})
        settings = {"repeats": options.repeats, "most": options.most, "seconds": round(seconds)}
        return lambda say, keep: attacks.measure(options, say, keep), settings
    if part == "steps":
        quick = {"worlds": steps.WORLDS[:1], "repeats": 3} if given.quick else {}
        options = steps.Options(root=root, seconds=seconds, **{**quick, **repeats})
        settings = {"worlds": [dataclasses.asdict(world) for world in options.worlds], "repeats": options.repeats}
        return lambda say, keep: steps.measure(options, say), settings
    if part == "losses":
        quick = {"rows": (512, 2048, 4096), "repeats": 3} if given.quick else {}
        options = losses.Options(seconds=seconds, **{**quick, **repeats})
        return lambda say, keep: losses.measure(options, say), dataclasses.asdict(options)
    if part == "augment":
        quick = {"images": 512, "repeats": 2, "loaders": (0,)} if given.quick else {}
        options = augmentation.Options(root=root, seconds=seconds, **{**quick, **repeats})
        settings = {"images": options.images, "batch": options.batch, "repeats": options.repeats}
        return lambda say, keep: augmentation.measure(options, say), settings
    quick = {"images": 1000, "width": 16, "repeats": 2} if given.quick else {}
    quick |= {"commands": tuple(startup.COMMANDS)[:5]} if given.quick else {}
    options = startup.Options(seconds=seconds, **{**quick, **repeats})
    return lambda say, keep: startup.measure(options, say), {"images": options.images, "repeats": options.repeats}
