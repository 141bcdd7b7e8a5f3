"""PEFT: LoRA adapters on this package's quantized layers.

    from ptkernels.integrations.peft import on_quantized

    model = get_peft_model(quantized_model, on_quantized(LoraConfig(target_modules=["q_proj", "v_proj"])))
    model.save_pretrained(path)  # the adapters alone
    config = on_quantized(LoraConfig.from_pretrained(path))
    model = PeftModel.from_pretrained(quantized_model, path, config=config)

The gradient of a layer's input is computed from the codes; no copy of a weight is decoded (QLoRA: Dettmers et al.,
2023). Adapters on layers that are not quantized are PEFT's own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ptkernels.nn import QuantizedLinear
from ptkernels.ops.quantized_matmul import QuantizedWeight, quantize_weight

__all__ = ["QuantizedLoraLinear", "on_quantized"]

# Those that start from the numbers of a float weight are not among them.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def on_quantized(config: LoraConfig) -> LoraConfig:
    """Let a configuration of PEFT's target :class:`ptkernels.nn.QuantizedLinear` too; returns the same object."""
    config._register_custom_module({QuantizedLinear: QuantizedLoraLinear})
    return config


class QuantizedLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's layer over a quantized one. Merging quantizes the sum again, unmerging brings the old codes back.

    Raises:
        ValueError: the configuration asks for a variant of LoRA, or a way to initialise it, that needs a float weight.
    """

    _unmerged: QuantizedWeight | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in _INITIALISATIONS:
            raise ValueError(
                f"QuantizedLoraLinear: init_lora_weights: got {config.init_lora_weights!r}, "
                f"expected one of {_INITIALISATIONS}"
            )
        super().__init__(base_layer, adapter_name, config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: QuantizedLinear) -> tuple[torch.device, torch.dtype | None]:
        return base_layer.codes.device, None if base_layer.bias is None else base_layer.bias.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, on the quantized weight.

        Raises:
            ValueError: with ``safe_merge``, the sum is not finite.
            RuntimeError: the adapter has a bias of its own.
        """
        base: QuantizedLinear = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.lora_A:
                continue
            if self.lora_bias[name]:
                raise RuntimeError(f"QuantizedLoraLinear: merge: got adapter {name!r} with a bias, expected none")
            old = base.weight
            merged = old.dequantize() + self.get_delta_weight(name).float()
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"QuantizedLoraLinear: merge: got adapter {name!r} with results that are not finite")
            self._unmerged = self._unmerged or old
            symmetric, step = old.zeros is None, old.input_scale
            base._hold(quantize_weight(merged, old.scheme, old.group_size, symmetric=symmetric, input_scale=step))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Bring back the codes from before the first merge, bit for bit."""
        if self._unmerged is not None:
            self.get_base_layer()._hold(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()
