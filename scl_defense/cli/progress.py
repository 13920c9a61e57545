"""Progress on stderr: a bar on a terminal, one line an epoch elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from scl_defense.cli import common


class _Bar:
    """A bar while inside, on a terminal only; ``before`` and ``after`` are the texts around it."""

    before, after = "{task.description}", ""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._bar: Any = None  # rich is imported where there is something to draw
        self._task: Any = None
        self._console = common.console(stderr=True)

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            parts = (TextColumn(self.before), BarColumn(bar_width=None), TextColumn(self.after), TimeRemainingColumn())
            self._bar = Progress(*parts, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def working(text: str, *, quiet: bool = False) -> Iterator[None]:
    """While inside, on a terminal, what is being done and for how long: for what cannot tell how much is left."""
    console = common.console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(SpinnerColumn(), TextColumn(text), TimeElapsedColumn(), console=console, transient=True) as bar:
        bar.add_task(text, total=None)
        yield


class AttackProgress(_Bar):
    """Told of every chunk of a benchmark: one bar an attack with the time it needs yet, on a terminal.

    A total of 0: nobody knows how much there is to do.
    """

    after = "{task.fields[count]}"

    def __call__(self, label: str, done: int, total: int) -> None:
        if self._bar is None:
            return
        self._bar.speed_estimate_period = 1e9  # a chunk may take minutes: every one so far tells the speed
        count = f"{done}/{total} images" if total else ""
        if self._task is None or self._bar.tasks[-1].description != label:
            # What a resumed run finds is no speed.
            self._task = self._bar.add_task(label, total=total or None, completed=done, count=count)
        self._bar.update(self._task, completed=done, count=count)


class TrainProgress(_Bar):
    """Told of every step and epoch of a training run."""

    before = "epoch {task.fields[epoch]}"
    after = "loss {task.fields[loss]}  val {task.fields[val]}  {task.fields[rate]} img/s"
    _rate, _val = 0.0, "-"

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            self._step(event)
            return
        if event["event"] == "note":  # quiet or not: the run is no longer what was asked for
            self._console.print(f"note: {event['text']}", soft_wrap=True, markup=False)
            return
        self._val = f"{event['val_clean']:.1%} clean {event['val_robust']:.1%} robust"
        if not self._quiet:
            width = len(str(event["epochs"]))
            self._console.print(
                f"epoch {event['epoch'] + 1:>{width}}/{event['epochs']}  loss {event['loss']:.3f}  "
                f"val clean {event['val_clean']:.1%} robust {event['val_robust']:.1%}  {self._rate:.0f} img/s  "
                f"{common.duration(event['seconds'])}",
                soft_wrap=True,
            )

    def _step(self, event: Mapping[str, Any]) -> None:
        self._rate = event["images_per_s"] if not self._rate else 0.9 * self._rate + 0.1 * event["images_per_s"]
        if self._bar is None:
            return
        total, done = event["epochs"] * event["steps"], event["epoch"] * event["steps"] + event["step"]
        shown = {
            "epoch": f"{event['epoch'] + 1}/{event['epochs']}",
            "loss": f"{event['loss']:.3f}",
            "val": self._val,
            "rate": f"{self._rate:.0f}",
        }
        if self._task is None:
            self._task = self._bar.add_task("train", total=total, completed=done, **shown)
        else:
            self._bar.update(self._task, completed=done, **shown)
