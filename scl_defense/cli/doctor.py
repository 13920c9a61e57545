"""``scl-defense doctor``: what this machine can do, and what is wrong with the installation."""

import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from scl_defense.cli import common
from scl_defense.plugins import PluginHost

DISTRIBUTION = "scl-defense"
# Extra -> what it opens. Those of development are left out.
EXTRAS = {
    "tensorboard": "train --logger tensorboard",
    "scattering": "contrastive-pgd -g space=scattering",
    "frame": "results as pandas tables (to_frame)",
    "hub": "push and pull: the Hugging Face Hub",
    "timm": "networks of timm: benchmark --model timm:NAME",
    "onnx": "benchmark of .onnx files, export --format onnx",
    "slurm": "study --executor slurm",
    "ray": "study --executor ray",
    "speed": "the other libraries that benchmarks/speed compares with",
    "pyautoattack": "the official AutoAttack, to compare with",
    "docs": "building the documentation site",
}
OF_DEVELOPMENT = {"dev", "mutation"}


@dataclass(frozen=True)
class Finding:
    """severity: ``broken`` (the exit code is then 1) or ``note``. remedy: what to do about it."""

    severity: str
    what: str
    remedy: str


@click.command("doctor")
@common.plugin_option
@common.json_option
def command(plugins: tuple[str, ...], as_json: bool) -> None:
    """Say what this machine can do: versions, devices, data, plugins, and what is broken.

    \b
    scl-defense doctor
    scl-defense doctor --json
    """
    found = examined(common.host_for(plugins))
    if as_json:
        common.print_json(found)
    else:
        _show(found)
    if found["broken"]:
        raise click.exceptions.Exit(1)


def examined(host: PluginHost) -> dict[str, Any]:
    """Everything, as plain data. Nothing is downloaded, written or changed."""
    findings: list[Finding] = []
    torch = _imported("torch", findings)
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "versions": _versions(findings),
    }
    report["threads"] = _threads(torch, findings)
    report["devices"] = [] if torch is None else _devices(torch, findings)
    report["data"] = _data(host, findings) if torch is not None else None
    report["plugins"] = _plugins(host, findings, importable=torch is not None)
    report["extras"] = _extras()
    report["findings"] = [asdict(finding) for finding in findings]
    report["broken"] = sum(finding.severity == "broken" for finding in findings)
    return report


def _imported(name: str, findings: list[Finding]) -> Any:
    try:
        return __import__(name)
    except Exception as error:
        what = f"{name} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        findings.append(Finding("broken", what, f"install it again: pip install --force-reinstall {name}"))
        return None


# -- versions


def _versions(findings: list[Finding]) -> dict[str, str | None]:
    """Every dependency of ours with its installed version; one that is missing or not admitted is broken."""
    rows: dict[str, str | None] = {DISTRIBUTION: _version(DISTRIBUTION)}
    if rows[DISTRIBUTION] is None:
        findings.append(Finding("broken", "scl-defense runs from a bare source tree", "pip install -e . in its folder"))
        return rows
    for requirement in _requirements(DISTRIBUTION):
        installed = rows[requirement.name] = _version(requirement.name)
        if installed is None:
            findings.append(Finding("broken", f"{requirement.name} is missing", f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(installed, prereleases=True):
            what = f"{requirement.name} {installed} is not admitted (wanted: {requirement.specifier})"
            findings.append(Finding("broken", what, f"pip install '{requirement}'"))
    for name in [name for name, version in rows.items() if version is not None and name != DISTRIBUTION]:
        for theirs in _requirements(name):
            installed = _version(theirs.name)
            if installed is None or theirs.specifier.contains(installed, prereleases=True):
                continue
            # What pip check would say: an older release may have pinned what another package needs newer.
            what = f"{name} {rows[name]} asks for {theirs}, installed is {installed}"
            remedy = "usually works; pip may downgrade it when it installs something else: pip install -U " + name
            findings.append(Finding("note", what, remedy))
    return rows


def _requirements(distribution: str) -> Iterator[Any]:
    """What a distribution needs here, extras left out."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# -- threads and devices


def cores() -> float:
    """The CPUs that this process may use: its affinity, and a container's quota below it."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return min(allowed, *_quotas()) if _quotas() else allowed


def _quotas(root: Path = Path("/sys/fs/cgroup")) -> list[float]:
    try:  # cgroup v2: "200000 100000", or "max 100000"
        quota, period = (root / "cpu.max").read_text().split()
        return [] if quota == "max" else [int(quota) / int(period)]
    except (OSError, ValueError):
        pass
    try:  # cgroup v1
        quota_us, period_us = (int((root / "cpu" / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
        return [quota_us / period_us] if quota_us > 0 else []
    except (OSError, ValueError):
        return []


def _threads(torch: Any, findings: list[Finding]) -> dict[str, Any]:
    available, asked = cores(), os.environ.get("OMP_NUM_THREADS")
    used = None if torch is None else torch.get_num_threads()
    findings += thread_findings(available, asked, used)
    return {"cores": available, "OMP_NUM_THREADS": asked, "torch": used}


def thread_findings(available: float, asked: str | None, used: int | None) -> list[Finding]:
    """More threads than cores fight for them, at several times the cost; fewer leave cores idle."""
    best = max(1, math.floor(available))
    if asked is not None and not (asked.split(",")[0].isdigit() and int(asked.split(",")[0]) > 0):
        what = f"OMP_NUM_THREADS={asked!r} is no number of threads and is ignored"
        return [Finding("note", what, f"export OMP_NUM_THREADS={best}, or unset it")]
    if used is not None and used > max(1.0, available):
        what = f"torch uses {used} threads on {available:g} cores: they wait for each other"
        return [Finding("note", what, f"export OMP_NUM_THREADS={best}")]
    if used is not None and used < best and asked is not None:
        what = f"OMP_NUM_THREADS={asked}: torch uses {used} of {best} cores"
        return [Finding("note", what, "unset it, unless several runs share this machine")]
    return []


def _devices(torch: Any, findings: list[Finding]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"device": "cpu", "name": _cpu_name(), "memory_gib": _memory_gib()}]
    has_card = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            gib = round(card.total_memory / 2**30, 1)
            found.append({"device": f"cuda:{index}", "name": card.name, "memory_gib": gib})
    elif has_card and torch.version.cuda is None:
        what = f"there is an NVIDIA card, but torch {torch.__version__} is built for the CPU"
        findings.append(Finding("note", what, "install the CUDA build of torch: https://pytorch.org/get-started"))
    elif has_card:
        what = f"there is an NVIDIA card that torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use"
        findings.append(Finding("note", what, "a newer driver, or a build of torch for this driver's CUDA"))
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple", "memory_gib": None})
    for row in found:
        row["precision"] = {name: _trial(torch, row["device"], name, findings) for name in ("fp32", "bf16")}
    return found


def _trial(torch: Any, device: str, precision: str, findings: list[Finding]) -> dict[str, Any]:
    """A small convolution forwards and backwards: whether it works, and the milliseconds of one pass."""
    from scl_defense.runtime import autocast

    place = torch.device(device)
    try:
        rng = torch.Generator().manual_seed(0)
        images = torch.rand((32, 16, 32, 32), generator=rng).to(place).requires_grad_()
        weight = torch.rand((32, 16, 3, 3), generator=rng).to(place)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            with autocast(place, precision):
                out = torch.nn.functional.conv2d(images, weight)
            (gradient,) = torch.autograd.grad(out.float().square().sum(), images)
            finite = bool(gradient.isfinite().all())  # waits for the device, too
            times.append(time.perf_counter() - began)
        if not finite:
            raise ArithmeticError("the gradient is not finite")
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        severity = "broken" if precision == "fp32" else "note"
        remedy = "train with --device cpu" if precision == "fp32" else f"train with --precision fp32 on {device}"
        findings.append(Finding(severity, f"{precision} does not work on {device}: {text}", remedy))
        return {"works": False, "milliseconds": None}
    return {"works": True, "milliseconds": round(1000 * min(times[1:]), 2)}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


# -- data, plugins, extras


def _data(host: PluginHost, findings: list[Finding]) -> dict[str, Any]:
    """Which data sets can be loaded now. Only those are tried that cannot download: a doctor buys nothing."""
    import dataclasses

    from scl_defense.config import make
    from scl_defense.data import data_folder

    root = data_folder()
    rows = []
    for entry in host["dataset"]:
        row: dict[str, Any] = {"name": entry.name, "found": None, "detail": "not tried"}
        try:
            dataset = make(host, "dataset", entry.qualified)
            may_load = entry.owner.name == DISTRIBUTION
            if getattr(dataset, "download", None) is True:
                dataset, may_load = dataclasses.replace(dataset, download=False), True
            if may_load:
                arrays = dataset.load("test", root)
                row |= {"found": True, "detail": f"{len(arrays.labels)} test images, {len(arrays.classes)} classes"}
        except Exception as error:
            text = " ".join(str(error).split())
            needs_path = "is required" in text
            row |= {"found": None if needs_path else False, "detail": "takes a path of yours" if needs_path else text}
        rows.append(row)
    variable = os.environ.get("SCL_DEFENSE_DATA_ROOT")
    if variable and not root.is_dir():
        what = f"SCL_DEFENSE_DATA_ROOT={variable} is no folder"
        findings.append(Finding("note", what, "make it, or unset the variable (then: ~/.cache/scl-defense)"))
    return {"looked_in": str(root), "sets": rows}


def _plugins(host: PluginHost, findings: list[Finding], *, importable: bool) -> dict[str, Any]:
    aside = [{"plugin": q.plugin, "distribution": q.owner.name, "version": q.owner.version, "reason": q.reason}
             for q in host.quarantined]  # fmt: skip
    for row in aside:
        remedy = f"pip install -U {row['distribution']}, or SCL_DEFENSE_DISABLE_PLUGINS={row['plugin']}"
        findings.append(Finding("broken", f"plugin {row['plugin']} was set aside: {row['reason']}", remedy))
    off = os.environ.get("SCL_DEFENSE_DISABLE_PLUGINS", "")
    own = {name for name, owner in host.loaded.items() if owner.name == DISTRIBUTION}
    if not own and not off:
        what = "the components of scl-defense itself are not registered"
        findings.append(Finding("broken", what, "install it again: pip install -e . in its folder"))
    if off:
        findings.append(Finding("note", f"SCL_DEFENSE_DISABLE_PLUGINS={off}", "unset it to have them back"))
    broken = []
    for kind, registry in host.registries.items():
        for name, entries in registry.conflicts().items():
            owners = " and ".join(str(entry.owner) for entry in entries)
            remedy = " or ".join(entry.qualified for entry in entries)
            findings.append(Finding("note", f"{kind} '{name}' is registered by {owners}", f"write {remedy}"))
        for entry in registry if importable else ():
            try:
                entry.load()
            except Exception as error:
                broken.append(f"{kind} {entry.name}")
                remedy = f"pip install -U {entry.owner.name}"
                findings.append(Finding("broken", " ".join(str(error).split())[:300], remedy))
    count = sum(len(registry) for registry in host.registries.values())
    return {"loaded": host.provenance(), "set_aside": aside, "components": count, "not_importable": broken}


def _extras() -> list[dict[str, Any]]:
    from packaging.requirements import Requirement

    try:
        lines, names = metadata.requires(DISTRIBUTION) or [], metadata.metadata(DISTRIBUTION).get_all("Provides-Extra")
    except metadata.PackageNotFoundError:
        return []
    rows = []
    for extra in names or []:
        if extra in OF_DEVELOPMENT:
            continue
        needed = [r for r in map(Requirement, lines) if r.marker and r.marker.evaluate({"extra": extra})
                  and not r.marker.evaluate({"extra": ""})]  # fmt: skip
        missing = [r.name for r in needed if not (_version(r.name) and r.specifier.contains(str(_version(r.name))))]
        rows.append({"extra": extra, "for": EXTRAS.get(extra, ""), "missing": missing})
    return rows


# -- on the screen


def _show(found: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = common.console()

    def table(title: str, rows: list[tuple[str, str]]) -> None:
        grid = Table(box=None, show_header=False, padding=(0, 1, 0, 2), title=title, title_justify="left")
        grid.add_column(no_wrap=True, min_width=14)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(name), Text(value))
        console.print(grid)

    table("versions", [("python", found["python"]), *((n, v or "missing") for n, v in found["versions"].items())])
    table("devices", [(row["device"], _device_text(row)) for row in found["devices"]] + [_thread_row(found["threads"])])
    if found["data"] is not None:
        sets = [(row["name"], ("" if row["found"] else "-  " if row["found"] is None else "not here  ")
                 + (row["detail"] if row["found"] is not False else "")) for row in found["data"]["sets"]]  # fmt: skip
        table(f"data, looked for in {found['data']['looked_in']}", sets)
    owned = [(row["plugin"], f"{row['distribution']} {row['version']}") for row in found["plugins"]["loaded"]]
    table(f"plugins, {found['plugins']['components']} components", owned)
    table("extras", [(row["extra"], row["for"] + _missing(row["missing"])) for row in found["extras"]])
    table("found", [(f["severity"], f"{f['what']}. {f['remedy'][:1].upper()}{f['remedy'][1:]}")
                    for f in found["findings"]] or [("ok", "nothing")])  # fmt: skip
    console.print(_verdict(found["broken"]), markup=False)


def _missing(names: list[str]) -> str:
    return f"  (missing: {', '.join(names)})" if names else ""


def _device_text(row: Mapping[str, Any]) -> str:
    memory = "" if row["memory_gib"] is None else f", {row['memory_gib']:g} GiB"
    tried = [f"{name} {trial['milliseconds']:g} ms" if trial["works"] else f"no {name}"
             for name, trial in row["precision"].items()]  # fmt: skip
    return f"{row['name']}{memory}; {', '.join(tried)} a small pass"


def _thread_row(threads: Mapping[str, Any]) -> tuple[str, str]:
    return ("threads", f"torch uses {threads['torch']} on {threads['cores']:g} cores")


def _verdict(broken: int) -> str:
    if not broken:
        return "nothing is broken; next: scl-defense train --generator contrastive-pgd"
    return f"{broken} broken, see above"
