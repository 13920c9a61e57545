"""What all contract tests share: results, the runner, and the rules for every component."""

import dataclasses
import inspect
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scl_defense.config import construct, options_of
from scl_defense.errors import SclDefenseError, UserError
from scl_defense.guard import global_random_state

BUILT = "can-be-built"
Check = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of one component. ``message`` is one line; empty when it passed."""

    component: str
    check: str
    passed: bool
    message: str = ""


class Fault(Exception):
    """The component breaks the promise that a check asks for."""


class NotApplicable(Exception):
    """The promise is not made by a component of this sort: no result is reported."""


def expect(condition: object, fault: str) -> None:
    if not condition:
        raise Fault(fault)


def applies_if(condition: object) -> None:
    if not condition:
        raise NotApplicable


def label(check: Check) -> str:
    """The name under which a check is reported: ``check_inside_ball`` -> ``inside-ball``."""
    return check.__name__.removeprefix("check_").replace("_", "-")


def examine(
    component: Any, name: str | None, checks: Sequence[Check], prepare: Callable[[Any, str], Any]
) -> list[CheckResult]:
    """Run every check on a component (an instance, or a class: then with its default options).

    The checks are independent: one that fails, or a component that raises, does not stop the next. The global
    generators and torch's settings are put back after each.
    """
    name = name or (component if inspect.isclass(component) else type(component)).__name__
    try:
        instance = construct(component, {}, name) if inspect.isclass(component) else component
    except Exception as error:
        return [CheckResult(name, BUILT, False, one_line(error))]
    subject, results = prepare(instance, name), [CheckResult(name, BUILT, True)]
    for check in checks:
        with global_random_state(), settings_kept():
            try:
                check(subject)
            except NotApplicable:
                continue
            except Exception as error:
                results.append(CheckResult(name, label(check), False, one_line(error)))
            else:
                results.append(CheckResult(name, label(check), True))
    return results


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, (Fault, SclDefenseError)):
        text = f"it raised {type(error).__name__}: {text}"
    return text if len(text) <= 400 else text[:397] + "..."


# -- comparing


def same(first: Any, second: Any) -> bool:
    """Bitwise the same tensor; NaN equals NaN. (What is no tensor is another check's, and counts as the same.)"""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return type(first) is type(second)
    if first.shape != second.shape:
        return False
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())


def network_state(network: nn.Module) -> dict[str, Any]:
    """Everything about a network that a component has to leave alone, by a name to be shown."""
    state: dict[str, Any] = {}
    for name, parameter in network.named_parameters():
        state[f"the values of {name}"] = parameter.detach().clone()
        state[f"the gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"requires_grad of {name}"] = parameter.requires_grad
    for name, buffer in network.named_buffers():
        state[f"the buffer {name}"] = buffer.clone()
    for name, module in network.named_modules():
        state[f"the train/eval mode of {name or 'the network'}"] = module.training
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = sorted(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        both = isinstance(old, Tensor) and isinstance(new, Tensor)
        if not (same(old, new) if both else old is new or (not isinstance(old, Tensor) and old == new)):
            names.append(name)
    return sorted(names)


def several(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# -- global state


def seed_globals(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's gradient recording (set_grad_enabled)": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
}


@contextmanager
def global_state_watched() -> Iterator[list[str]]:
    """Gives a list that afterwards names the global generators and settings of torch that were changed inside."""
    moved: list[str] = []
    before = _global_state()
    yield moved
    after = _global_state()
    moved += [name for name in before if before[name] != after[name]]


def expect_unmoved(moved: Sequence[str]) -> None:
    if moved:
        raise Fault(f"it changed {several(moved)}, which belongs to the whole process")


def _global_state() -> dict[str, Any]:
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    return {
        "torch's global random state": torch.get_rng_state().numpy().tobytes(),
        "NumPy's global random state": (kind, keys.tobytes(), *rest),
        "Python's global random state": random.getstate(),
        **{name: get() for name, (get, _) in _SETTINGS.items()},
    }


@contextmanager
def settings_kept() -> Iterator[None]:
    before = {name: get() for name, (get, _) in _SETTINGS.items()}
    try:
        yield
    finally:
        for name, (get, put) in _SETTINGS.items():
            if get() != before[name]:
                put(before[name])


# -- the rules for every component; ``subject.component`` is the instance


def check_frozen_dataclass(subject: Any) -> None:
    """A component is a frozen, keyword-only dataclass: the object *is* its hyper-parameters and cannot drift."""
    cls = type(subject.component)
    expect(dataclasses.is_dataclass(cls), f"{cls.__name__} is no dataclass; make it with scl_defense.types.component")
    expect(cls.__dataclass_params__.frozen, f"{cls.__name__} is not frozen; make it with scl_defense.types.component")
    positional = [field.name for field in dataclasses.fields(cls) if field.init and not field.kw_only]
    if positional:
        raise Fault(f"option '{positional[0]}' is not keyword-only; make it with scl_defense.types.component")


def check_documented(subject: Any) -> None:
    """The class says what it does and every option has a description: ``plugins list NAME`` shows both."""
    cls = type(subject.component)
    _needs_dataclass(cls)
    text = (cls.__doc__ or "").strip()
    made_up = text.startswith(f"{cls.__name__}(")  # a dataclass writes its signature where there is no docstring
    expect(text and not made_up, f"class {cls.__name__} has no docstring")
    mute = [option.name for option in options_of(cls) if not option.description.strip()]
    if mute:
        raise Fault(f"option '{mute[0]}' has no description; write Annotated[TYPE, Field(description=...)]")


def check_options_are_plain_data(subject: Any) -> None:
    """The options are numbers, text, booleans, lists: they go into checkpoints and results as JSON."""
    _needs_dataclass(type(subject.component))
    for name, value in dataclasses.asdict(subject.component).items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Fault(f"option '{name}' = {value!r} is no JSON: {one_line(error)}") from None


def check_options_rebuild_it(subject: Any) -> None:
    """What a checkpoint keeps (the options as JSON) rebuilds an equal object, and ``repr`` tells every option."""
    component, options = subject.component, _json_options(subject.component)
    again = construct(type(component), options, subject.name)
    expect(again == component, f"rebuilt from its options it is {again!r}, not {component!r}")
    for field in dataclasses.fields(component):
        told = f"{field.name}={getattr(component, field.name)!r}"
        expect(told in repr(component), f"its repr does not tell {told}")


def check_options_from_text(subject: Any) -> None:
    """Options typed on a command line (``-g steps=20``) are text: they are converted, unknown names are refused."""
    cls, options = type(subject.component), _json_options(subject.component)
    expected = construct(cls, options, subject.name)
    for name, value in options.items():
        if isinstance(value, (bool, int, float, str)):
            text = str(value)
        elif isinstance(value, list) and value and all(isinstance(item, (int, float, str)) for item in value):
            text = "+".join(map(str, value))
        else:
            continue  # None, nested data: given in a file, not on a command line
        again = construct(cls, {**options, name: text}, subject.name)
        became = getattr(again, name)
        expect(again == expected, f"option '{name}' given as the text {text!r} becomes {became!r}, not {value!r}")
    try:
        construct(cls, {**options, "no_such_option": "1"}, subject.name)
    except UserError:
        return
    except SclDefenseError:
        pass
    raise Fault("an unknown option is not refused clearly; make the class with scl_defense.types.component")


def _needs_dataclass(cls: type) -> None:
    applies_if(dataclasses.is_dataclass(cls))  # check_frozen_dataclass says so


def _json_options(component: Any) -> dict[str, Any]:
    _needs_dataclass(type(component))
    try:
        options: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(component), allow_nan=False))
    except (TypeError, ValueError):
        raise NotApplicable from None  # check_options_are_plain_data says so
    return options


COMPONENT_CHECKS: tuple[Check, ...] = (
    check_frozen_dataclass,
    check_documented,
    check_options_are_plain_data,
    check_options_rebuild_it,
    check_options_from_text,
)
