"""A model of ours against the same model made of torch's own modules and functions, with the same weights."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import ptkernels as ptk

ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
    norm: str = "batch",
    num_groups: int = 1,
    pre_activation: str = "none",
    transposed: bool = False,
    **convolution: Any,
) -> Tensor:
    plain, turned = (F.conv1d, F.conv2d, F.conv3d), (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    function: Any = (turned if transposed else plain)[input.dim() - 3]
    out = function(ACTIVATIONS[pre_activation](input), weight, bias, **convolution)
    if norm == "group":
        out = F.group_norm(out, num_groups, bn_weight, bn_bias, eps)
    elif norm == "instance":
        out = F.instance_norm(out, None, None, bn_weight, bn_bias, True, momentum, eps)
    elif training or running_mean is not None:
        out = F.batch_norm(out, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    out = out if residual is None else out + residual
    return F.leaky_relu(out, negative_slope) if activation == "leaky_relu" else ACTIVATIONS[activation](out)


def conv_transpose_bn_relu(*args: Any, **options: Any) -> Tensor:
    return conv_bn_relu(*args, transposed=True, **options)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **options: Any) -> Tensor:
    relative_bias = options.pop("relative_bias", None)
    assert options.pop("window", None) is None
    if relative_bias is not None:
        length, keys = query.size(-2), key.size(-2)
        bias = relative_bias[..., torch.arange(keys) - torch.arange(length)[:, None] + length - 1]
        attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None and options.get("is_causal"):  # torch takes one of them
        hidden = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool).triu(1)
        attn_mask, options = attn_mask.masked_fill(hidden, -torch.inf), {**options, "is_causal": False}
    return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **options)


@contextlib.contextmanager
def torch_functions() -> Iterator[None]:
    """Modules and models call torch where they would call our operators."""
    replaced = {
        ptk.conv_bn_relu: conv_bn_relu,
        ptk.conv_transpose_bn_relu: conv_transpose_bn_relu,
        ptk.attention: attention,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith(("ptkernels.nn", "ptkernels.models")):
                for ours, theirs in replaced.items():
                    if getattr(module, ours.__name__, None) is ours:
                        patch.setattr(module, ours.__name__, theirs)
        yield


class _WithLengths:
    """torch's recurrent layer, which takes lengths only as a packed sequence, none of them 0."""

    def forward(self, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(input, hx)  # type: ignore[misc]
        packed = pack_padded_sequence(input, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
        output, state = super().forward(packed, hx)  # type: ignore[misc]
        return pad_packed_sequence(output, batch_first=True, total_length=input.size(1))[0], state


class TorchLSTM(_WithLengths, nn.LSTM):
    pass


class TorchGRU(_WithLengths, nn.GRU):
    pass


_RECURRENT = {ptk.nn.LSTM: TorchLSTM, ptk.nn.GRU: TorchGRU}
_SUBCLASSES = {
    ptk.nn.MultiheadAttention: nn.MultiheadAttention,
    ptk.nn.LSTMCell: nn.LSTMCell,
    ptk.nn.GRUCell: nn.GRUCell,
    ptk.nn.RNNCell: nn.RNNCell,
}


def torch_modules(model: nn.Module) -> nn.Module:
    """A copy whose recurrent layers, cells and attention modules are torch's."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        if type(parent) in _SUBCLASSES:
            parent.__class__ = _SUBCLASSES[type(parent)]
        for name, child in list(parent.named_children()):
            if type(child) in _RECURRENT:
                names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
                theirs = _RECURRENT[type(child)](*(getattr(child, n) for n in names))
                theirs.load_state_dict(child.state_dict())
                setattr(parent, name, theirs.to(next(child.parameters()).dtype).train(child.training))
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            module.dropout = 0.0
    return model


def results(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, gradients of inputs and parameters, and buffers, after one forward and backward."""
    leaves = [
        x.detach().to(dtype).requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]
    out = model(*leaves)
    outs = [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]
    generator = torch.Generator().manual_seed(0)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(dtype)).sum() for o in outs)
    loss.backward()
    found = {f"output {index}": o.detach() for index, o in enumerate(outs)}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.grad is not None:
            found[f"gradient of input {index}"] = leaf.grad
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    found.update({f"buffer {name}": buffer for name, buffer in model.named_buffers()})
    return found


class _Kinks(TorchDispatchMode):
    """How near ReLU's arguments come to 0, and the two largest of a pooling window to each other, by their size.

    There the gradient jumps: what is left of it or right of it depends on the rounding of the layers before.
    """

    nearest = torch.inf

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, name = torch.ops.aten, func.overloadpacket
        gaps = None
        if name in (aten.relu, aten.relu_, aten.leaky_relu, aten.hardtanh):
            gaps = args[0].abs()
        elif name is aten.max_pool2d_with_indices:
            size = args[1]
            stride, padding = (*args[2:4], *(size, (0, 0))[len(args) - 2 :])[:2]
            x = F.pad(args[0], (padding[-1],) * 2 + (padding[0],) * 2, value=-torch.inf)
            windows = x.unfold(-2, size[0], stride[0]).unfold(-2, size[-1], stride[-1]).flatten(-2)
            largest, second = windows.topk(2).values.unbind(-1)
            gaps = largest - second
        if gaps is not None and gaps.any():  # exact zeros are zeros in every precision
            self.nearest = min(self.nearest, (gaps[gaps > 0].min() / args[0].abs().max()).item())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _away_from_kinks(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> nn.Module:
    """The model, its parameters changed by a thousandth until no gradient hangs on rounding."""
    doubles = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    for _ in range(50):
        exact = torch_modules(without_dropout(copy.deepcopy(model))).train(training).double()
        with torch_functions(), _Kinks() as kinks:
            exact(*doubles)
        if kinks.nearest > 3e-6:
            return model
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    raise AssertionError("every model drawn has an activation at a kink")


def assert_as_torch(model: nn.Module, *inputs: Any, factor: float = 3.0, tolerance: float = 1e-5) -> None:
    """In training and evaluation: as near to torch in float64 as torch in float32 is, give or take ``factor``."""
    for training in (True, False):
        model = _away_from_kinks(copy.deepcopy(model), inputs, training)
        ours = without_dropout(copy.deepcopy(model)).train(training)
        theirs = torch_modules(ours)
        exact = copy.deepcopy(theirs).double()
        actual = results(ours, inputs, torch.float32)
        with torch_functions():
            rough = results(theirs, inputs, torch.float32)
            expected = results(exact, inputs, torch.float64)
        assert actual.keys() == rough.keys() == expected.keys()
        for name, wanted in expected.items():
            error, bound = ((found[name].double() - wanted).abs().max() for found in (actual, rough))
            limit = factor * bound + tolerance * wanted.abs().max() + 1e-7
            assert error <= limit, f"training={training}: {name}: error {error}, limit {limit}"


def assert_state_round_trip(model: nn.Module, fresh: nn.Module, *inputs: Any) -> None:
    """Strictly loaded into a fresh model, the state gives the same bits."""
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        first, second = (m.eval()(*inputs) for m in (model, fresh))
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (first, second)), strict=True):
        assert torch.equal(a, b)
