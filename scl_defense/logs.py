"""The run's folder, its lock, and the fan-out of training records to the loggers."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scl_defense.checkpoint import sweep
from scl_defense.errors import UserError, printable
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
        raise UserError(f"run '{run_dir}' is in use by {who_holds(holder)}; wait for it or stop it") from None
    except OSError as error:
        raise UserError(f"cannot write in '{run_dir}': {error.strerror}") from None
    try:
        sweep(run_dir)
        say_who(holder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def say_who(holder: Path) -> None:
    """Write down who we are, for :func:`who_holds`."""
    machine = os.uname().nodename if hasattr(os, "uname") else "this machine"
    with contextlib.suppress(OSError):  # the lock is what counts
        holder.write_text(f"process {os.getpid()} on {machine}\n")


def who_holds(holder: Path) -> str:
    try:
        return printable(holder.read_text(errors="replace").strip()[:200]) or "another process"
    except OSError:
        return "another process"


@contextlib.contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """One process a file that is written once. Raises :class:`UserError` when another one is making it."""
    lock, holder = FileLock(path.with_name(f".{path.name}.lock")), path.with_name(f".{path.name}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{who_holds(holder)} is making '{path}'; wait for it or choose another --out") from None
    except OSError as error:
        raise UserError(f"cannot write beside '{path}': {error.strerror}; choose another --out") from None
    try:
        sweep(path.parent, path.name)
        say_who(holder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


class RunLog:
    """All opened loggers as one."""

    def __init__(self, loggers: Sequence[Logger], run_dir: Path, config: Mapping[str, Any], epoch: int):
        self._run_dir = run_dir
        with self._disk():
            self._writers: list[LogWriter] = [logger(run_dir, config, epoch) for logger in loggers]

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"cannot write the records of run '{self._run_dir}': {error.strerror or error}"
            raise UserError(f"{text}; its last checkpoint is kept: free some space and go on with --resume") from None

    def log(self, record: Mapping[str, Any]) -> None:
        for writer in self._writers:
            with self._disk():
                writer.log(record)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
