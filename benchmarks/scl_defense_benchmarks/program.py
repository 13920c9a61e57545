"""What a network computes, operation by operation, with what can be done in one go put together.

A module's forward pass is Python: that a ReLU reads a convolution's output, and nobody else does, is not to be seen in
it. So it is run once with stand-ins in place of tensors (:mod:`torch.fx`), which write down what is asked of them.
"""

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_modules

from scl_defense_benchmarks.chain import Chain
from scl_defense_benchmarks.convolutions import FrozenConv2d, convolved
from scl_defense_benchmarks.pooling import averaged, is_tiling

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_WRITING = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem}


@dataclass(frozen=True)
class Step:
    """One operation. call: from the values before to this one; arguments, named: with :class:`fx.Node` where a value
    goes. layer: the convolution, where it is one, ``call`` being :func:`convolved` then. over: places of values that
    nobody reads afterwards.
    """

    node: fx.Node
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    layer: FrozenConv2d | None
    over: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Stretch:
    """Steps one behind the other that read one value, ``images``, and each other, and of which the last alone is read
    afterwards: in one go where that can be (see :class:`scl_defense_benchmarks.chain.Chain`). over: as of a step.
    """

    steps: tuple[Step, ...]
    images: fx.Node
    chain: Chain
    over: tuple[fx.Node, ...]

    def node(self, place: int) -> fx.Node:
        """What is at a place of the chain."""
        return self.steps[place - 1].node if place else self.images


class Program:
    """The operations of a network in eval mode, to be run instead of its ``forward``. Made by :func:`program_of`.

    Values are let go as soon as nobody reads them any more. It holds the network's own modules and reads their weights
    in every pass; hooks on modules are not called (see :func:`hooked`). writes: an operation writes over a value.
    """

    def __init__(self, graph: fx.Graph, network: nn.Module):
        self.graph, self.network = graph, network
        self.steps = _steps(graph, network)
        self.parts = _stretched(self.steps)
        self.writes = any(_writes(node, network) for node in graph.nodes)
        self._parts = [(module, tuple(module._modules.values())) for module in network.modules()]
        self.images = next(node for node in graph.nodes if node.op == "placeholder")
        self.output = next(node for node in graph.nodes if node.op == "output").args[0]

    def holds(self) -> bool:
        """Whether the network is still what was written down: the same modules in eval mode, their own ``forward``, and
        nobody who wants to see what goes through them, for a program calls no hook.
        """
        for module, parts in self._parts:
            if module.training or "forward" in module.__dict__ or tuple(module._modules.values()) != parts:
                return False
        return not hooked([module for module, _ in self._parts])

    def of(self, network: nn.Module) -> "Program":
        """The same program of a copy of the network."""
        return Program(self.graph, network)

    def __call__(self, images: Tensor) -> Any:
        values: dict[fx.Node, Any] = {self.images: images}
        for part in self.parts:
            if isinstance(part, Step):
                _take(part, values)
            elif (made := part.chain(values[part.images])) is not None:
                values[part.steps[-1].node] = made
                for node in part.over:
                    del values[node]
            else:
                for step in part.steps:
                    _take(step, values)
        return fx.node.map_arg(self.output, values.__getitem__)


def _take(step: Step, values: dict[fx.Node, Any]) -> None:
    values[step.node] = run(step, values)
    for node in step.over:
        del values[node]


def run(step: Step, values: dict[fx.Node, Any]) -> Any:
    """The step's value from the values before it."""
    arguments = [_filled(item, values) for item in step.arguments]
    named = {name: _filled(item, values) for name, item in step.named.items()} if step.named else step.named
    return step.call(*arguments, **named)


def _filled(item: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(item, fx.Node):
        return values[item]
    return fx.node.map_arg(item, values.__getitem__) if isinstance(item, (tuple, list, dict, slice)) else item


def hooked(modules: Sequence[nn.Module]) -> bool:
    """Whether somebody wants to see what goes through one of these: a program calls no hook."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    everywhere = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
    return any(everywhere) or bool(torch_modules._global_backward_hooks or torch_modules._global_backward_pre_hooks)


def program_of(network: nn.Module) -> Program | None:
    """The program of ``network``, in eval mode with frozen convolutions; ``None`` where it cannot be written down.

    That is a network whose Python looks at the values or the sizes of tensors, has hooks or is compiled, or one with
    no convolution to gain by. Whether it computes the same is for the caller to see.
    """
    modules = list(network.modules())
    if hooked(modules) or any("forward" in module.__dict__ for module in modules):
        return None
    if not any(isinstance(module, FrozenConv2d) for module in modules):
        return None
    try:
        copied = copy.deepcopy(network)  # a forward pass may leave on its modules what a stand-in has made of it
        graph = _Writer().trace(copied)
        if any(isinstance(value, fx.Proxy) for module in copied.modules() for value in module.__dict__.values()):
            return None
        _put_together(graph, copied)
        return Program(graph, network)
    except Exception:  # a stranger's network: what cannot be written down is passed as it is
        return None


class _Writer(fx.Tracer):
    """:class:`fx.Tracer`, which while it works replaces ``nn.Module.__call__`` for everybody in the process, without
    that: a module that is an operation of its own is told to write itself down, in this network alone.
    """

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        self.root, self.graph = root, fx.Graph(tracer_cls=fx.Tracer)
        self.tensor_attrs = {
            value: f"{name}.{key}".lstrip(".")
            for name, module in root.named_modules()
            for key, value in module.__dict__.items()
            if isinstance(value, Tensor)
        }
        known, told = len(self.tensor_attrs), list[nn.Module]()
        try:
            for name, module in root.named_modules():
                if name and self.is_leaf_module(module, name):
                    told.append(module)
                    module.forward = self._told(name)
            output = root(self.create_proxy("placeholder", "images", (), {}))
        finally:
            for module in told:
                del module.__dict__["forward"]
        self.create_node("output", "output", (self.create_arg(output),), {})
        if len(self.tensor_attrs) > known:  # made from no input: who knows if it is the same the next time
            raise ValueError("a tensor out of nowhere")
        return self.graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FrozenConv2d) or super().is_leaf_module(m, module_qualified_name)

    def _told(self, name: str) -> Callable[..., Any]:
        return lambda *given, **named: self.create_proxy("call_module", name, given, named)


def _kind(node: fx.Node, network: nn.Module) -> Any:
    """What a node is: a function, a method's name, a module."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else node.target


def _put_together(graph: fx.Graph, network: nn.Module) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(_kind(node, network), _NOTHING) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if _is_relu(node, network):
            _take_up(graph, network, node, rectified=True)
    for node in list(graph.nodes):
        if _is_sum(node):
            _take_up(graph, network, node, rectified=False)


def _take_up(graph: fx.Graph, network: nn.Module, last: fx.Node, *, rectified: bool) -> None:
    """Put a convolution, a sum and a ReLU that ``last`` is the last of into one node, if nobody else reads them."""
    before: list[fx.Node] = [last]
    top, other = last, None
    if rectified:
        top = last.args[0]
        if not isinstance(top, fx.Node) or len(top.users) > 1:
            return
        before.append(top)
    if _is_sum(top):
        sides = [side for side in top.args[:2] if isinstance(side, fx.Node) and _is_convolution(side, network)]
        sides = [side for side in sides if len(side.users) == 1]
        if not sides:
            return
        order = list(graph.nodes)
        convolution = max(sides, key=order.index)
        other = next((side for side in top.args[:2] if side is not convolution), None)
        if other is None:  # twice the same
            return
        before.append(convolution)
    elif not _is_convolution(top, network):
        return
    first = before[-1]
    if _written_between(first, last, network, before) or (other is not None and not isinstance(other, fx.Node)):
        return
    with graph.inserting_after(last):
        named = {"other": other, "rectified": rectified}
        made = graph.call_function(convolved, (str(first.target), first.args[0]), named)
    last.replace_all_uses_with(made)
    for node in before:
        graph.erase_node(node)


def _is_relu(node: fx.Node, network: nn.Module) -> bool:
    kind = _kind(node, network)
    if node.op == "call_module":
        return type(kind) is nn.ReLU and len(node.args) == 1
    return node.op in ("call_function", "call_method") and kind in _RELUS and len(node.args) in (1, 2)


def _is_sum(node: fx.Node) -> bool:
    listed = node.op in ("call_function", "call_method") and node.target in _SUMS
    return listed and len(node.args) == 2 and not node.kwargs


def _is_convolution(node: fx.Node, network: nn.Module) -> bool:
    return node.op == "call_module" and isinstance(_kind(node, network), FrozenConv2d) and len(node.args) == 1


def _written_between(first: fx.Node, last: fx.Node, network: nn.Module, own: Sequence[fx.Node]) -> bool:
    """Whether anything is written over between two nodes: then the first one may not be put off until the last one."""
    node = first.next
    while node is not last:
        if node not in own and _writes(node, network):
            return True
        node = node.next
    return False


def _writes(node: fx.Node, network: nn.Module) -> bool:
    kind = _kind(node, network)
    if node.op == "call_module":
        return bool(getattr(kind, "inplace", False))
    if node.op == "call_method":
        return str(kind).endswith("_")
    named = str(getattr(kind, "__name__", "")).rstrip("0123456789")
    written = named.endswith("_") and not named.endswith("__")
    return kind in _WRITING or written or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _steps(graph: fx.Graph, network: nn.Module) -> list[Step]:
    last_read = {}
    for node in graph.nodes:
        for read in node.all_input_nodes:
            last_read[read] = node
    steps = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        over = tuple(read for read in node.all_input_nodes if last_read[read] is node)
        if node not in last_read:
            over = (*over, node)
        steps.append(_step(node, network, over))
    return steps


def _step(node: fx.Node, network: nn.Module, over: tuple[fx.Node, ...]) -> Step:
    arguments, named, layer = node.args, dict(node.kwargs), None
    call: Any = node.target
    if node.op == "call_module":
        call = network.get_submodule(str(node.target))
        if isinstance(call, FrozenConv2d) and not named:
            layer, call = call, convolved
            arguments = (layer, *arguments)
        elif type(call) is nn.AvgPool2d and is_tiling(call):
            call, arguments = averaged, (*arguments, call.kernel_size)
    elif node.op == "call_method":
        call = _Method(str(node.target))
    elif node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        call, arguments = _Attribute(network.get_submodule(owner), name), ()
    elif call is convolved:
        layer = network.get_submodule(str(node.args[0]))  # type: ignore[assignment]
        arguments = (layer, *arguments[1:])
    elif call is F.avg_pool2d:
        call = _Pool()
    return Step(node, call, arguments, named, layer, over)


def _stretched(steps: list[Step]) -> list[Step | Stretch]:
    """The same steps, convolutions that follow each other put together."""
    parts: list[Step | Stretch] = []
    while steps:
        stretch = next((made for made in map(_stretch, _runs(steps)) if made is not None), None)
        parts.append(stretch or steps[0])
        steps = steps[len(stretch.steps) if stretch else 1 :]
    return parts


def _runs(steps: list[Step]) -> Iterator[list[Step]]:
    """Runs of at least two convolutions that ``steps`` begin with, the longest first."""
    end = next((place for place, step in enumerate(steps) if step.layer is None), len(steps))
    for length in range(end, 1, -1):
        yield steps[:length]


def _stretch(steps: list[Step]) -> Stretch | None:
    images, places = steps[0].arguments[1], {}
    over, reads, others = list[fx.Node](), list[int](), list[int]()
    for place, step in enumerate(steps):
        places[images if place == 0 else steps[place - 1].node] = place
        read, other = step.arguments[1], step.named.get("other")
        if len(step.arguments) != 2 or read not in places or (other is not None and other not in places):
            return None
        reads.append(places[read])
        others.append(-1 if other is None else places[other])
        over += step.over
    inner = {step.node for step in steps[:-1]}
    if not inner <= set(over) or steps[-1].node in over:
        return None
    layers = [step.layer for step in steps if step.layer is not None]
    chain = Chain(layers, reads, others, [bool(step.named.get("rectified")) for step in steps])
    return Stretch(tuple(steps), images, chain, tuple(node for node in over if node not in inner))


class _Method:
    """A tensor's method by its name."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, value: Any, *given: Any, **named: Any) -> Any:
        return getattr(value, self.name)(*given, **named)


class _Attribute:
    """A module's tensor, as it is when asked for."""

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name

    def __call__(self) -> Any:
        return getattr(self.owner, self.name)


class _Pool:
    """:func:`F.avg_pool2d`, by the cheaper road where windows neither overlap nor leave anything out."""

    def __call__(self, maps: Tensor, kernel_size: Any, stride: Any = None, *given: Any, **named: Any) -> Any:
        if not given and not named and kernel_size == (stride or kernel_size):
            return averaged(maps, kernel_size)
        return F.avg_pool2d(maps, kernel_size, stride, *given, **named)
