"""Drop-in modules over the operators, with constructors, parameters and state_dict of their torch.nn originals."""

from __future__ import annotations

from ptkernels.nn.quantized import LoRALinear, QuantizedLinear, quantize_

__all__ = ["LoRALinear", "QuantizedLinear", "quantize_"]
