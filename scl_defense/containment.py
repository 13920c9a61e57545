"""What a plugin may not change for everybody else while it is imported, put back and said."""

import contextlib
import logging
import random
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from scl_defense.errors import ComponentError, UserError, printable

SLOW = 10.0  # seconds of import after which a plugin is named: it keeps every command waiting
_TORCH = ("torch", "torch.nn.functional", "torch.Tensor", "torch.nn.Module", "torch.autograd", "torch.optim.Optimizer")


class Uncontained(UserError):
    """A plugin has changed what everything stands on, and nobody can take it back in this process."""


@contextlib.contextmanager
def contained(name: str) -> Iterator[set[str]]:
    """Import a plugin inside, and add the name of its module to the set.

    What it prints goes to stderr, so that ``--json`` stays JSON; an import that takes long is named while it lasts;
    global random state, torch's defaults, root logger and filters that silence every warning are put back, and the
    plugin is named. Raises :class:`ComponentError` when it replaces a function of torch, which is put back too;
    :class:`Uncontained` where that cannot be done.
    """
    before, torch_before = _state(), _torch_parts()
    timer = threading.Timer(SLOW, _say, [f"plugin '{name}' is still being imported after {SLOW:g} s; leave it out with "
                                         f"SCL_DEFENSE_DISABLE_PLUGINS={name}"])  # fmt: skip
    timer.daemon = True
    started = time.monotonic()  # before the timer: what it has named took long
    timer.start()
    own: set[str] = set()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield own
    finally:
        timer.cancel()
        if changed := _put_back(before):
            _say(f"plugin '{name}' changed {' and '.join(changed)} while it was imported; put back as it was")
    if (took := time.monotonic() - started) > SLOW:
        _say(f"plugin '{name}' took {took:.0f} s to import; every command waits for it")
    _refuse_patches(name, {module.partition(".")[0] for module in own}, torch_before)


def _say(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def _state() -> dict[str, Any]:
    root = logging.getLogger()
    found: dict[str, Any] = {
        "Python's random state": random.getstate(),
        "the root logger": (root.level, list(root.handlers), logging.root.manager.disable),
        "warnings": list(warnings.filters),
    }
    if (numpy := sys.modules.get("numpy")) is not None and hasattr(numpy, "random"):
        found["NumPy's random state"] = numpy.random.get_state()
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_rng_state"):
        found["torch's random state"] = torch.get_rng_state()
        found |= _defaults(torch)
    return found


def _put_back(before: dict[str, Any]) -> list[str]:
    """Names of what had to be put back."""
    changed, root = [], logging.getLogger()
    if random.getstate() != before["Python's random state"]:
        random.setstate(before["Python's random state"])
        changed.append("Python's random state")
    level, handlers, disabled = before["the root logger"]
    if (root.level, root.handlers, logging.root.manager.disable) != (level, handlers, disabled):
        root.setLevel(level)
        root.handlers[:] = handlers
        logging.disable(disabled)
        changed.append("the root logger")
    silencing = [one for one in warnings.filters if one not in before["warnings"] and _silences_all(one)]
    if silencing:
        warnings.filters[:] = [one for one in warnings.filters if one not in silencing]  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]
        changed.append("the filters of warnings")
    if "NumPy's random state" in before:
        numpy, old = sys.modules["numpy"], before["NumPy's random state"]
        new = numpy.random.get_state()
        if new[0] != old[0] or new[2:] != old[2:] or not (new[1] == old[1]).all():
            numpy.random.set_state(old)
            changed.append("NumPy's random state")
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_default_dtype"):
        if "torch's random state" in before and not torch.equal(torch.get_rng_state(), before["torch's random state"]):
            torch.set_rng_state(before["torch's random state"])
            changed.append("torch's random state")
        now = _defaults(torch)
        usual = {**now, "torch's default dtype": torch.float32, "torch's default device": torch.device("cpu"),
                 "torch's gradients": True}  # fmt: skip
        for what, put in (
            ("torch's default dtype", torch.set_default_dtype),
            ("torch's default device", torch.set_default_device),
            ("torch's gradients", torch.set_grad_enabled),
            ("torch's number of threads", torch.set_num_threads),
        ):
            if now[what] != (old := before.get(what, usual[what])):
                put(None if old == torch.device("cpu") else old)
                changed.append(what)
    return changed


def _defaults(torch: Any) -> dict[str, Any]:
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
    }


def _silences_all(entry: tuple[Any, ...]) -> bool:
    action, message, category, module, _ = entry
    return action == "ignore" and message is None and module is None and category is Warning


def _torch_parts() -> dict[str, dict[str, Any]]:
    """Namespaces of torch that everything here stands on, if it is imported already."""
    if "torch" not in sys.modules:
        return {}
    return {name: dict(vars(part)) for name in _TORCH if (part := _part(name)) is not None}


def _part(name: str) -> Any:
    found: Any = sys.modules.get("torch")
    for piece in name.split(".")[1:]:
        found = getattr(found, piece, None)
    return found


def _refuse_patches(name: str, packages: set[str], before: dict[str, dict[str, Any]]) -> None:
    """Raise when a function of torch is now one of these packages'."""
    patched = []
    for part in _TORCH:
        space = _part(part)
        for attribute, value in list(vars(space).items()) if space is not None else ():
            if not isinstance(value, FunctionType) or before.get(part, {}).get(attribute) is value:
                continue
            if (value.__module__ or "").partition(".")[0] in packages:
                patched.append((part, attribute))
    if not patched:
        return
    text = f"it replaces {', '.join(f'{part}.{attribute}' for part, attribute in patched[:3])} for everybody"
    if any(part not in before for part, _ in patched):
        raise Uncontained(
            f"plugin '{name}': {text}, which cannot be undone here; leave it out with "
            f"SCL_DEFENSE_DISABLE_PLUGINS={name}"
        )
    for part, attribute in patched:
        if attribute in before[part]:
            setattr(_part(part), attribute, before[part][attribute])
        else:
            delattr(_part(part), attribute)
    raise ComponentError(text)
