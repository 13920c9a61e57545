"""Timing rivals side by side: A B A B ..., medians and spread, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Clock = Callable[[], float]


class NotInstalled(Exception):
    """A peer that is not there: a row that says so, never a crash."""


@dataclass
class Timing:
    """seconds: a number a round. value: what the call returned first. status: ``ok``, or why there is none."""

    seconds: list[float] = field(default_factory=list)
    value: Any = None
    status: str = "ok"

    @property
    def ok(self) -> bool:
        return self.status == "ok" and bool(self.seconds)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.ok else None

    def row(self) -> dict[str, Any]:
        """As JSON types, under the names that every result file uses."""
        if not self.ok:
            return {"status": self.status}
        return {
            "status": "ok",
            "median": _short(self.median or 0.0),
            "best": _short(min(self.seconds)),
            "worst": _short(max(self.seconds)),
            "seconds": [_short(value) for value in self.seconds],
        }


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    until: float | None = None,
    warm: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time every call once a round, in turn, in the order given; every second round backwards.

    A call that raises is timed no more: :class:`NotInstalled` is the status ``not installed``, anything else ``failed``
    with its reason. until: on ``clock``; no round is begun after it, but the first is always finished. warm: each call
    is made once before, untimed.
    """
    found = {name: Timing() for name in calls}
    if warm:
        for name in calls:
            _made(name, calls[name], found[name])
    for number in range(repeats):
        if number and until is not None and clock() >= until:
            break
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            if found[name].status != "ok":
                continue
            started = clock()
            value = _made(name, calls[name], found[name])
            took = clock() - started
            if found[name].status == "ok":
                if not found[name].seconds:
                    found[name].value = value
                found[name].seconds.append(took)
    return found


def _made(name: str, call: Callable[[], Any], timing: Timing) -> Any:
    try:
        return call()
    except NotInstalled as reason:
        timing.status = f"not installed: {reason}" if str(reason) else "not installed"
    except Exception as error:  # a peer's fault is a row, and the others go on
        timing.status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def ratio(slow: Timing, fast: Timing) -> float | None:
    """How many times longer ``slow`` takes: the median over rounds of the ratio within a round."""
    if not (slow.ok and fast.ok):
        return None
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=False))


@dataclass
class Budget:
    """A time limit for a part, shared evenly among its groups; what one leaves over goes to the others.

    seconds: of the whole part. clock: where the time comes from.
    """

    seconds: float
    groups: int
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        self._end, self._left = self.clock() + self.seconds, self.groups

    def shares(self) -> Iterator[float]:
        """For group after group: the seconds it may take, counted from now."""
        while self._left:
            yield max(0.0, self._end - self.clock()) / self._left
            self._left -= 1


def images_for(seconds: float, per_image: float, *, least: int, most: int, step: int = 8) -> int:
    """How many images fit into ``seconds`` at ``per_image``: a multiple of ``step`` from ``least`` to ``most``."""
    fitting = int(seconds / max(per_image, 1e-9)) // step * step
    return max(least, min(most, fitting))


def _short(seconds: float) -> float:
    return float(f"{seconds:.5g}")
