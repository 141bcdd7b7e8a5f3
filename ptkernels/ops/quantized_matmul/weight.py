"""A quantized weight: plain tensors and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptkernels.ops.quantized_matmul.formats import (
    FORMAT_VERSION,
    SCHEMES,
    SCHEMES_BY_NUMBER,
    Scheme,
    dequantize,
    group_count,
)

OP = "quantized_linear"


@dataclass(eq=False, repr=False)
class QuantizedWeight:
    """A weight ``[N, K]`` of a linear layer in quantized form, made by :func:`ptkernels.quantize_weight`.

    It is a container of plain tensors and no tensor itself, so everything that stores or moves tensors works on it:
    :meth:`tensors` and :meth:`from_tensors` for ``state_dict`` and safetensors, :meth:`to`, ``copy.deepcopy``,
    pickling, ``torch.save`` and ``torch.load(weights_only=True)``, and, as a pytree, ``torch.compile`` and
    ``torch.export``.

    Args:
        codes: ``[N, bytes of a row]``, int8 for 8-bit integers and uint8 otherwise, a row's codes in the order of ``K``
            from the lowest bits of its first byte on.
        scales: ``[N, groups]``, float32.
        zeros: like ``scales``, subtracted from what a code stands for; None for 0.
        input_scale: ``[1]``, float32: the calibrated scale of the input for ``int8_static``; else None.
        scheme: the name of the scheme.
        group_size: columns that share a scale; -1 for a whole row.
        in_features: ``K``.
        experts: number of weights stacked along ``N``, one for each expert; None for a single weight.

    Example:
        >>> import torch, ptkernels as ptk
        >>> weight = torch.linspace(-1, 1, 64).view(2, 32)
        >>> quantized = ptk.quantize_weight(weight, "int4_weight_only", group_size=32)
        >>> quantized
        QuantizedWeight(int4_weight_only, 2x32, group_size=32, 5.0 bits per weight)
        >>> bool((quantized.dequantize() - weight).abs().max() < 0.08)
        True
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_scale: Tensor | None
    scheme: str
    group_size: int
    in_features: int
    experts: int | None = None

    @property
    def spec(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def out_features(self) -> int:
        return self.codes.size(0) // max(self.experts or 1, 1)

    @property
    def shape(self) -> torch.Size:
        single = (self.out_features, self.in_features)
        return torch.Size(single if self.experts is None else (self.experts, *single))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        found = (self.codes, self.scales, self.zeros, self.input_scale)
        return sum(tensor.nbytes for tensor in found if tensor is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]`` (or ``[E, N, K]``) that the codes stand for, exact in float64."""
        weight = dequantize(
            self.codes, self.scales, self.zeros, self.spec.code.name, self.group_size, self.in_features, dtype
        )
        return weight.view(self.shape)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device; the tensors keep their dtypes."""
        move = {
            name: None if tensor is None else tensor.to(device)
            for name, tensor in (
                ("codes", self.codes),
                ("scales", self.scales),
                ("zeros", self.zeros),
                ("input_scale", self.input_scale),
            )
        }
        return QuantizedWeight(
            **move,  # type: ignore[arg-type]
            scheme=self.scheme,
            group_size=self.group_size,
            in_features=self.in_features,
            experts=self.experts,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything there is to store, by name: the tensors, and ``format``, integers that describe them: version,
        number of the scheme, group size, ``K`` and, for stacked weights, how many."""
        numbers = [FORMAT_VERSION, self.spec.number, self.group_size, self.in_features]
        described = torch.tensor(numbers if self.experts is None else [*numbers, self.experts])
        found = {
            "codes": self.codes,
            "scales": self.scales,
            "zeros": self.zeros,
            "input_scale": self.input_scale,
            "format": described,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The weight that :meth:`tensors` stored.

        Raises:
            ValueError: a tensor is missing, or they are of a version, scheme or shape that this release does not know.
        """
        missing = {"codes", "scales", "format"} - set(tensors)
        if missing:
            raise ValueError(f"QuantizedWeight: tensors: got none called {', '.join(sorted(missing))}")
        version, number, group_size, in_features, *experts = tensors["format"].tolist()
        if version != FORMAT_VERSION:
            raise ValueError(f"QuantizedWeight: format: got version {version}, expected {FORMAT_VERSION}")
        if number not in SCHEMES_BY_NUMBER:
            raise ValueError(
                f"QuantizedWeight: format: got scheme {number}, expected one of {sorted(SCHEMES_BY_NUMBER)}"
            )
        weight = cls(
            tensors["codes"],
            tensors["scales"],
            tensors.get("zeros"),
            tensors.get("input_scale"),
            SCHEMES_BY_NUMBER[number].name,
            group_size,
            in_features,
            *experts,
        )
        check_weight(weight)
        return weight

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(self.codes.size(0) * self.in_features, 1)
        size = "x".join(map(str, self.shape))
        return f"QuantizedWeight({self.scheme}, {size}, group_size={self.group_size}, {bits:.1f} bits per weight)"


torch.export.register_dataclass(QuantizedWeight, serialized_type_name="ptkernels.QuantizedWeight")
torch.serialization.add_safe_globals([QuantizedWeight])


def _check_part(name: str, tensor: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{OP}: qweight.{name}: got {type(tensor).__name__}, expected torch.Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{OP}: qweight.{name}: got dtype {_name(tensor.dtype)}, expected {_name(dtype)}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{OP}: qweight.{name}: got shape {list(tensor.shape)}, expected {list(shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_weight(weight: Any) -> None:
    """Raise the precise error for what is inconsistent about a quantized weight."""
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{OP}: qweight: got {type(weight).__name__}, expected QuantizedWeight (see quantize_weight)")
    if weight.scheme not in SCHEMES:
        raise ValueError(f"{OP}: qweight.scheme: got {weight.scheme!r}, expected one of {', '.join(SCHEMES)}")
    spec = weight.spec
    check_group_size(weight.group_size)
    if weight.codes.dim() != 2:
        raise ValueError(f"{OP}: qweight.codes: got {weight.codes.dim()} dimensions, expected 2")
    rows = weight.codes.size(0)
    if weight.experts is not None and (weight.experts < 1 or rows % weight.experts != 0):
        raise ValueError(f"{OP}: qweight.experts: got {weight.experts} for {rows} rows, expected a divisor")
    groups = (rows, group_count(weight.in_features, weight.group_size))
    _check_part("codes", weight.codes, spec.code.dtype, (rows, spec.code.row_bytes(weight.in_features)))
    _check_part("scales", weight.scales, torch.float32, groups)
    if weight.zeros is not None:
        _check_part("zeros", weight.zeros, torch.float32, groups)
    if weight.input_scale is not None:
        _check_part("input_scale", weight.input_scale, torch.float32, (1,))
    if spec.is_static != (weight.input_scale is not None):
        got = "none" if weight.input_scale is None else "one"
        raise ValueError(f"{OP}: qweight.input_scale: got {got} with scheme {spec.name}")


def check_group_size(group_size: Any) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"{OP}: group_size: got {type(group_size).__name__}, expected int")
    if group_size != -1 and (group_size <= 0 or group_size % 16 != 0):
        raise ValueError(f"{OP}: group_size: got {group_size}, expected -1 or a positive multiple of 16")
