"""Is a changed model still the same function? Its outputs and gradients against the original's in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptkernels._replace.report import Verified

_FACTOR = 3.0
_ULPS = 64.0
# Of the largest gradient, or output: some are differences of equal numbers of that size, such as those of key biases.
_INTERNAL_ULPS = 8.0
# Of a gradient's size: no original's error excuses a larger one elsewhere.
_LARGEST_SHARE = 0.01
_ROUNDINGS = 8


def call(model: nn.Module, inputs: Any) -> Any:
    """What the model makes of an example: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _quiet(model: nn.Module) -> nn.Module:
    """Evaluation mode, where nothing is drawn at random, except for modules that normalise by the batch."""
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "track_running_stats")]
    model.eval()
    for module, training in modes:
        module.training = training
    return model


@torch.no_grad()
def _rounded(model: nn.Module, seed: int) -> nn.Module:
    """With every parameter changed by as much as rounding it may have changed it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            share = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameter.mul_((1 + torch.finfo(parameter.dtype).eps * share).to(parameter))
    return model


def _results(
    model: nn.Module, inputs: Any, dtype: torch.dtype | None = None, rounding: int | None = None
) -> dict[str, Tensor]:
    """Outputs, and gradients of inputs and parameters, by name."""
    model = _quiet(copy.deepcopy(model))
    if dtype is not None:
        model = model.to(dtype)
    if rounding is not None:
        model = _rounded(model, rounding)
    leaves, spec = pytree.tree_flatten(inputs)
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() if _floating(leaf) else leaf for leaf in leaves]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        returned = call(model, pytree.tree_unflatten(leaves, spec))
    outputs = [leaf for leaf in pytree.tree_leaves(returned) if _floating(leaf)]
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [torch.ones_like(output) for output in differentiable])
    named = [(f"gradient of input {index}", leaf) for index, leaf in enumerate(leaves) if _floating(leaf)]
    named += [(f"gradient of {name}", parameter) for name, parameter in model.named_parameters()]
    results.update({name: tensor.grad for name, tensor in named if tensor.grad is not None})
    return results


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _error(got: Tensor, exact: Tensor) -> float:
    return _largest(got.double() - exact)


def compare(before: nn.Module, after: nn.Module, inputs: Any) -> list[Verified]:
    """Both models on the same inputs; errors of ``after`` may be three times those of ``before``, and a little more.

    Relative to its size, an error may be three times the largest that ``before`` has among all outputs, or among all
    gradients: where a rounding error turns a ReLU off, a few gradients jump, in the one model here and in the other
    there. Where ``after`` alone is out of bounds, ``before`` runs again with parameters rounded otherwise, for the
    errors that it might have had.
    """
    exact = _results(before, inputs, torch.float64)
    old, new = _results(before, inputs), _results(after, inputs)
    eps = {name: torch.finfo(tensor.dtype).eps for name, tensor in old.items()}
    errors = {name: _error(old[name], expected) for name, expected in exact.items()}
    verified = _judged(exact, new, errors, eps)
    for rounding in range(_ROUNDINGS):
        if all(item.holds for item in verified) or new.keys() != exact.keys():
            break
        for name, result in _results(before, inputs, rounding=rounding).items():
            errors[name] = max(errors[name], _error(result, exact[name]))
        verified = _judged(exact, new, errors, eps)
    return verified


def _judged(
    exact: dict[str, Tensor], new: dict[str, Tensor], errors: dict[str, float], eps: dict[str, float]
) -> list[Verified]:
    """By the errors of the original, and the machine's, of each result."""
    largest: dict[str, float] = {}
    relative: dict[str, float] = {}
    for name, expected in exact.items():
        kind, size = name.split()[0], _largest(expected)
        largest[kind] = max(largest.get(kind, 0.0), size)
        # Not of those that are differences of equal numbers: relative to such a size, all errors are large.
        share = errors[name] / size if size > _INTERNAL_ULPS * eps[name] * largest[kind] else 0.0
        relative[kind] = max(relative.get(kind, 0.0), min(share, _LARGEST_SHARE))
    verified = []
    for name, expected in exact.items():
        kind, size = name.split()[0], _largest(expected)
        slack = eps[name] * (_ULPS * size + _INTERNAL_ULPS * largest[kind])
        bound = _FACTOR * max(errors[name], relative[kind] * size) + slack
        error = _error(new[name], expected) if name in new else float("inf")
        verified.append(Verified(name, error, errors[name], bound))
    return verified
