"""Modules on quantized weights: storage, training, rewriting of models."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import ptkernels as ptk
from ptkernels.nn import LoRALinear, QuantizedEmbedding, QuantizedLinear, quantize_


def layer(scheme: str = "int4_weight_only", **options: object) -> QuantizedLinear:
    return QuantizedLinear.from_float(nn.Linear(64, 24), scheme, 32, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_weight_only", "int8_static"])
def test_layers_survive_storage(scheme: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    options = {"input_scale": 0.02} if scheme == "int8_static" else {}
    made, x = layer(scheme, **options), torch.randn(5, 64)
    expected = made(x)
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    safetensors.save_file(made.state_dict(), tmp_path / "layer.safetensors")
    for state in (torch.load(buffer, weights_only=True), safetensors.load_file(tmp_path / "layer.safetensors")):
        empty = QuantizedLinear(64, 24, scheme, 32)
        empty.load_state_dict(state)
        assert torch.equal(empty(x), expected)
    assert torch.equal(copy.deepcopy(made)(x), expected)
    on_meta = QuantizedLinear(64, 24, scheme, 32, device="meta")
    on_meta.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(on_meta(x), expected)


def test_other_formats_do_not_load() -> None:
    with pytest.raises(RuntimeError, match=r"format: got \[1, 4, 32, 64\], expected \[1, 7, 32, 64\]"):
        QuantizedLinear(64, 24, "nf4", 32).load_state_dict(layer().state_dict())


def test_scales_stay_float32() -> None:
    made, x = layer(), torch.randn(5, 64).bfloat16()
    scales = made.scales.clone()
    for cast in (made.bfloat16(), made.half(), made.float(), made.to(torch.bfloat16)):
        assert torch.equal(cast.scales, scales)
    assert made.bias is not None
    assert made.bias.dtype == torch.bfloat16
    assert made(x).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_weight_only"])
def test_compile_and_export(scheme: str) -> None:
    model, x = nn.Sequential(layer(scheme), nn.ReLU(), nn.Linear(24, 3)), torch.randn(5, 64)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x), expected)
    assert program.module()(torch.randn(9, 64)).shape == (9, 3)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_layer_by_itself(strict: bool) -> None:
    """Where the exported module is the layer, some of whose buffers are None."""
    index = torch.randint(0, 24, (3, 5))
    embedding = QuantizedEmbedding.from_float(nn.Embedding(24, 64), "int8_weight_only")
    for module, x in ((layer("int8_weight_only"), torch.randn(5, 64)), (embedding, index)):
        assert None in module._buffers.values()
        program = torch.export.export(module, (x,), strict=strict)
        assert torch.equal(program.module()(x), module(x))


def test_lora_trains_on_codes() -> None:
    """A low-rank change of the weight is learned through the quantized layer below it, which stays as it is."""
    below, base = layer("nf4"), QuantizedLinear.from_float(nn.Linear(24, 16), "int8_weight_only")
    head = LoRALinear(base, rank=2, alpha=4)
    x = torch.randn(256, 64)
    hidden = below(x).detach()
    target = base(hidden) + hidden @ torch.randn(24, 1) @ torch.randn(1, 16)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    optimizer = torch.optim.Adam((p for p in head.parameters() if p.requires_grad), 0.03)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(head(below(x)), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert [name for name, p in head.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]


def test_lora_starts_at_its_base() -> None:
    for base in (nn.Linear(32, 8), layer()):
        x = torch.randn(3, base.in_features, requires_grad=True)
        head = LoRALinear(base, 4)
        assert torch.equal(head(x), base(x))
        actual = torch.autograd.grad(head(x).sum(), x)[0]
        torch.testing.assert_close(actual, torch.autograd.grad(base(x).sum(), x)[0])


def test_lora_errors() -> None:
    with pytest.raises(TypeError, match="LoRALinear: base: got ReLU"):
        LoRALinear(nn.ReLU(), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LoRALinear: rank: got 0"):
        LoRALinear(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="LoRALinear: base: got one with activation 'relu'"):
        LoRALinear(layer(activation="relu"), 2)


def test_models_are_rewritten_in_place() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "head": nn.Linear(32, 5)})
    names = quantize_(model, "int8_dynamic", lambda name, linear: name != "head")
    assert names == ["a.0", "a.2"]
    block = model["a"]
    assert isinstance(block, nn.Sequential)
    assert block[0] is block[2]
    assert isinstance(block[0], QuantizedLinear)
    assert type(model["head"]) is nn.Linear
    with pytest.raises(ValueError, match="quantize_: model: got a Linear"):
        quantize_(nn.Linear(2, 2), "int8_dynamic")
    with pytest.raises(ValueError, match="quantize_: scheme: got 'int1'"):
        quantize_(model, "int1")
    with pytest.raises(ValueError, match="quantize_: input_scales: got none, expected some"):
        quantize_(model, "int8_static")


def test_memory_of_a_layer() -> None:
    linear = nn.Linear(1024, 1024, bias=False)
    sizes = {s: QuantizedLinear.from_float(linear, s).weight.nbytes for s in ("int8_dynamic", "int4_weight_only")}
    assert sizes["int8_dynamic"] < 0.26 * linear.weight.nbytes
    assert sizes["int4_weight_only"] < 0.14 * linear.weight.nbytes
    assert ptk.quantize_weight(linear.weight, "mxfp4").nbytes < 0.16 * linear.weight.nbytes
