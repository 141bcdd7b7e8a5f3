"""Hugging Face transformers: ``from_pretrained(..., quantization_config=PtKernelsConfig("int4_weight_only"))``.

    from ptkernels.integrations.transformers_quantizer import PtKernelsConfig

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=PtKernelsConfig("nf4"))
    model.save_pretrained(quantized_path)  # codes and scales, in safetensors
    model = AutoModelForCausalLM.from_pretrained(quantized_path)  # with this module imported

Every weight is quantized as soon as it is read, so a model never needs more memory than its quantized form and one
layer. Needs transformers >= 5. Importing this module makes the method known to transformers, which does not find it by
itself: a process that loads a stored model without it gets an error (see ``_MARKER``).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptkernels.nn import QuantizedLinear
from ptkernels.ops.quantized_matmul import quantize_weight
from ptkernels.ops.quantized_matmul.formats import SCHEMES
from ptkernels.ops.quantized_matmul.weight import check_group_size

__all__ = ["PtKernelsConfig"]

METHOD = "ptkernels"
# Elements of what is stored as every quantized layer's "weight", and not read here. Where the method is not known,
# transformers warns, makes float layers and would draw their missing weights at random, but for this: a weight of
# another shape is an error.
_MARKER = 1


@register_quantization_config(METHOD)
class PtKernelsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How ``from_pretrained`` quantizes the linear layers of a model.

    Args:
        scheme: see :func:`ptkernels.quantize_weight`; all but ``int8_static``, which needs a calibrated scale.
        group_size: columns that share a scale; default: the scheme's.
        symmetric: without zero points.
        modules_to_not_convert: names of layers to leave as they are. Default: the output embeddings, and whatever is
            tied to others or comes last. What was decided is stored with the model.
        **kwargs: what a stored configuration holds beside these.

    Raises:
        ValueError: the scheme is unknown or static, or the group size is none.

    Example:
        >>> from ptkernels.integrations.transformers_quantizer import PtKernelsConfig
        >>> PtKernelsConfig("nf4", group_size=32).to_dict()["scheme"]
        'nf4'
    """

    def __init__(
        self,
        scheme: str = "int8_dynamic",
        group_size: int | None = None,
        symmetric: bool = True,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        usable = [name for name, spec in SCHEMES.items() if not spec.is_static]
        if scheme not in usable:
            raise ValueError(f"PtKernelsConfig: scheme: got {scheme!r}, expected one of {', '.join(usable)}")
        if group_size is not None:
            check_group_size(group_size)
        self.quant_method = METHOD
        self.scheme = scheme
        self.group_size = group_size
        self.symmetric = symmetric
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(METHOD)
class PtKernelsQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads a model with a :class:`PtKernelsConfig`."""

    quantization_config: PtKernelsConfig

    @property
    def quantized_element_size(self) -> float:
        return SCHEMES[self.quantization_config.scheme].code.bits / 8

    @property
    def is_trainable(self) -> bool:
        """Adapters on the quantized layers are: the layers pass gradients on."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self._layers and not self.pre_quantized

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's state, and a marker for every quantized layer."""
        state: dict[str, Tensor] = model.state_dict()
        layers = [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]
        return {**state, **{f"{path}.weight": torch.zeros(_MARKER) for path in layers}}, {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        config.modules_to_not_convert = sorted(
            self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
        )
        # Not subclasses of Linear: their own forwards would be lost.
        self._layers = {
            path
            for path, module in model.named_modules()
            if type(module) is nn.Linear and should_convert_module(path, config.modules_to_not_convert)
        }
        if not self.pre_quantized:
            return
        names = (re.escape(path.removeprefix(f"{model.base_model_prefix}.")) for path in self._layers)
        model._keys_to_ignore_on_load_unexpected |= {rf"(^|\.){name}\.weight$" for name in names}
        for path in self._layers:
            linear = model.get_submodule(path)
            layer = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                config.scheme,
                config.group_size,
                bias=linear.bias is not None,
                symmetric=config.symmetric,
                device="meta",
                dtype=linear.weight.dtype,
            )
            model.set_submodule(path, layer)

    def get_quantize_ops(self) -> Any:
        return _Quantize(self.quantization_config)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, QuantizedLinear):
                linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(layer.weight.dequantize(dtype or torch.float32))
                linear.bias = layer.bias  # type: ignore[assignment]
                model.set_submodule(path, linear.train(layer.training))
        return model


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Puts a quantized layer in the place of the linear layer whose weight has just been read."""

    def __init__(self, config: PtKernelsConfig) -> None:
        self._config = config

    def convert(
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (read,) = input_dict.values()
        weight: Tensor = read[0] if isinstance(read, list) else read
        config = self._config
        path = full_layer_name.rpartition(".")[0]
        linear = model.get_submodule(path)
        quantized = quantize_weight(weight, config.scheme, config.group_size, symmetric=config.symmetric)
        layer = QuantizedLinear.from_weight(quantized).train(linear.training)
        layer.bias = linear.bias  # still to be read, perhaps
        layer._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(path, layer)
        missing_keys.discard(full_layer_name)
        return {}
