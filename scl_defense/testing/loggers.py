"""The contract of loggers: an interrupted run goes on in the same record."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from scl_defense.testing._common import COMPONENT_CHECKS, Check, CheckResult, applies_if, examine, expect

CONFIG = {"data": "digits", "epochs": 5, "eps": None, "logger": ["jsonl"], "trainer_options": {"temperature": 0.1}}
OLD, NEW = 7_000_000, 9_000_000  # marks that can be found in any text, however numbers are formatted


def check_logger(component: Any, name: str | None = None) -> list[CheckResult]:
    """Run the contract test on a logger: an instance, or a class (with its default options)."""
    return examine(component, name, LOGGER_CHECKS, Trials)


class Trials:
    """Runs of one logger, each in an empty folder."""

    def __init__(self, logger: Any, name: str):
        self.component, self.name = logger, name

    def open(self, run_dir: Path, first: int, last: int, mark: int) -> Any:
        """A writer that was opened for epoch ``first`` and told of the epochs up to ``last`` (without it)."""
        writer = self.component(run_dir, dict(CONFIG), first)
        for epoch in range(first, last):
            writer.log(record_of(epoch, mark))
        return writer

    def resumed(self, run_dir: Path) -> str:
        """Five epochs; then again from the third on. Returns the text that is left in the folder."""
        self.open(run_dir, 0, 5, OLD).close()
        applies_if(str(OLD) in text_of(run_dir))  # not a text: not to be read here
        self.open(run_dir, 2, 5, NEW).close()
        return text_of(run_dir)


def record_of(epoch: int, mark: int) -> dict[str, Any]:
    return {"epoch": epoch, "loss": 1.5 / (epoch + 1), "val_clean": 0.5, "val_robust": 0.25, "mark": mark + epoch}


def files_of(run_dir: Path) -> list[Path]:
    return sorted(path for path in run_dir.rglob("*") if path.is_file())


def text_of(run_dir: Path) -> str:
    return "\n".join(path.read_bytes().decode("utf-8", errors="replace") for path in files_of(run_dir))


def check_opens_logs_closes(trials: Trials) -> None:
    """It opens in an empty folder, takes a record an epoch (numbers by name), and closes."""
    with tempfile.TemporaryDirectory() as folder:
        writer = trials.component(Path(folder), dict(CONFIG), 0)
        for name in ("log", "close"):
            expect(callable(getattr(writer, name, None)), f"what it opens has no method {name}()")
        for epoch in range(3):
            writer.log(record_of(epoch, NEW))
        writer.close()


def check_record_untouched(trials: Trials) -> None:
    """The record is not written to: the next logger gets the same one."""
    with tempfile.TemporaryDirectory() as folder:
        record, config = record_of(0, NEW), dict(CONFIG)
        writer = trials.component(Path(folder), config, 0)
        writer.log(record)
        writer.close()
        expect(record == record_of(0, NEW), "it changed the record that it was given")
        expect(config == CONFIG, "it changed the configuration that it was given")


def check_drops_stale_records(trials: Trials) -> None:
    """Opened again at epoch k, it drops what an interrupted run wrote from epoch k on: no epoch stands there twice."""
    with tempfile.TemporaryDirectory() as folder:
        text = trials.resumed(Path(folder))
        stale = [epoch for epoch in range(2, 5) if str(OLD + epoch) in text]
        expect(not stale, f"opened again at epoch 2 it kept the old record of epoch {stale[0] if stale else ''}")


def check_keeps_earlier_records(trials: Trials) -> None:
    """Opened again at epoch k, it keeps the epochs before k and adds the new ones."""
    with tempfile.TemporaryDirectory() as folder:
        text = trials.resumed(Path(folder))
        for epoch in range(5):
            mark = OLD if epoch < 2 else NEW
            expect(str(mark + epoch) in text, f"opened again at epoch 2 the record of epoch {epoch} is missing")


def check_opens_after_kill(trials: Trials) -> None:
    """After a kill in the middle of a line it opens again and new records are whole."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        trials.resumed(run_dir)
        killed = trials.open(run_dir, 2, 5, OLD)
        try:
            for path in files_of(run_dir):
                path.write_bytes(path.read_bytes()[:-7])
            trials.open(run_dir, 2, 5, NEW).close()
            text = text_of(run_dir)
        finally:
            with suppress(Exception):
                killed.close()  # a kill leaves that to the system; here the folder is about to go
        expect(str(NEW + 4) in text, "after a kill in the middle of a line new records are lost")


LOGGER_CHECKS: tuple[Check, ...] = (
    *COMPONENT_CHECKS,
    check_opens_logs_closes,
    check_record_untouched,
    check_drops_stale_records,
    check_keeps_earlier_records,
    check_opens_after_kill,
)
