"""Which convolutions conv_bn_relu can run: those that only a batch norm, or an activation, reads.

The convolution computes all of it, and the modules whose work it took over hand on what they are given. Who reads what
is told by tracing the model (torch.fx), or, where it cannot be traced, by the order of its ``nn.Sequential``s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from ptkernels._replace.change import Change
from ptkernels._replace.report import Kept, Replaced
from ptkernels.nn.conv import ACTIVATIONS, fused

_TAKEN_OVER = "_ptkernels_taken_over"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Fused(nn.Module):
    """A convolution that also computes what the modules behind it did."""

    def forward(self, x: Tensor) -> Tensor:
        norm, activation = self.__dict__[_TAKEN_OVER]
        return fused(self, norm, activation, x)


class FusedConv1d(_Fused, nn.Conv1d):
    pass


class FusedConv2d(_Fused, nn.Conv2d):
    pass


class FusedConv3d(_Fused, nn.Conv3d):
    pass


class _TakenOver(nn.Module):
    """Hands on what it is given: the convolution before it has done its work with its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x


_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: FusedConv1d,
    nn.Conv2d: FusedConv2d,
    nn.Conv3d: FusedConv3d,
}
_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
_ABSORBABLE = (*_NORMS.values(), *(kind for kind in ACTIVATIONS.values() if kind is not nn.Identity))
# Module-level names, so that changed models pickle.
_TAKEN: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(f"TakenOver{kind.__name__}", (_TakenOver, kind), {"__module__": __name__}) for kind in _ABSORBABLE
}
globals().update({kind.__name__: kind for kind in _TAKEN.values()})


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("ptkernels.")
        return ours or super().is_leaf_module(m, module_qualified_name)


Chain = list[tuple[str, nn.Module]]


def _traced(model: nn.Module) -> list[Chain] | None:
    """Every convolution with the modules behind it that nothing else reads from or runs, or None if not traceable."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever the model's own forward raises on symbolic input
        return None
    modules: dict[Any, nn.Module] = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    runs: dict[int, int] = {}
    for node in calls:
        runs[id(modules[node.target])] = runs.get(id(modules[node.target]), 0) + 1
    chains = []
    for node in calls:
        module = modules[node.target]
        if not isinstance(module, tuple(_CONVOLUTIONS)) or runs[id(module)] > 1:
            continue
        chain: Chain = [(str(node.target), module)]
        reader: Any = node
        while len(reader.users) == 1:
            reader = next(iter(reader.users))
            if reader.op != "call_module" or runs[id(modules[reader.target])] > 1:
                break
            chain.append((reader.target, modules[reader.target]))
        chains.append(chain)
    return chains


def _in_sequentials(model: nn.Module) -> list[Chain]:
    uses: dict[int, int] = {}
    for module in model.modules():
        for child in module.children():
            uses[id(child)] = uses.get(id(child), 0) + 1
    chains = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        for index, (_, child) in enumerate(children):
            if isinstance(child, tuple(_CONVOLUTIONS)):
                chains.append(list(itertools.takewhile(lambda item: uses[id(item[1])] == 1, children[index:])))
    return [chain for chain in chains if chain]


def _activation_of(module: nn.Module) -> str | None:
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind and kind is not nn.Identity:
            plain = getattr(module, "approximate", "none") == "none" and getattr(module, "alpha", 1.0) == 1.0
            return name if plain else None
    return None


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


class ConvBnReluRule:
    """See the module."""

    op = "conv_bn_relu"

    def plan(self, model: nn.Module) -> Iterator[Change | Kept]:
        """See :class:`ptkernels._replace.change.Rule`."""
        chains = _traced(model)
        for chain in _in_sequentials(model) if chains is None else chains:
            yield from self._chain(chain)

    def _chain(self, chain: Chain) -> Iterator[Change | Kept]:
        path, conv = chain[0]
        kind = type(conv)
        rest = chain[1:]
        norm: nn.Module | None = None
        activation: nn.Module | None = None
        if rest and kind in _NORMS and type(rest[0][1]) is _NORMS[kind]:
            norm = rest.pop(0)[1]
        if rest and _activation_of(rest[0][1]) is not None:
            activation = rest[0][1]
        taken = [module for module in (norm, activation) if module is not None]
        if kind not in _CONVOLUTIONS:
            if kind not in _CONVOLUTIONS.values() and len(chain) > 1 and isinstance(chain[1][1], _ABSORBABLE):
                yield Kept(path, kind.__name__, self.op, "a subclass, whose own forward a replacement would lose")
            return
        if not taken:
            return
        name = "-".join(type(module).__name__ for module in (conv, *taken))
        if any(_is_hooked(module) for module in (conv, *taken)):
            yield Kept(path, name, self.op, "a hook looks at one of them")
            return
        attributes = {_TAKEN_OVER: (norm, activation)}
        effect = "one operator; in training one saved tensor"
        yield Change(Replaced(path, name, self.op, effect), conv, _CONVOLUTIONS[kind], attributes)
        paths = [where for where, module in chain[1:] if any(module is other for other in taken)]
        for where, module in zip(paths, taken, strict=True):
            entry = Replaced(where, type(module).__name__, self.op, f"computed by {path or 'the convolution'}")
            yield Change(entry, module, _TAKEN[type(module)])
