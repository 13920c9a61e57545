"""Broken loggers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broken import Case
from scl_defense.types import component

KIND = "logger"


class Writer:
    def __init__(self, path: Path):
        self.path = path

    def log(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        pass


def kept_lines(path: Path, epoch: int, *, careful: bool = True) -> str:
    """The lines of epochs before ``epoch``. Not careful: a half-written line raises."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)["epoch"] < epoch:
                kept.append(line + "\n")
        except ValueError:
            if not careful:
                raise
    return "".join(kept)


@component
class Sound:
    """JSON lines."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Writer:
        path = run_dir / "log.jsonl"
        path.write_text(kept_lines(path, epoch))
        return Writer(path)


@component
class SoundSilent:
    """Writes nothing."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Any:
        class Silent:
            def log(self, record: Mapping[str, Any]) -> None: ...

            def close(self) -> None: ...

        return Silent()


@component
class NeedsFolder:
    """Writes into a folder that it forgot to make."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Writer:
        return Writer(run_dir / "logs" / "log.jsonl")


@component
class NoClose:
    """Opens something that cannot be closed."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Any:
        writer = Sound()(run_dir, config, epoch)

        class Endless:
            log = staticmethod(writer.log)

        return Endless()


class PoppingWriter(Writer):
    def log(self, record: Any) -> None:
        epoch = record.pop("epoch")
        super().log({"epoch": epoch, **record})


@component
class PopsEpoch:
    """Takes the epoch out of the record that the next logger gets."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Writer:
        return PoppingWriter(Sound()(run_dir, config, epoch).path)


@component
class EmptiesConfig:
    """Takes what it wants out of the configuration."""

    def __call__(self, run_dir: Path, config: Any, epoch: int) -> Writer:
        config.pop("data")
        return Sound()(run_dir, config, epoch)


@component
class AppendsForEver:
    """Epochs of an interrupted run stand there twice."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Writer:
        return Writer(run_dir / "log.jsonl")


@component
class StartsAnew:
    """Resuming wipes what was logged before."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Writer:
        (run_dir / "log.jsonl").write_text("")
        return Writer(run_dir / "log.jsonl")


@component
class TripsOverHalfALine:
    """After a kill in the middle of a write it cannot be opened."""

    def __call__(self, run_dir: Path, config: Mapping[str, Any], epoch: int) -> Writer:
        path = run_dir / "log.jsonl"
        path.write_text(kept_lines(path, epoch, careful=False))
        return Writer(path)


SOUND = [Sound, SoundSilent]
EVERYTHING = frozenset({"record-untouched", "drops-stale-records", "keeps-earlier-records", "opens-after-kill"})

CASES = [
    Case(KIND, NeedsFolder, "opens-logs-closes", "FileNotFoundError", also=EVERYTHING),
    Case(KIND, NoClose, "opens-logs-closes", "no method close()", also=EVERYTHING),
    Case(KIND, PopsEpoch, "record-untouched", "the record"),
    Case(KIND, EmptiesConfig, "record-untouched", "the configuration"),
    Case(KIND, AppendsForEver, "drops-stale-records", "old record of epoch 2"),
    Case(KIND, StartsAnew, "keeps-earlier-records", "epoch 0 is missing"),
    Case(KIND, TripsOverHalfALine, "opens-after-kill", "JSONDecodeError"),
]
