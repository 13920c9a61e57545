"""What an unfinished battery has found so far, beside its result: one line a chunk: a kill costs what is in work."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from scl_defense.errors import UserError
from scl_defense.logs import say_who, who_holds
from scl_defense_benchmarks.battery import PlannedAttack

FORMAT = "scl-defense-battery-state/1"
_BELONGS = {"model": "model", "data": "data", "battery": "battery", "seed": "seed", "mode": "mode",
            "precision": "precision", "versions": "version of a library"}  # fmt: skip


class State:
    """Records by (attack, chunk). A line that was cut off by a kill is no record; it is made again."""

    def __init__(self, path: Path | None, records: Mapping[tuple[int, int], dict[str, Any]]):
        self.path, self._records = path, dict(records)
        self.fresh = not self._records  # nothing to go on with
        self.with_examples = all(record.get("saved") for record in self._records.values())

    def get(self, attack: int, chunk: int) -> dict[str, Any] | None:
        return self._records.get((attack, chunk))

    def put(self, attack: int, chunk: int, record: dict[str, Any]) -> None:
        """Keep a record; when this returns, it survives a kill. Raises :class:`UserError` when the disk says no."""
        self._records[attack, chunk] = record
        if self.path is None:
            return
        line = json.dumps({"attack": attack, "chunk": chunk, **record}, separators=(",", ":"), allow_nan=False) + "\n"
        try:
            with open(self.path, "ab") as stream:
                stream.write(line.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise UserError(f"cannot write '{self.path}': {error.strerror}; free some space and go on") from None


def state_path(out: str | Path) -> Path:
    """Where the state of the battery with this result lies."""
    return Path(out).with_name(Path(out).name + ".state")


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """One process a result. Raises :class:`UserError` when another one writes it."""
    lock, holder = FileLock(str(path) + ".lock"), Path(path).with_name(f".{Path(path).name}.holder")
    try:
        # The lock itself tells no folder that cannot be written from one that somebody else is writing.
        os.close(os.open(lock.lock_file, os.O_RDWR | os.O_CREAT, 0o666))
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{who_holds(holder)} is writing '{path}'; wait for it or choose another --out") from None
    except OSError as error:
        raise UserError(f"cannot write beside '{path}': {error.strerror}; choose another --out") from None
    from scl_defense.checkpoint import sweep

    try:
        sweep(Path(path).parent, Path(path).name)
        say_who(holder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def open_state(path: Path | None, identity: Mapping[str, Any], *, restart: bool = False) -> State:
    """The state in ``path``, or a fresh one there; ``None``: kept in memory alone. restart: throw an old one away.

    A complete battery's state is taken away by whoever has written its result.

    Raises :class:`UserError` when it belongs to another question (model, data, battery, seed, mode, precision,
    versions) or cannot be read.
    """
    from scl_defense.checkpoint import atomic_write_bytes

    if path is None:
        return State(None, {})
    if path.exists() and not restart:
        return State(path, _read(path, identity))
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "identity": dict(identity)}
    atomic_write_bytes(path, (json.dumps(header, separators=(",", ":")) + "\n").encode())
    return State(path, {})


def _read(path: Path, identity: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    damaged = UserError(f"'{path}' is no readable state of a benchmark; throw it away with --restart")
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        header, *lines = [json.loads(line) for line in whole.splitlines()]
        found = header["identity"] if header["format"] == FORMAT else None
        records = {(line.pop("attack"), line.pop("chunk")): line for line in lines}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None
    if not isinstance(found, dict):
        raise damaged
    other = [text for name, text in _BELONGS.items() if found.get(name) != json.loads(json.dumps(identity.get(name)))]
    if other:
        raise UserError(
            f"'{path}' holds an unfinished benchmark with another {' and another '.join(other)}; finish that one, "
            "choose another --out, or throw it away with --restart"
        )
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return records


def identity_of(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: tuple[PlannedAttack, ...],
    *,
    seed: int,
    mode: str,
    precision: str = "fp32",
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a state belongs to. about: what else tells this model from others (the sha256 of its file)."""
    from scl_defense.runtime import versions

    battery = [
        [one.label, one.name, type(one.attack).__qualname__, repr(sorted(one.options.items())), str(one.threat),
         getattr(one, "restarts", 1)]
        for one in attacks
    ]  # fmt: skip
    return {
        "model": _sha256([repr(network), repr(sorted((about or {}).items())), *sorted(network.state_dict().items())]),
        "data": _sha256([images, labels]),
        "battery": _sha256([json.dumps(battery)]),
        "seed": seed,
        "mode": mode,
        "precision": precision,
        "versions": versions(),
    }


def _sha256(parts: list[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for item in part if isinstance(part, tuple) else (part,):
            if isinstance(item, Tensor):
                digest.update(repr((str(item.dtype), tuple(item.shape))).encode())
                plain = item.detach().cpu().contiguous().reshape(-1)
                digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
            else:
                digest.update(repr(item).encode())
    return digest.hexdigest()
