"""The run's folder, its lock, and the fan-out of training records to the loggers."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scl_defense.checkpoint import sweep
from scl_defense.errors import UserError
from scl_defense.recovery import BATCH_FILE
from scl_defense.types import Logger, LogWriter


def new_run_dir(out: str | Path, name: str | None, default: str) -> Path:
    """Make ``out/name``, refusing one that exists; without a name ``out/default``, numbered when taken."""
    base = Path(out)
    try:
        base.mkdir(parents=True, exist_ok=True)
        if name is not None:
            try:
                (base / name).mkdir()
            except FileExistsError:
                raise UserError(
                    f"run '{base / name}' exists; choose another --name, or go on with --resume {base / name}"
                ) from None
            return base / name
        for number in range(1, 100_000):
            path = base / (default if number == 1 else f"{default}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise UserError(f"cannot make a run in '{base}': {error.strerror}; choose another --out") from None
    raise UserError(f"'{base}' holds too many runs named '{default}'; choose a --name")


def missing_parents(out: str | Path) -> list[Path]:
    """``out`` and the folders above it that are not there yet, the innermost first."""
    return [folder for folder in (Path(out), *Path(out).parents) if not folder.exists()]


def remove_if_empty(run_dir: Path, above: Sequence[Path] = ()) -> None:
    """Take away the folder of a run that failed before its first checkpoint: it holds nothing to go on with.

    above: folders that were made for it, the innermost first; they go too where nothing else is in them.
    """
    if not any((run_dir / name).exists() for name in ("last.pt", "best.pt", BATCH_FILE)):
        shutil.rmtree(run_dir, ignore_errors=True)
        for parent in above:
            with contextlib.suppress(OSError):  # something else came into it
                parent.rmdir()


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """One process a run. Raises :class:`UserError` naming the holder when another one has it."""
    lock = FileLock(run_dir / ".lock")
    holder = run_dir / ".holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise UserError(f"run '{run_dir}' is in use by {who}; wait for it or stop it") from None
    except OSError as error:
        raise UserError(f"cannot write in '{run_dir}': {error.strerror}") from None
    try:
        sweep(run_dir)
        holder.write_text(
            f"process {os.getpid()} on {os.uname().nodename if hasattr(os, 'uname') else 'this machine'}\n"
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """One process a file that is written once. Raises :class:`UserError` when another one is making it."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is making '{path}'; wait for it or choose another --out") from None
    except OSError as error:
        raise UserError(f"cannot write beside '{path}': {error.strerror}; choose another --out") from None
    try:
        sweep(path.parent, path.name)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


class RunLog:
    """All opened loggers as one."""

    def __init__(self, loggers: Sequence[Logger], run_dir: Path, config: Mapping[str, Any], epoch: int):
        self._writers: list[LogWriter] = [logger(run_dir, config, epoch) for logger in loggers]

    def log(self, record: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.log(record)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
