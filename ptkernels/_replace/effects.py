"""What a replacement is to save, predicted by counting bytes while the example runs; no clock is read.

Two figures for every changed module, before and after. *Moved* is what operators are given and give back in a forward
pass: each argument and each result once, views and fresh empty memory not at all. What happens within an operator, such
as packing, or a matrix of scores that is read twice, is not seen. *Kept* is what the pass keeps for its backward,
parameters and buffers left out. A module's figures leave out those of changed modules within it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ptkernels._registry import Explanation, get
from ptkernels._replace.report import Predicted
from ptkernels._replace.verify import call

_FRESH = ("aten::empty", "aten::new_empty")
# What they write to is not read before.
_OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_", "aten::bernoulli_")


@dataclass
class Counted:
    """What happened within one changed module."""

    moved: int = 0
    kept: int = 0
    kernels: dict[str, None] = field(default_factory=dict)
    """Those of this package that ran, in order."""


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, *_: Any) -> Explanation:
    visible = None if mask is None or mask.shape[-2:] != (query.size(-2), key.size(-2)) else mask
    return get("attention").explain(query, key, value, visible, 0.0, causal, enable_gqa=True)


def _conv_bn_relu(*args: Any) -> Explanation:
    from ptkernels.ops.conv_bn_relu import routing
    from ptkernels.ops.conv_bn_relu.variant import complete_forward

    args = complete_forward(args)
    return routing.account((*args[:16], *args[17:]))


def _packed_rnn(*args: Any) -> Explanation:
    from ptkernels.ops.packed_rnn import routing

    return routing.explain_layer("packed_rnn", args[:9])


def _quantized_linear(*args: Any) -> Explanation:
    from ptkernels.ops.quantized_matmul.formats import SCHEMES
    from ptkernels.ops.quantized_matmul.library import LinearArguments
    from ptkernels.ops.quantized_matmul.weight import QuantizedWeight

    given = LinearArguments(*args)
    x, codes, scales, zeros = given[:4]
    found = ((spec.code.name, spec.quantizes_input, spec.is_static) for spec in SCHEMES.values())
    scheme = dict(zip(found, SCHEMES, strict=True))[given.code_format, given.quantize_input, False]
    weight = QuantizedWeight(codes, scales, zeros, None, scheme, given.group_size, x.size(-1))
    return get("quantized_matmul").explain(x, weight, given.bias)


_EXPLAIN: dict[str, Callable[..., Explanation]] = {
    "ptkernels::attention": _attention,
    "ptkernels::conv_bn_relu": _conv_bn_relu,
    "ptkernels::packed_rnn": _packed_rnn,
    "ptkernels::quantized_linear": _quantized_linear,
}


def _nbytes(tensor: Tensor) -> int:
    """Of its elements, those that it repeats by a stride of 0 once."""
    if tensor.is_nested:
        tensor = tensor.values()
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _moved(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: Any) -> int:
    name = function.name()
    if function.is_view or name.startswith(_FRESH):
        return 0
    written = {
        id(value)
        for value, argument in zip(args, function._schema.arguments, strict=False)
        if isinstance(value, Tensor) and argument.is_write
    }
    given = list(_tensors((args, kwargs)))
    storages = {tensor.untyped_storage().data_ptr() for tensor in given if tensor.layout == torch.strided}
    # A result in the memory of an argument that is not written to is a view, whatever the operator calls itself.
    made = [
        result
        for result in _tensors(results)
        if id(result) in written
        or result.layout != torch.strided
        or result.untyped_storage().data_ptr() not in storages
    ]
    if not made and not written:
        return 0
    read = [tensor for tensor in given if id(tensor) not in written or not name.startswith(_OVERWRITE)]
    return sum(map(_nbytes, read)) + sum(map(_nbytes, made))


class _Counter(TorchDispatchMode):
    """Counts what happens, to the innermost changed module that is running."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: dict[str | None, Counted] = {None: Counted()}
        self._running: list[str | None] = [None]
        self._kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is given to two
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        for path in paths:
            self.counted[path] = Counted()
            module = model.get_submodule(path)
            module.register_forward_pre_hook(lambda *_, path=path: self._running.append(path))
            module.register_forward_hook(lambda *_: self._running.pop() and None, always_call=True)

    @property
    def _here(self) -> Counted:
        return self.counted[self._running[-1]]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        here = self._here
        here.moved += _moved(func, args, kwargs or {}, results)
        if (explain := _EXPLAIN.get(func.name())) is not None:
            # Arguments that end a call and are at their defaults do not come along.
            account = explain(*args, *(argument.default_value for argument in func._schema.arguments[len(args) :]))
            here.kernels[f"{account.op}: {account.kernel}"] = None
        return results

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.data_ptr() not in self._kept:
            self._kept[storage.data_ptr()] = storage
            self._here.kept += storage.nbytes()
        return tensor


def count(model: nn.Module, inputs: Any, paths: Iterable[str] = ()) -> dict[str | None, Counted]:
    """Run a copy of the model, in its modes, and count by changed module; None is whatever lies outside of them."""
    model = copy.deepcopy(model)
    counter = _Counter(model, paths)
    hooks = torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), hooks, counter:
        results = call(model, inputs)
    del results
    return counter.counted


def predict(before: nn.Module, after: nn.Module, inputs: Any, paths: Iterable[str]) -> list[Predicted]:
    """For every changed module, and for everything around them where there is anything."""
    paths = list(dict.fromkeys(paths))
    old, new = count(before, inputs, paths), count(after, inputs, paths)
    return [
        Predicted(path, tuple(new[path].kernels), old[path].moved, new[path].moved, old[path].kept, new[path].kept)
        for path in (*paths, None)
        if old[path].moved or new[path].moved
    ]
