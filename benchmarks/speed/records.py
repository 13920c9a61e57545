"""What a part has measured, as a file: the rows, and the machine, versions and threads that made them."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scl_defense.checkpoint import atomic_write_bytes
from scl_defense.errors import UserError
from scl_defense.runtime import versions

PEERS = ("foolbox", "adv-lib", "pyautoattack", "kornia", "lightly", "pytorch-metric-learning")
PARTS = ("attacks", "steps", "losses", "augment", "startup")


def machine() -> dict[str, Any]:
    """Processor, cores, threads, memory, load, and the accelerator where there is one."""
    about: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        about["accelerator"] = torch.cuda.get_device_name()
    return about


def peer_versions() -> dict[str, str]:
    """Of everything that is compared; ``not installed`` for the missing."""
    found = dict(versions())
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(folder: Path, part: str, rows: list[dict[str, Any]], settings: dict[str, Any], about: dict[str, Any]) -> Path:
    """``folder/part.json``, replaced as a whole. about: :func:`machine` as it was before the part ran."""
    content = {
        "part": part,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": about,
        "versions": peer_versions(),
        "settings": settings,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}.json"
    atomic_write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def to_renew(folder: Path, part: str) -> dict[str, Any] | None:
    """What ``folder/part.json`` holds, for some of it to be measured anew; ``None`` where there is no such file.

    Raises :class:`UserError` where processor, its features, threads or versions are not those of the file: ratios would
    stand beside others of another machine.
    """
    content, here = read_all(folder).get(part), machine()
    if content is None:
        return None
    alike = ("processor", "cores", "threads", "bf16", "amx")
    differ = [name for name in alike if content["machine"].get(name) != here[name]]
    differ += [name for name, one in peer_versions().items() if content["versions"].get(name) != one]
    if differ:
        raise UserError(f"'{folder / f'{part}.json'}' was measured with another {', '.join(differ)}; measure all of it")
    return content


def renew(folder: Path, content: dict[str, Any], rows: list[dict[str, Any]], again: dict[str, Any]) -> Path:
    """The file of ``content`` with these rows. again: what was measured anew, and under which load: it lists these."""
    path = folder / f"{content['part']}.json"
    renewed = content | {"rows": rows, "again": [*content.get("again", ()), again]}
    atomic_write_bytes(path, (json.dumps(renewed, indent=1) + "\n").encode())
    return path


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every part that lies in ``folder``, by name. Raises :class:`UserError` for a file that is none."""
    found = {}
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text())
            if content["part"] != part or not isinstance(content["rows"], list):
                raise ValueError("it holds another part")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"'{path}' is no result of this command ({error}); take it away or name another --out"
            ) from None
        found[part] = content
    return found


def available_memory() -> int:
    """Bytes that could be had now; 0 where nobody says."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
