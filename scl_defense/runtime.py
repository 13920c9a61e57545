"""Device, precision, seeds, signals, and the other processes of a run: the only module that knows them."""

import contextlib
import hashlib
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from scl_defense.draws import RowsOf
from scl_defense.errors import PeerFailed, SclDefenseError, UserError
from scl_defense.launcher import launched


def select_device(name: str) -> torch.device:
    """``auto`` (CUDA, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``. Raises :class:`UserError`.

    Under ``torchrun`` each process of a machine takes a card of its own.
    """
    launch = launched()
    if launch is not None and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        if launch.local_world > torch.cuda.device_count():
            raise UserError(
                f"{launch.local_world} processes on this machine, but {torch.cuda.device_count()} CUDA devices found; "
                "give --nproc-per-node as many as there are, or try --device cpu"
            )
        return torch.device("cuda", launch.local)
    if launch is not None and name not in ("auto", "cpu"):
        raise UserError(f"device '{name}' is one device, for {launch.world} processes; write auto, cpu or cuda")
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


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Inside, the same seed gives the same numbers on CUDA too, bit by bit; on the CPU it does so anyway.

    Raises :class:`UserError` when something has no deterministic implementation. cuBLAS reads its setting when it is
    first used: a process that has computed on CUDA before must have had ``CUBLAS_WORKSPACE_CONFIG`` set.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "deterministic" not in text:
            raise
        raise UserError(f"--deterministic cannot be kept: {text[:200]}; leave it out, or use --device cpu") from None
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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


ECHO = 5.0  # seconds in which torchrun passes on to its processes a signal that the terminal gave them already

# What asks a run to stop: Ctrl-C, `kill`, and what a cluster's scheduler sends before its time is up.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """The first of these signals asks for a stop at the next safe point; a second one stops at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Handlers for :data:`STOPS` while inside (main thread only; elsewhere signals keep their meaning)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    first = 0.0

    def handle(signum: int, frame: Any) -> None:
        nonlocal first
        if request.signum is not None and (launched() is None or time.monotonic() - first > ECHO):
            raise KeyboardInterrupt
        if request.signum is None:
            request.signum, first = signum, time.monotonic()

    previous = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -- several processes

OK, NOT_FINITE, NO_MEMORY, FAILED = range(4)  # kinds of trouble, the graver the higher
PATIENCE = 60.0  # seconds that a process is waited for; SCL_DEFENSE_RANK_TIMEOUT is another number
LONG = 7 * 86400.0  # where processes may rightly be far apart: a download, an attack
HEARING = 15.0  # seconds in which another process is heard out before this one leaves
T = TypeVar("T")


class Ranks:
    """The processes of one run, which march in step; the default is the only one, and every method then does nothing.

    Before they exchange anything they meet (:meth:`most`), and a process in trouble goes to a meeting too, to say so
    (:meth:`trouble`): so nobody waits for one that has gone another way. rank: 0 ... ``world - 1``, 0 speaks and
    writes for all. backend: of the exchanges: nccl, gloo, or none.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, backend: str = "none"):
        self.rank, self.world, self.local, self.backend = rank, world, local, backend
        self.in_step = False
        self._group: Any = None  # gloo: for meetings, also where the data go by nccl
        self._patience = PATIENCE
        self._lost = False  # one of them has gone: there is nobody to meet any more

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def about(self) -> dict[str, Any]:
        return {"world": self.world, "backend": self.backend}

    # -- whose images

    def rows(self, total: int, rank: int | None = None) -> slice:
        """The rows of ``total`` that belong to a process (default: this one): equal shares, the first ones larger."""
        each, more = divmod(total, self.world)
        rank = self.rank if rank is None else rank
        start = rank * each + min(rank, more)
        return slice(start, start + each + (rank < more))

    def sizes(self, total: int) -> list[int]:
        return [self.rows(total, rank).stop - self.rows(total, rank).start for rank in range(self.world)]

    @contextmanager
    def lockstep(self, rows: slice, total: int, rng: torch.Generator) -> Iterator[None]:
        """Inside, ``rng`` gives this process its ``rows`` of what it would draw for all ``total`` images, and
        :func:`anywhere` asks all processes.
        """
        if self.world == 1:
            yield
            return
        self.in_step = True
        try:
            with RowsOf(rows.start, rows.stop, total, rng):
                yield
        finally:
            self.in_step = False

    # -- meetings

    def most(self, value: int = 0, *, patience: float | None = None) -> int:
        """The largest ``value`` of all processes. Raises :class:`PeerFailed` when one of them is in trouble."""
        if self.world == 1:
            return value
        code, most = self._meet(OK, value, patience)
        if code != OK:
            raise PeerFailed(code)
        return most

    def trouble(self, code: int) -> int:
        """Say that this process is in trouble; the gravest of what all say."""
        return code if self.world == 1 or self._lost else self._meet(code, 0, min(self._patience, PATIENCE))[0]

    def _meet(self, code: int, value: int, patience: float | None) -> tuple[int, int]:
        from torch import distributed as dist

        told = torch.tensor([code, value])
        self._done(dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group, async_op=True), patience)
        found = told.tolist()
        return found[0], found[1]

    def _done(self, work: Any, patience: float | None = None) -> None:
        with self._missing():
            work.wait(timedelta(seconds=self._patience if patience is None else patience))

    def _by(self, tensor: Tensor) -> Any:
        return self._group if tensor.device.type == "cpu" else None

    @contextmanager
    def _missing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise SclDefenseError(self._who_is_missing(" ".join(str(error).split())[:120])) from error

    def _who_is_missing(self, said: str) -> str:
        """Whom we waited for in vain: whoever is left writes his name down, and lets go of those who wait for him."""
        absent: list[int] = []
        self._lost = True
        with contextlib.suppress(Exception), stop_on_signal():  # torchrun ends those who are left: not before we know
            store = _store()
            store.set(f"here/{self.rank}", "")
            _tear_down()
            until = time.monotonic() + ECHO
            for rank in range(self.world):
                try:
                    store.wait([f"here/{rank}"], timedelta(seconds=max(until - time.monotonic(), 0.1)))
                except Exception:
                    absent.append(rank)
        who = f"process {', '.join(map(str, absent))}" if absent else "another process"
        why = "did not answer in time" if "timed out" in said.lower() else "has gone" if absent else f"has gone: {said}"
        return f"{who} of this run {why} (this is process {self.rank} of {self.world}); what was saved last is kept"

    # -- exchanges

    def from_first(self, make: Callable[[], T], *, patience: float | None = None) -> T:
        """What ``make`` gives in process 0, for all; the others do not call it."""
        if self.world == 1:
            return make()
        from torch import distributed as dist

        found = [make() if self.leads else None]
        self.most(patience=patience)
        with self._missing():
            dist.broadcast_object_list(found, 0, group=self._group)
        return found[0]  # type: ignore[return-value]

    def in_turn(self, make: Callable[[], T]) -> T:
        """Everybody's ``make``: process 0 first, then one a machine, then the rest, who find what the first fetched."""
        mine = 0 if self.leads else 1 if self.local == 0 else 2
        for turn in range(3 if self.world > 1 else 1):
            if turn == mine:
                found = make()
            self.most(patience=LONG)
        return found

    def everyones(self, value: T, *, patience: float | None = None) -> list[T]:
        """The ``value`` of every process, by rank."""
        if self.world == 1:
            return [value]
        from torch import distributed as dist

        self.most(patience=patience)
        found: list[Any] = [None] * self.world
        with self._missing():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            from torch import distributed as dist

            self.most()
            self._done(dist.all_reduce(values, group=self._by(values), async_op=True))
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean over processes, in place, in one exchange a data type."""
        if self.world == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            means = self.sum(torch.cat([tensor.reshape(-1) for tensor in alike])).div_(self.world)
            for tensor, mean in zip(alike, means.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def as_first(self, tensors: Sequence[Tensor]) -> None:
        """Everybody's tensors become those of process 0, in place."""
        if self.world > 1:
            from torch import distributed as dist

            self.most()
            for tensor in [tensor.detach() for tensor in tensors]:
                same = tensor.contiguous()
                self._done(dist.broadcast(same, 0, group=self._by(same), async_op=True))
                tensor.copy_(same)

    def gathered(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """(sum of sizes, ...) the rows of all processes, in their order, without a gradient; ``sizes``: how many each
        has.
        """
        if self.world == 1:
            return rows
        from torch import distributed as dist

        self.most()
        padded = _padded(rows.detach(), max(sizes))
        found = padded.new_empty((self.world * max(sizes), *rows.shape[1:]))
        self._done(dist.all_gather_into_tensor(found, padded, self._by(padded), async_op=True))
        if min(sizes) == max(sizes):
            return found
        return torch.cat([part[:size] for part, size in zip(found.split(max(sizes)), sizes, strict=True)])

    def scattered(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The sum over processes of ``rows`` (sum of sizes, ...), of which each gets its own (size, ...)."""
        if self.world == 1:
            return rows
        from torch import distributed as dist

        self.most()
        parts = [_padded(part, max(sizes)) for part in rows.split(list(sizes))]
        found = torch.empty_like(parts[0])
        self._done(dist.reduce_scatter_tensor(found, torch.cat(parts), group=self._by(found), async_op=True))
        return found[: sizes[self.rank]]


def _padded(rows: Tensor, size: int) -> Tensor:
    if len(rows) == size:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros((size - len(rows), *rows.shape[1:]))])


_alone = Ranks()
_joined: list[Ranks] = []


def ranks() -> Ranks:
    """The processes that this one runs with."""
    return _joined[-1] if _joined else _alone


def anywhere(flag: Any) -> bool:
    """Whether ``flag`` holds, in any process where they march in lockstep, else here."""
    if not _joined or not _joined[-1].in_step:
        return bool(flag)
    return bool(_joined[-1].most(int(bool(flag))))


@contextmanager
def joined(device: torch.device, *, patience: float = PATIENCE) -> Iterator[Ranks]:
    """Inside, the processes that ``torchrun`` has started are one (:func:`ranks`); without it there is this one alone.

    An exception in one of them ends all: it is raised there, and :class:`PeerFailed` elsewhere. A process that died
    or hangs is missed within ``patience`` seconds (the environment variable ``SCL_DEFENSE_RANK_TIMEOUT`` is stronger),
    one whose machine still answers at once: :class:`SclDefenseError`.
    """
    launch = launched()
    if launch is None or _joined:  # an inner call belongs to the outer one's processes
        yield ranks()
        return
    from torch import distributed as dist

    written = os.environ.get("SCL_DEFENSE_RANK_TIMEOUT", str(patience))
    if not written.replace(".", "", 1).isdigit() or float(written) <= 0:
        raise UserError(f"SCL_DEFENSE_RANK_TIMEOUT is {written!r}; it must be a number of seconds above 0")
    all_of_us = Ranks(launch.rank, launch.world, launch.local, "nccl" if device.type == "cuda" else "gloo")
    all_of_us._patience = float(written)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group(all_of_us.backend)
    all_of_us._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=LONG))
    global _met
    _met = True
    _joined.append(all_of_us)
    try:
        yield all_of_us
        all_of_us.most(patience=LONG)
    except PeerFailed:
        raise
    except BaseException:
        with contextlib.suppress(Exception):
            all_of_us.trouble(FAILED)
        raise
    finally:
        _joined.remove(all_of_us)
        if ours:
            _tear_down()


def _tear_down() -> None:
    from torch import distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


_met = False  # whether there ever was a store that process 0 may have taken with it


def _store() -> Any:
    """What the processes can read and write even when they are no longer on speaking terms: torchrun's own."""
    from torch import distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized():
        raise SclDefenseError("there is no store that outlives the processes")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    found = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=False, timeout=timedelta(seconds=ECHO)
    )
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"scl-defense/{again}", found)  # type: ignore[attr-defined]


@contextmanager
def one_speaker() -> Iterator[bool]:
    """Whether this process is the one to say why all of them end; the others wait until it has been said."""
    launch = launched()
    if launch is None:
        yield True
        return
    try:
        store = _store()
        mine = store.add("speaker", 1) == 1
    except Exception:
        yield launch.rank == 0 or _met
        return
    try:
        yield mine
    finally:
        with contextlib.suppress(Exception):
            if mine:
                store.set("said", "")
            else:
                store.wait(["said"], timedelta(seconds=HEARING))


def hear_out() -> None:
    """Wait until another process has said why all end: when the first one leaves, torchrun ends the others."""
    with contextlib.suppress(Exception):
        _store().wait(["said"], timedelta(seconds=HEARING))
