"""The one guard around every call into an attack library.

What the libraries do without it (each one is shown by a test): torchattacks switches frozen batch-norm layers back to
training and leaves the mode changed after an exception; ART leaves the whole network in eval mode and drops ``.grad``
of its parameters; both draw from the global random state; importing ART closes every logging handler of the process,
after which a ``FileHandler(mode="w")`` never writes again. Importing ART also creates the folder ``~/.art``; there is
no switch against that.
"""

import io
import logging
import logging.config
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn

from scl_defense.draws import OwnDraws
from scl_defense.guard import frozen, global_random_state

_here = threading.local()


@contextmanager
def library_call(*modules: nn.Module, rng: torch.Generator) -> Iterator[None]:
    """Everything that a library may touch, lent and taken back, also after an exception.

    Inside: ``modules`` are in eval mode with frozen parameters, gradients are recorded, the global generators of
    torch, NumPy and Python are seeded from one draw of ``rng``, and what is printed goes nowhere. After: train/eval
    flag of every module, buffers, ``requires_grad`` and ``.grad`` of every parameter, the global generators and the
    settings of all loggers are what they were.

    In a worker of :func:`side_by_side` nothing that all threads share is touched: torch's draws come from a generator
    of this thread (see :class:`scl_defense.draws.OwnDraws`), and are the same numbers.
    """
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    if getattr(_here, "beside", False):
        with frozen(*modules), OwnDraws(seed), torch.enable_grad():
            yield
        return
    with frozen(*modules), seeded_globals(seed), torch.enable_grad(), _silence(), _logging_kept():
        yield


@contextmanager
def side_by_side() -> Iterator[None]:
    """Around threads that call libraries at the same time: what all of them share is lent and taken back once.

    What a :func:`worker` prints goes nowhere; the thread that waits for them may print, its progress for one.
    """
    with (
        global_random_state(),
        redirect_stdout(_NotOfWorkers(sys.stdout)),
        redirect_stderr(_NotOfWorkers(sys.stderr)),
        _logging_kept(),
    ):
        yield


class _NotOfWorkers(io.TextIOBase):
    """A stream that takes what other threads than workers write to it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text) if getattr(_here, "beside", False) else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextmanager
def worker() -> Iterator[None]:
    """In such a thread: :func:`library_call` leaves alone what all threads share."""
    _here.beside = True
    try:
        yield
    finally:
        _here.beside = False


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Inside, the global generators of torch (all devices), NumPy and Python start from ``seed``; after, as before."""
    with global_random_state():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


@contextmanager
def without_logging_setup(package: str) -> Iterator[None]:
    """Inside, ``logging.config.dictConfig`` ignores configurations of ``package``'s logger; others go through.

    ``dictConfig`` closes all handlers that exist, whoever owns them. A package that calls it while being imported is
    kept from doing so, and is given the silent handler that it wanted.
    """
    original = logging.config.dictConfig

    def others_only(config: dict[str, Any]) -> None:
        if package not in config.get("loggers", {}):
            original(config)

    logging.config.dictConfig = others_only
    try:
        yield
    finally:
        logging.config.dictConfig = original
        logging.getLogger(package).addHandler(logging.NullHandler())


@contextmanager
def _silence() -> Iterator[None]:
    # Progress bars and chatter of the libraries; their faults come as exceptions.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _logging_kept() -> Iterator[None]:
    manager = logging.root.manager
    loggers = [logging.root, *(item for item in manager.loggerDict.values() if isinstance(item, logging.Logger))]
    before = [(item, item.level, item.propagate, item.disabled, list(item.handlers)) for item in loggers]
    disabled_below = manager.disable
    try:
        yield
    finally:
        for logger, level, propagate, disabled, handlers in before:
            if logger.level != level:  # every call empties the caches of all loggers
                logger.setLevel(level)
            logger.propagate, logger.disabled, logger.handlers = propagate, disabled, handlers
        if manager.disable != disabled_below:
            logging.disable(disabled_below)
