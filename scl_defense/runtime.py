"""Device, precision, seeds and signals: the only module that knows them."""

import hashlib
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from scl_defense.errors import UserError


def select_device(name: str) -> torch.device:
    """``auto`` (CUDA, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``. Raises :class:`UserError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is unknown; write auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device '{name}' is not there: {torch.cuda.device_count()} CUDA devices found; try --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not there; try --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device '{name}' is not supported; write auto, cpu, cuda, cuda:1 or mps")
    return device


def autocast(device: torch.device, precision: str) -> Any:
    """A context for the network's forward passes: nothing for ``fp32``, bfloat16 autocast for ``bf16``."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def repeatable(precision: str) -> Iterator[None]:
    """Inside, float32 means float32 (``fp32``: no TF32 on CUDA) and cuDNN takes its deterministic algorithms."""
    cudnn: Any = torch.backends.cudnn
    convolutions, products = cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision, cudnn.deterministic, cudnn.benchmark
    if precision == "fp32":
        convolutions.fp32_precision = products.fp32_precision = "ieee"
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        convolutions.fp32_precision, products.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed from (seed, purpose, counters): streams that need no hidden state, so resuming is exact."""
    digest = hashlib.blake2b(repr((int(seed), purpose, tuple(map(int, counters)))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator of the stream (seed, purpose, counters): ``stream(0, "augment", epoch, step)``."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *counters))


def versions() -> dict[str, str]:
    """Versions that can change a number, for checkpoints and results."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["torch"] = str(torch.__version__)  # with the build: 2.15.0+cpu and +cu132 do not round alike
    for name in ("scl-defense", "torchvision", "numpy", "torchattacks", "adversarial-robustness-toolbox"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


class StopRequest:
    """The first SIGINT or SIGTERM asks for a stop at the next safe point; a second one stops at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Handlers for SIGINT and SIGTERM while inside (main thread only; elsewhere signals keep their meaning)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: Any) -> None:
        if request.signum is not None:
            raise KeyboardInterrupt
        request.signum = signum

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
