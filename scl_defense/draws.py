"""Random numbers that do not know the batch size: a part of a chunk draws what it would have got in the whole."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

# The last two are torch's own means against a mode; there is no public one that leaves a network's own modes alone.
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

_SIZED = {torch.rand, torch.randn}
_ALIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
_FILLING = {
    Tensor.uniform_,
    Tensor.normal_,
    Tensor.random_,
    Tensor.bernoulli_,
    Tensor.exponential_,
    torch.nn.init.uniform_,
}
_DRAWING = {torch.rand, torch.randn, torch.randint, torch.randperm}

_state = threading.local()


class Several:
    """In place of one generator: parts of a batch that follow each other, each with so many rows and draws of its own.

    What a part draws is what it would draw by itself, whoever else is in the batch.
    """

    def __init__(self, parts: Sequence[tuple[torch.Generator, int]]):
        self.parts = [(rng, count) for rng, count in parts if count]
        self._silent = [False] * len(self.parts)

    def alone(self, rows: Tensor) -> "Several":
        """The same, of which only the parts with one of these rows draw; the others have zeros for what is drawn."""
        made, wanted, start = Several(self.parts), set(rows.tolist()), 0
        for place, (_, count) in enumerate(self.parts):
            made._silent[place] = wanted.isdisjoint(range(start, start + count))
            start += count
        return made

    def each(self, function: Callable[[Tensor, torch.Generator], Tensor], images: Tensor) -> Tensor:
        """``function`` of every part's images and generator, joined: shaped as ``images``.

        So rounding is a part's own too: the last numbers of a tensor may be computed by other instructions.
        """
        made, start = [images[:0]], 0
        for (rng, count), silent in zip(self.parts, self._silent, strict=True):
            part = images[start : start + count]
            made.append(torch.zeros_like(part) if silent else function(part, rng))
            start += count
        return torch.cat(made)


#: What draws: torch's generator, or one for each part of a batch.
Draws = torch.Generator | Several


def image_by_image(
    call: Callable[[Tensor, Tensor, torch.Generator], Tensor], images: Tensor, labels: Tensor, rng: torch.Generator
) -> Tensor:
    """``call`` on one image (1, C, H, W), label (1,) and generator after the other, joined; none: no image.

    The generators are seeded from one draw of ``rng`` with a number an image: what an image draws depends on its place
    in the chunk, neither on how many images the attack got at a time nor on what the others drew.
    """
    seeds = torch.randint(2**62, (len(images),), generator=rng, device=rng.device).tolist()
    made = [images[:0]]
    for image, label, seed in zip(images, labels, seeds, strict=True):
        _state.alone = True  # a part of one image is no part of a chunk: what it draws is its own
        try:
            made.append(call(image[None], label[None], torch.Generator(rng.device).manual_seed(seed)))
        finally:
            _state.alone = False
    return torch.cat(made)


def rows_before() -> int:
    """How many images of the chunk come before those of :class:`RowsOf`, 0 outside: for draws that it cannot cover."""
    return getattr(_state, "before", 0)


class RowsOf(TorchFunctionMode):
    """Inside, a draw with one row an image of the part is made for the whole chunk, and the part gets its rows.

    start, stop: the part's rows of ``whole``. Covers torch's ``rand``, ``randn``, ``randint``, their ``_like`` forms
    and the methods that fill a tensor; what a library draws from NumPy, or for a part of the part, is its own (see
    :func:`image_by_image`, :func:`rows_before`). rng: only draws from this generator are such draws (default: all).
    """

    def __init__(self, start: int, stop: int, whole: int, rng: torch.Generator | None = None):
        super().__init__()
        self.rows, self.count, self.whole, self.rng = slice(start, stop), stop - start, whole, rng

    def __enter__(self) -> Self:
        self.around, _state.before = rows_before(), self.rows.start
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _state.before = self.around
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(_state, "alone", False) or (self.rng is not None and kwargs.get("generator") is not self.rng):
            return func(*args, **kwargs)
        if func in _SIZED:
            size = kwargs.pop("size", None) or (args[0] if args and not isinstance(args[0], int) else args)
            return self._drawn(func, (), tuple(size), kwargs)
        if func is torch.randint:
            given = list(args)
            size = kwargs.pop("size", None)
            if size is None:
                place = next((i for i, item in enumerate(given) if not isinstance(item, int)), None)
                if place is None:
                    return func(*args, **kwargs)
                size = given.pop(place)
            return self._drawn(func, tuple(given), tuple(size), kwargs)
        if func in _ALIKE and self._matches(args[0].shape):
            like = {"dtype": args[0].dtype, "device": args[0].device}
            kwargs.pop("memory_format", None)
            return self._drawn(_ALIKE[func], (), tuple(args[0].shape), like | kwargs)
        if func in _FILLING:
            target = args[0] if args else kwargs.pop("tensor")  # torch.nn.init names it
            if not self._matches(target.shape):
                return func(target, *args[1:], **kwargs)
            whole = torch.empty(self.whole, *target.shape[1:], dtype=target.dtype, device=target.device)
            func(whole, *args[1:], **kwargs)
            return target.copy_(whole[self.rows])
        return func(*args, **kwargs)

    def _matches(self, shape: Any) -> bool:
        return len(shape) > 0 and shape[0] == self.count

    def _drawn(self, func: Callable[..., Any], before: tuple[Any, ...], size: tuple[int, ...], kwargs: Any) -> Any:
        if not self._matches(size):
            return func(*before, size, **kwargs)
        gradient = kwargs.pop("requires_grad", False)
        return func(*before, (self.whole, *size[1:]), **kwargs)[self.rows].clone().requires_grad_(gradient)


class OwnDraws(TorchFunctionMode):
    """Inside, and in this thread alone, what torch draws comes from generators of its own instead of the global ones.

    The numbers are those of ``torch.manual_seed(seed)``: a generator on every device that something is drawn on, seeded
    alike. What a library draws from NumPy or Python, or seeds by itself, is not covered. drawn: how often it was asked.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.generators = seed, dict[torch.device, torch.Generator]()
        self.drawn = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is None:
            if func in _ALIKE:
                made = torch.empty_like(
                    args[0], **{name: value for name, value in kwargs.items() if name != "generator"}
                )
                fill = Tensor.uniform_ if func is torch.rand_like else Tensor.normal_
                return fill(made, generator=self._of(made.device))
            if func in _FILLING:
                target = args[0] if args else kwargs["tensor"]  # torch.nn.init names it
                return func(*args, **{**kwargs, "generator": self._of(target.device)})
            if func in _DRAWING:
                return func(*args, **{**kwargs, "generator": self._of(kwargs.get("device") or "cpu")})
        return func(*args, **kwargs)

    def _of(self, device: torch.device | str) -> torch.Generator:
        self.drawn += 1
        device = torch.device(device)
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


class Unheard:
    """Calls of a network that draws nothing, unheard by the :class:`OwnDraws` around them.

    That is asked about every operation, which takes up to a seventh of a small network's time. A first call with a
    gradient and a first one without are heard: only what was seen to draw nothing then is unheard from there on.
    """

    def __init__(self) -> None:
        self.silent: set[bool] = set()

    def __call__(self, network: Callable[[Tensor], Any], images: Tensor) -> Any:
        mode, kind = _get_current_function_mode(), torch.is_grad_enabled() and images.requires_grad
        if not isinstance(mode, OwnDraws):
            return network(images)
        if kind in self.silent:
            with _pop_mode_temporarily():
                return network(images)
        before = mode.drawn
        answer = network(images)
        if mode.drawn == before:
            self.silent.add(kind)
        return answer
