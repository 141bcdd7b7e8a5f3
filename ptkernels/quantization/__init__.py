"""Everything around quantized layers: calibration, better rounding, training through rounding, others' checkpoints."""

from __future__ import annotations

from ptkernels.quantization.checkpoints import from_awq, from_gguf, from_gptq
from ptkernels.quantization.observers import MinMaxObserver, MSEObserver, PercentileObserver, calibrate
from ptkernels.quantization.qat import FakeQuantizedLinear, convert_, fake_quantize, fake_quantize_surrogate, prepare_
from ptkernels.quantization.rounding import gptq, hqq
from ptkernels.quantization.sensitivity import LayerSensitivity, sensitivity
from ptkernels.quantization.smoothing import awq_scales, fold_scales, smoothquant_scales

__all__ = [
    "FakeQuantizedLinear",
    "LayerSensitivity",
    "MSEObserver",
    "MinMaxObserver",
    "PercentileObserver",
    "awq_scales",
    "calibrate",
    "convert_",
    "fake_quantize",
    "fake_quantize_surrogate",
    "fold_scales",
    "from_awq",
    "from_gguf",
    "from_gptq",
    "gptq",
    "hqq",
    "prepare_",
    "sensitivity",
    "smoothquant_scales",
]
