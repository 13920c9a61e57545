"""Memory: what a call needs at its peak, what is free, and how many images at a time that allows."""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARE = 0.5  # of the free memory that is used: the rest is for what a prediction cannot know


class _Tracked(TorchDispatchMode):
    """Inside, ``peak``: the most bytes that storages made here held together (CPU tensors, the backward pass too)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._hold(leaf.untyped_storage(), given)
        return made

    def _hold(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen or key in given:  # a view, or written in place
            return

        def gone(_: Any) -> None:
            self.held -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)


def peak_bytes(call: Callable[[], Any], device: torch.device | str) -> int:
    """The most memory that ``call()`` holds beyond what is there before it. CUDA: the allocator's own count; elsewhere
    every tensor that an operation returns, not what a kernel takes and gives back inside.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _Tracked() as tracked:
        call()
    peak: int = tracked.peak
    return peak


def free_bytes(device: torch.device | str) -> int | None:
    """What may still be taken: of the card; on a CPU of the machine, its control group and the process's own limits,
    whichever is least. ``None``: it cannot be told.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    bounds = [bound for bound in (_machine(), _group(), _limit()) if bound is not None]
    return max(0, min(bounds)) if bounds else None


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        pass
    try:  # no count of what is free: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _group() -> int | None:
    for most, used in (("memory.max", "memory.current"),
                       ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        try:
            root = Path("/sys/fs/cgroup")
            return int((root / most).read_text()) - int((root / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _limit() -> int | None:
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        return None if most == resource.RLIM_INFINITY else most - used
    except (ImportError, OSError, ValueError):
        return None


@dataclass(frozen=True)
class Choice:
    """How many images at a time, and what it rests on. fixed, per_image: bytes, the line through the probes; predicted:
    peak at ``images``; free: bytes (``None``: unknown); share: of it that may be used; probes: (images, bytes).
    """

    images: int
    fixed: int
    per_image: int
    predicted: int
    free: int | None
    share: float
    probes: tuple[tuple[int, int], ...]


def choose(
    measure: Callable[[int], int], free: int | None, most: int, *, side_by_side: int = 1, share: float = SHARE
) -> Choice:
    """The largest number of images, 1 to ``most``, whose predicted peak fits into ``share`` of ``free``.

    measure: images -> peak bytes of one call; it is asked at two small numbers, and memory is taken to grow in a
    straight line. side_by_side: so many calls at once.
    """
    sizes = sorted({min(2, most), min(8, most)})
    probes = tuple((size, measure(size)) for size in sizes)
    (low, first), (high, last) = probes[0], probes[-1]
    slope = (last - first) / (high - low) if high > low else last / high
    per_image, fixed = max(1, round(slope)), max(0, round(first - slope * low))
    images = most
    if free is not None:
        images = int((share * free / side_by_side - fixed) // per_image)
    images = max(1, min(most, images))
    return Choice(images, fixed, per_image, side_by_side * (fixed + per_image * images), free, share, probes)
