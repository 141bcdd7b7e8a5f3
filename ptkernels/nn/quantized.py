"""Linear layers on quantized weights, and the rewriting of models to use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ptkernels.nn import torchscript
from ptkernels.ops.quantized_matmul import quantized_embedding, quantized_linear
from ptkernels.ops.quantized_matmul.formats import FORMAT_VERSION, SCHEMES, group_count
from ptkernels.ops.quantized_matmul.quantize import quantize_weight
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight, check_group_size

__all__ = ["LoRALinear", "QuantizedEmbedding", "QuantizedLinear", "quantize_"]

_KEPT_FLOAT32 = ("scales", "zeros", "input_scale")


def _register_tensors(module: nn.Module, weight: QuantizedWeight, *names: str) -> None:
    """Make the weight's tensors buffers of the module."""
    buffers = {name: getattr(weight, name) for name in names}
    buffers["format"] = weight.tensors()["format"].to(weight.device)
    # torch.export looks for a buffer by its place among all, and those that are None have none: they come last.
    for name in sorted(buffers, key=lambda name: buffers[name] is None):
        module.register_buffer(name, buffers[name])


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored in codes; usually made by :meth:`from_float` or :func:`quantize_`.

    Everything it stores are plain buffers and a bias parameter, so ``state_dict``, safetensors, ``torch.save``,
    ``deepcopy``, ``.to`` and ``torch.export`` work on it as on any module. Changing its dtype changes the bias only:
    codes have none, and scales stay float32.

    Args:
        in_features: ``K``, features of the input.
        out_features: ``N``, features of the output.
        scheme: see :func:`ptkernels.quantize_weight`.
        group_size: columns that share a scale; default: the scheme's.
        bias: whether there is a bias.
        symmetric: without zero points.
        activation: applied by the same kernel; see :func:`ptkernels.quantized_linear`.
        device: of the buffers.
        dtype: of the bias.

    Raises:
        ValueError: the scheme or a number is not one there is.

    Shape:
        ``[..., K]`` to ``[..., N]`` (``[..., N/2]`` with swiglu), in the dtype of the input.

    Example:
        >>> import torch, ptkernels as ptk
        >>> linear = torch.nn.Linear(128, 64)
        >>> layer = ptk.nn.QuantizedLinear.from_float(linear, "int4_weight_only", group_size=32)
        >>> layer
        QuantizedLinear(in_features=128, out_features=64, scheme=int4_weight_only, group_size=32, bias=True)
        >>> layer(torch.randn(2, 3, 128)).shape
        torch.Size([2, 3, 64])
        >>> sorted(layer.state_dict())
        ['bias', 'codes', 'format', 'scales']
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_scale: Tensor | None
    format: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str,
        group_size: int | None = None,
        *,
        bias: bool = True,
        symmetric: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scheme not in SCHEMES:
            raise ValueError(f"QuantizedLinear: scheme: got {scheme!r}, expected one of {', '.join(SCHEMES)}")
        spec = SCHEMES[scheme]
        group_size = spec.group_size if group_size is None else group_size
        check_group_size(group_size)
        groups = (out_features, group_count(in_features, group_size))
        codes = torch.zeros(out_features, spec.code.row_bytes(in_features), dtype=spec.code.dtype, device=device)
        scales = torch.zeros(groups, device=device, dtype=torch.float32)
        step = torch.ones(1, device=device, dtype=torch.float32) if spec.is_static else None
        zeros = None if symmetric else torch.zeros_like(scales)
        self._hold(QuantizedWeight(codes, scales, zeros, step, scheme, group_size, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.activation = activation

    def _hold(self, weight: QuantizedWeight) -> None:
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.scheme, self.group_size = weight.scheme, weight.group_size
        _register_tensors(self, weight, "codes", "scales", "zeros", "input_scale")

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, activation: str | None = None
    ) -> QuantizedLinear:
        """A layer that holds the tensors of ``weight``, and ``bias`` as a parameter."""
        layer = cls(0, 0, weight.scheme, weight.group_size, bias=False, activation=activation)
        layer._hold(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        scheme: str,
        group_size: int | None = None,
        *,
        symmetric: bool = True,
        input_scale: Tensor | float | None = None,
        activation: str | None = None,
    ) -> QuantizedLinear:
        """The quantized form of a linear layer; arguments as for :func:`ptkernels.quantize_weight`."""
        weight = quantize_weight(linear.weight, scheme, group_size, symmetric=symmetric, input_scale=input_scale)
        return cls.from_weight(weight, linear.bias, activation).train(linear.training)

    @property
    def weight(self) -> QuantizedWeight:
        """The quantized weight, sharing this layer's tensors."""
        return QuantizedWeight(
            self.codes, self.scales, self.zeros, self.input_scale, self.scheme, self.group_size, self.in_features
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return quantized_linear(x, self.weight, self.bias, residual=residual, activation=self.activation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        return _apply_but_float32(self, fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "format")
        expected = [FORMAT_VERSION, SCHEMES[self.scheme].number, self.group_size, self.in_features]
        if found is not None and found.tolist() != expected:
            errors = args[-1]
            errors.append(
                f"QuantizedLinear: {prefix}format: got {found.tolist()}, expected {expected} "
                "(version, scheme, group size, in features)"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"
        text += f", group_size={self.group_size}, bias={self.bias is not None}"
        return text if self.activation is None else f"{text}, activation={self.activation}"

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.QuantizedLinear(self)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices (Hu et al., LoRA, 2021).

        out = base(x) + alpha / rank * (x lora_a^T) lora_b^T

    On a :class:`QuantizedLinear` base this is QLoRA (Dettmers et al., 2023): the gradient of ``x`` is computed from the
    codes, and no copy of the weight is ever decoded. The base's parameters stop requiring grad.

    Args:
        base: an :class:`torch.nn.Linear`, or a :class:`QuantizedLinear` without an activation.
        rank: inner size of the two matrices, at least 1.
        alpha: scale of their product. Default: ``rank``, for a factor of 1.
        dropout: probability of dropping inputs of the two matrices in training.

    Raises:
        TypeError: the base is no such layer.
        ValueError: the rank is below 1, or the base has an activation.

    Example:
        >>> import torch, ptkernels as ptk
        >>> base = ptk.nn.QuantizedLinear.from_float(torch.nn.Linear(64, 32), "nf4")
        >>> layer = ptk.nn.LoRALinear(base, rank=4)
        >>> layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
        >>> [name for name, parameter in layer.named_parameters() if parameter.grad is not None]
        ['lora_a', 'lora_b']
    """

    def __init__(
        self, base: nn.Linear | QuantizedLinear, rank: int, alpha: float | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not isinstance(base, (nn.Linear, QuantizedLinear)):
            raise TypeError(f"LoRALinear: base: got {type(base).__name__}, expected Linear or QuantizedLinear")
        if rank < 1:
            raise ValueError(f"LoRALinear: rank: got {rank}, expected at least 1")
        if isinstance(base, QuantizedLinear) and base.activation is not None:
            raise ValueError(f"LoRALinear: base: got one with activation {base.activation!r}, expected none")
        self.base = base.requires_grad_(False)
        self.scale = 1.0 if alpha is None else alpha / rank
        self.dropout = nn.Dropout(dropout)
        like = base.weight if isinstance(base, nn.Linear) else base.scales if base.bias is None else base.bias
        self.lora_a = nn.Parameter(like.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(like.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.linear(self.dropout(x), self.lora_a) * self.scale
        update = nn.functional.linear(inner, self.lora_b)
        if isinstance(self.base, QuantizedLinear):
            return self.base(x, update)  # type: ignore[no-any-return]
        return self.base(x) + update  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.LoRALinear(self)


class QuantizedEmbedding(nn.Module):
    """An embedding table stored in codes: rows are decoded as they are looked up.

    Args:
        weight: the table ``[num_embeddings, embedding_dim]``, from :func:`ptkernels.quantize_weight`.
        dtype: of the result. Default: torch's default dtype.

    Shape:
        ``[...]`` int64 to ``[..., embedding_dim]``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> table = ptk.nn.QuantizedEmbedding.from_float(torch.nn.Embedding(100, 64), "int4_weight_only", 32)
        >>> table(torch.tensor([[3, 99]])).shape
        torch.Size([1, 2, 64])
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if weight.spec.quantizes_input or weight.experts is not None:
            raise ValueError(f"QuantizedEmbedding: weight: got {weight}, expected weights only, not stacked")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.scheme, self.group_size = weight.scheme, weight.group_size
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        _register_tensors(self, weight, "codes", "scales", "zeros")

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding, scheme: str = "int8_weight_only", group_size: int | None = None
    ) -> QuantizedEmbedding:
        """The quantized form of an embedding table; arguments as for :func:`ptkernels.quantize_weight`."""
        return cls(quantize_weight(embedding.weight, scheme, group_size), embedding.weight.dtype)

    @property
    def weight(self) -> QuantizedWeight:
        """The quantized table, sharing this module's tensors."""
        return QuantizedWeight(
            self.codes, self.scales, self.zeros, None, self.scheme, self.group_size, self.embedding_dim
        )

    def forward(self, input: Tensor) -> Tensor:
        return quantized_embedding(input, self.weight, dtype=self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        return _apply_but_float32(self, fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}, group_size={self.group_size}"

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.QuantizedEmbedding(self)


Module = TypeVar("Module", bound=nn.Module)


def _apply_but_float32(module: Module, fn: Callable[[Tensor], Tensor], recurse: bool) -> Module:
    """``_apply`` of a module whose scales and zero points stay float32."""
    kept = {name: getattr(module, name, None) for name in _KEPT_FLOAT32}
    nn.Module._apply(module, fn, recurse)
    for name, tensor in kept.items():
        if tensor is not None and getattr(module, name).dtype != torch.float32:
            setattr(module, name, tensor.to(module.codes.device))
    return module


def quantize_(
    model: nn.Module,
    scheme: str,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    input_scales: Mapping[str, Tensor | float] | None = None,
) -> list[str]:
    """Replace linear layers of a model by quantized ones, in place.

    Args:
        model: any module that has ``torch.nn.Linear`` layers (of exactly that class) somewhere below it.
        scheme: see :func:`ptkernels.quantize_weight`.
        filter: called with a layer's name and the layer; only those it returns True for are replaced. Default: all.
        group_size: columns that share a scale; default: the scheme's.
        symmetric: without zero points.
        input_scales: for ``int8_static``: the scale of every layer's input by the layer's name, from
            :func:`ptkernels.quantization.calibrate`; layers without one are left as they are.

    Returns:
        The names of the replaced layers. One layer under several names is replaced by one quantized layer.

    Raises:
        ValueError: the scheme is unknown, or static without ``input_scales``, or the model is itself a linear layer,
            which its parent would have to replace.

    Example:
        >>> import torch, ptkernels as ptk
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> ptk.nn.quantize_(model, "int8_dynamic", lambda name, layer: layer.out_features > 10)
        ['0']
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize_: scheme: got {scheme!r}, expected one of {', '.join(SCHEMES)}")
    static = SCHEMES[scheme].is_static
    if static != (input_scales is not None):
        got, expected = ("none", "some") if static else ("some", "none")
        raise ValueError(f"quantize_: input_scales: got {got}, expected {expected} with {scheme}")
    scales = {} if input_scales is None else input_scales

    def wanted(name: str, layer: nn.Linear) -> bool:
        return (not static or name in scales) and (filter is None or filter(name, layer))

    return replace_linears(
        model,
        nn.Linear,
        lambda name, layer: QuantizedLinear.from_float(
            layer, scheme, group_size, symmetric=symmetric, input_scale=scales.get(name)
        ),
        wanted,
        "quantize_",
    )


Linear = TypeVar("Linear", bound=nn.Linear)


def replace_linears(
    model: nn.Module,
    kind: type[Linear],
    make: Callable[[str, Linear], nn.Module],
    filter: Callable[[str, Linear], bool] | None = None,
    caller: str = "replace_linears",
) -> list[str]:
    """Replace layers of exactly one class below a model, each by what ``make(name, layer)`` gives; their names.

    One layer under several names is replaced by one module.
    """
    if type(model) is kind:
        raise ValueError(f"{caller}: model: got a {kind.__name__}, expected a module that contains some")
    replaced: list[str] = []
    done: dict[nn.Module, nn.Module] = {}
    for parent_name, parent in list(model.named_modules()):
        # named_children would hide second names.
        for child_name, child in list(parent._modules.items()):
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if type(child) is not kind or (filter is not None and not filter(name, child)):
                continue
            if child not in done:
                done[child] = make(name, child)
            setattr(parent, child_name, done[child])
            replaced.append(name)
    return replaced
