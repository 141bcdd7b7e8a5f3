"""Which convolutions conv_bn_relu can run: with the norm, addition and activation that alone read their result.

Transposed convolutions are conv_transpose_bn_relu's, and found in the same way.

What a module does with its children is read by tracing its own ``forward`` (torch.fx), children taken whole. The traced
code, with every such chain as one call, then stands in for that ``forward``; the children stay the modules they are.
So a chain is found wherever it is written within one ``forward``: a Sequential, a residual block whose one ReLU runs
three times, functional activations. The original runs wherever the trace would not hold: with hooks on a child that
the call would skip, arguments that are not tensors, or attributes that have changed in a way not traced yet.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ptkernels._replace.change import SUBCLASS, Change, Forward
from ptkernels._replace.report import Kept, Replaced
from ptkernels.nn.conv import ACTIVATIONS, fused

_NORMS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Conv1d: (nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm),
    nn.Conv2d: (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm),
    nn.Conv3d: (nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm),
    nn.ConvTranspose1d: (nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm),
    nn.ConvTranspose2d: (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm),
    nn.ConvTranspose3d: (nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm),
}
_FUNCTIONS: dict[Any, str] = {
    function: name
    for name in ACTIVATIONS
    for space in (F, torch, Tensor)
    for suffix in ("", "_")
    if (function := getattr(space, name + suffix, None)) is not None
}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONSTANTS = (bool, int, float, str, type(None))
# What tracing would turn into one fixed outcome.
_DRAWS = {"random", "randint", "rand", "randn", "bernoulli", "uniform"}


@dataclass
class _Chain:
    """Nodes of a traced forward that one call can do."""

    conv: fx.Node
    nodes: list[fx.Node]
    norm: fx.Node | None = None
    residual: fx.Node | None = None
    activation: fx.Node | str | None = None
    """The call of a module, or the name of what a function computes."""

    def targets(self) -> list[str]:
        return [str(node.target) for node in self.nodes if node.op == "call_module"]


class _Tracer(fx.Tracer):
    """Traces one forward, and leaves nothing behind in its module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise TypeError("a tensor that forward makes would become a constant")
        return super().create_arg(a)


def _trace(module: nn.Module) -> fx.Graph | None:
    """What the module's forward does, or None where that cannot be told ahead."""
    forward = type(module).forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        # A default would be traced as given, a None as a tensor.
        simple = (parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
        if not all(simple) or any(parameter.default is not parameter.empty for parameter in parameters):
            return None
        if _DRAWS & set(forward.__code__.co_names):
            return None
        return _Tracer().trace(module)
    except Exception:  # whatever a forward raises on symbolic input
        return None


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(module: nn.Module) -> nn.Module | str | None:
    """A module as an activation that there is a kernel for: itself, or the name of the one function that it calls."""
    if any(type(module) is kind for kind in ACTIVATIONS.values() if kind is not nn.Identity):
        plain = getattr(module, "approximate", "none") == "none" and getattr(module, "alpha", 1.0) == 1.0
        return module if plain else None
    own = {name for name in module.__dict__ if not name.startswith("_")}
    if not own <= {"training", "inplace"} or module._parameters or module._buffers or module._modules:
        return None  # what could change what it computes
    graph = _trace(module)
    nodes = [] if graph is None or "training" in type(module).forward.__code__.co_names else list(graph.nodes)
    return _function(nodes[1]) if [node.op[:4] for node in nodes] == ["plac", "call", "outp"] else None


def _function(node: fx.Node) -> str | None:
    """The activation that a node computes without a module."""
    function = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    plain = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
    return _FUNCTIONS.get(function) if plain else None


def _activation_of(root: nn.Module, node: fx.Node) -> fx.Node | str | None:
    """The activation that a node computes, if there is a kernel for it."""
    module = _module(root, node)
    if module is None:
        return _function(node)
    known = _activation(module)
    return node if known is module else known  # type: ignore[return-value]


def _added_to(node: fx.Node, addition: fx.Node) -> fx.Node | None:
    """What an addition adds to a node, if it is one."""
    is_addition = addition.op == "call_function" and addition.target in _ADDITIONS
    is_addition |= addition.op == "call_method" and addition.target in ("add", "add_")
    if not is_addition or addition.kwargs or len(addition.args) != 2:
        return None
    first, second = addition.args
    other = second if first is node else first
    return other if isinstance(other, fx.Node) and other is not node else None


def _normalises_and_activates(norm: Any) -> bool:
    """timm's batch norm with an activation of its own."""
    kind = type(norm)
    return kind.__module__.startswith("timm.") and kind.__name__ == "BatchNormAct2d"


def _pays_alone(conv: Any) -> bool:
    """A depthwise convolution whose gradients torch computes at a fraction of the speed of ours: from 25 taps on."""
    taps = math.prod(conv.kernel_size)
    return conv.groups == conv.in_channels == conv.out_channels > 1 and taps >= 25 and isinstance(conv, nn.Conv2d)


class _Matcher:
    """Finds every convolution with what follows it, as far as one call goes; no node is in two chains."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.taken: set[fx.Node] = set()
        self.chains = []
        for node in graph.nodes:
            if type(_module(root, node)) in _NORMS and len(node.args) == 1 and not node.kwargs:
                chain = self._match(node)
                if len(chain.nodes) > 1 or _pays_alone(_module(root, node)):
                    self.chains.append(chain)
                    self.taken.update(chain.nodes)

    def _match(self, conv: fx.Node) -> _Chain:
        chain = _Chain(conv, [conv])
        reader = self._next(chain)
        norm = None if reader is None else _module(self.root, reader)
        if reader is not None and norm is not None and self._is_norm(conv, norm):
            chain.norm = reader
            chain.nodes.append(reader)
            reader = self._next(chain)
            if _normalises_and_activates(norm) and type(norm.act) is not nn.Identity:
                return self._without_trailing_identities(chain)
        if reader is not None and (other := _added_to(chain.nodes[-1], reader)) is not None:
            chain.residual = other
            chain.nodes.append(reader)
            reader = self._next(chain)
        if reader is not None and (activation := _activation_of(self.root, reader)) is not None:
            chain.activation = activation
            chain.nodes.append(reader)
        return self._without_trailing_identities(chain)

    def _next(self, chain: _Chain) -> fx.Node | None:
        """The only reader of the chain's result, identities on the way taken into the chain."""
        reader = _only_reader(chain.nodes[-1])
        while reader is not None and type(_module(self.root, reader)) is nn.Identity:
            chain.nodes.append(reader)
            reader = _only_reader(reader)
        return None if reader in self.taken else reader

    def _is_norm(self, conv: fx.Node, norm: Any) -> bool:
        if _normalises_and_activates(norm):
            known = type(norm.act) is nn.Identity or _activation(norm.act) is not None
            return known and type(norm.drop) is nn.Identity
        if isinstance(norm, nn.modules.instancenorm._InstanceNorm) and norm.track_running_stats:
            return False  # they are not kept
        return type(norm) in _NORMS[type(_module(self.root, conv))]  # type: ignore[index]

    def _without_trailing_identities(self, chain: _Chain) -> _Chain:
        while type(_module(self.root, chain.nodes[-1])) is nn.Identity:
            chain.nodes.pop()
        return chain


def _run(conv: Any, norm: Any, activation: nn.Module | str | None, x: Tensor, residual: Tensor | None) -> Tensor:
    """What a chain computes; an addition that broadcasts or promotes is done apart."""
    if residual is None or _fits(conv, x, residual):
        return fused(conv, norm, activation, x, residual)
    total = fused(conv, norm, None, x) + residual
    if activation is None:
        return total
    result: Tensor = (ACTIVATIONS[activation]() if isinstance(activation, str) else activation)(total)
    return result


def _fits(conv: Any, x: Tensor, residual: Tensor) -> bool:
    if residual.dtype != x.dtype or isinstance(conv.padding, str) or residual.dim() != x.dim():
        return False
    sizes = (x.shape[-len(conv.stride) :], conv.padding, conv.dilation, conv.kernel_size, conv.stride)
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        every = zip(*sizes, conv.output_padding, strict=True)
        spatial = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, p, d, k, s, o in every]
    else:
        spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(*sizes, strict=True)]
    return list(residual.shape) == [*x.shape[: -len(spatial) - 1], conv.out_channels, *spatial]


def _rewrite(root: nn.Module, graph: fx.Graph, chains: list[_Chain]) -> None:
    for chain in chains:
        last = chain.nodes[-1]
        with graph.inserting_before(last):
            parts: list[Any] = [chain.conv, chain.norm, chain.activation]
            parts = [graph.get_attr(str(p.target)) if isinstance(p, fx.Node) else p for p in parts]
            norm: Any = None if chain.norm is None else _module(root, chain.norm)
            if norm is not None and chain.activation is None and _normalises_and_activates(norm):
                known = _activation(norm.act)
                parts[2] = graph.get_attr(f"{parts[1].target}.act") if known is norm.act else known
            call = graph.call_function(_run, (*parts, chain.conv.args[0], chain.residual))
        last.replace_all_uses_with(call)
        for node in reversed(chain.nodes):
            graph.erase_node(node)


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS) or "forward" in module.__dict__


def _any_hooked(root: nn.Module, chain: _Chain) -> bool:
    return any(_is_hooked(root.get_submodule(target)) for target in chain.targets())


@dataclass(frozen=True)
class _Traced:
    """A forward with its chains fused, as a function of the module and its arguments."""

    function: Callable[..., Any]
    children: tuple[str, ...]
    """Those that it does not call."""


class _Fused(Forward):
    """The traced forward, of today's mode and attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._traced: dict[Any, _Traced | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        # Nothing can be traced while torch.compile traces: it takes what stands for this mode.
        traced = self._traced.get(module.training) if torch.compiler.is_compiling() else self._current()
        given = (*args, *kwargs.values())
        if traced is None or not all(isinstance(value, Tensor) for value in given):
            return type(module).forward(module, *args, **kwargs)
        if any(_is_hooked(module.get_submodule(name)) for name in traced.children):
            return type(module).forward(module, *args, **kwargs)
        return traced.function(module, *args, **kwargs)

    def _current(self) -> _Traced | None:
        attributes = [item for item in self.module.__dict__.items() if isinstance(item[1], _CONSTANTS)]
        children = [child for child in self.module._modules.values() if child is not None]
        key = (*attributes, *map(type, children), *(type(child._modules.get("act")) for child in children))
        if key not in self._traced:
            traced = self._traced[key] = self._trace()
            self._traced.setdefault(self.module.training, traced)
        return self._traced[key]

    def _trace(self) -> _Traced | None:
        graph = _trace(self.module)
        if graph is None:
            return None
        chains = [chain for chain in _Matcher(self.module, graph).chains if not _any_hooked(self.module, chain)]
        children = tuple({target: None for chain in chains for target in chain.targets()})
        _rewrite(self.module, graph, chains)
        return _Traced(type(fx.GraphModule(self.module, graph)).forward, children)

    def trace_both_modes(self) -> None:
        mode = self.module.training
        for training in (not mode, mode):
            self.module.training = training  # of this module alone: its children are not called
            self._current()

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "_traced": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Fused:
        other = _Fused(copy.deepcopy(self.module, memo))
        other._traced = dict(self._traced)  # functions of whichever module they are given
        return other


class ConvBnReluRule:
    """See the module."""

    op = "conv_bn_relu"

    def plan(self, model: nn.Module) -> Iterator[Change | Kept]:
        """See :class:`ptkernels._replace.change.Rule`."""
        for path, module in model.named_modules():
            if type(module).__module__.startswith(("ptkernels.", "torch.nn.modules.conv")):
                continue
            if not any(isinstance(child, tuple(_NORMS)) for child in module.modules()):
                continue
            if isinstance(module.__dict__.get("forward"), _Fused):
                continue
            graph = _trace(module)
            if graph is None:
                yield from self._untraceable(path, module)
            else:
                yield from self._subclasses(path, module, graph)
                yield from self._traced(path, module, _Matcher(module, graph).chains)

    def _subclasses(self, path: str, module: nn.Module, graph: fx.Graph) -> Iterator[Kept]:
        for node in graph.nodes:
            found = _module(module, node)
            if isinstance(found, tuple(_NORMS)) and type(found) not in _NORMS:
                where = f"{path}.{node.target}" if path else str(node.target)
                yield Kept(where, type(found).__name__, self.op, SUBCLASS)

    def _untraceable(self, path: str, module: nn.Module) -> Iterator[Kept]:
        if any(isinstance(child, tuple(_NORMS)) for child in module.children()):
            yield Kept(path, type(module).__name__, self.op, "what its forward does cannot be told without running it")

    def _traced(self, path: str, module: nn.Module, chains: list[_Chain]) -> Iterator[Change | Kept]:
        entries = []
        for chain in chains:
            where = f"{path}.{chain.conv.target}" if path else str(chain.conv.target)
            name = "-".join(_name(module, node) for node in chain.nodes)
            if _any_hooked(module, chain):
                yield Kept(where, name, self.op, "a hook looks at one of them")
            else:
                passes = sum(type(_module(module, node)) is not nn.Identity for node in chain.nodes) - 1
                effect = f"one operator: {passes} pass{'es' * (passes > 1)} over the result less"
                if passes == 0:
                    effect = "a kernel for many taps: gradients of the weight"
                entries.append(Replaced(where, name, self.op, effect))
        if entries and "forward" in module.__dict__:
            yield Kept(path, type(module).__name__, self.op, "its forward has been exchanged already")
        elif entries:
            forward = _Fused(module)
            forward.trace_both_modes()
            yield Change(path, entries, module, attributes={"forward": forward})


def _name(root: nn.Module, node: fx.Node) -> str:
    module = _module(root, node)
    return type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
