"""What replace() leaves as it was, for every operator: what optimizers, checkpoints, hooks and callers hold on to."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ptkernels as ptk


class Tied(nn.Module):
    """Two layers of one weight, as an embedding and its output layer have it, around what is replaced."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(features, features), body, nn.Linear(features, features)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, x)


class Caller(nn.Module):
    """Calls torch's attention in a helper of its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2)

    def attend(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = nn.LSTM(8, 8, 2, batch_first=True), nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        states = self.lstm(x)[0]
        return states + self.cell(states[:, -1])[:, None]


class Convolution(nn.Module):
    """One to three dimensions over the same tokens; the third adds a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.conv, self.bn = nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x.transpose(1, 2))[..., None])
        volume = F.relu(self.bn(self.conv(x[..., None])) + x[..., None])
        return volume.flatten(2).transpose(1, 2)


BODIES: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "transformer": (Seq2Seq, "attention", 5),
    "caller": (Caller, "attention", 1),
    "recurrent": (Recurrent, "packed_rnn", 2),
    "convolution": (Convolution, "conv_bn_relu", 3),
}
each = pytest.mark.parametrize("name", BODIES)


def made(name: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    make, op, _ = BODIES[name]
    return Tied(make(), 8), op


def tokens(**options: Any) -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).to(**options)


def held(model: nn.Module) -> list[Any]:
    """Objects by name, and what is known of each: tied ones come under both names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    found: list[Any] = [(n, id(t), t.dtype, t.device, t.stride(), t.requires_grad) for n, t in tensors]
    found += [(name, id(module), module.training) for name, module in model.named_modules()]
    return [*found, *model.state_dict()]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_objects_names_modes_dtypes_and_layouts(name: str, dtype: torch.dtype) -> None:
    model, op = made(name)
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    for module in list(model.modules())[::2]:
        module.training = False
    before, x = held(model), tokens(dtype=dtype)
    expected = model(x)
    report = ptk.replace(model, op)
    assert len(report.replaced) == BODIES[name][2]
    assert held(model) == before
    out = model(x)
    assert (out.dtype, out.stride()) == (expected.dtype, expected.stride())
    assert ptk.replace(model, op).replaced == []
    report.undo()
    assert held(model) == before
    assert torch.equal(model(x), expected)


@each
def test_another_device(name: str) -> None:
    """The meta device stands for those that are not here."""
    model, op = made(name)
    model.to("meta")
    x = tokens(device="meta")
    shape = model(x).shape
    before = held(model)
    ptk.replace(model, op)
    assert held(model) == before
    assert (model(x).shape, model(x).device) == (shape, x.device)


@each
def test_an_optimizer_made_before_trains_tied_weights(name: str) -> None:
    plain, op = made(name)
    plain.double()
    model = copy.deepcopy(plain)
    assert model.last.weight is model.first.weight
    optimizers = [torch.optim.SGD(one.parameters(), 0.1, momentum=0.5) for one in (plain, model)]
    ptk.replace(model, op)
    for _ in range(2):
        for one, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            one(tokens(dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    for (key, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


@each
def test_hooks_and_checkpoints(name: str) -> None:
    model, op = made(name)
    plain = copy.deepcopy(model).eval()
    seen: list[str] = []
    model.body.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.body.register_forward_hook(lambda *_: seen.append("after"))
    model.body.register_full_backward_hook(lambda *_: seen.append("backward"))
    ptk.replace(model, op)
    model(tokens()).sum().backward()
    assert seen == ["before", "after", "backward"]
    state = {key: tensor * 0.5 for key, tensor in model.state_dict().items()}
    for one in (model, plain):
        one.load_state_dict(state, strict=True)
    torch.testing.assert_close(model.eval()(tokens()), plain(tokens()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_with_every_mask(norm_first: bool, training: bool) -> None:
    """Causal flags with and without a mask to go with them, padding of both sides, a mask of the memory."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    model = nn.Transformer(8, 2, 2, 2, 16, **options).train(training)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    inputs = {
        "src": torch.randn(2, 5, 8),
        "tgt": torch.randn(2, 4, 8),
        "tgt_mask": causal,
        "memory_mask": torch.ones(4, 5, dtype=torch.bool).triu(3),
        "src_key_padding_mask": padding,
        "tgt_key_padding_mask": torch.zeros(2, 4, dtype=torch.bool),
        "memory_key_padding_mask": padding,
        "tgt_is_causal": True,
    }
    report = ptk.replace(model, verify=True, example_inputs=inputs)
    layers = [item.path for item in report.replaced if item.path.startswith("decoder")]
    assert layers == [f"decoder.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "multihead_attn")]
    without_hint = model(**{**inputs, "tgt_is_causal": None})
    torch.testing.assert_close(model(**inputs), without_hint)
    decoder = copy.deepcopy(model.decoder)
    memory = model.encoder(inputs["src"])
    expected = decoder(inputs["tgt"], memory, tgt_mask=causal)
    report.undo()
    torch.testing.assert_close(model.decoder(inputs["tgt"], memory, tgt_mask=causal), expected)


@pytest.mark.parametrize("enable_nested_tensor", [False, True])
def test_encoders_fast_path_in_evaluation(enable_nested_tensor: bool) -> None:
    """torch's fused inference call is left, with and without its nested tensors, for the same result."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor).eval()
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        ptk.replace(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], expected[~padding])


def test_convolutions_of_every_dimension() -> None:
    model = Convolution()
    report = ptk.replace(model, "conv_bn_relu", verify=True, example_inputs=tokens())
    assert [(item.path, item.module) for item in report.replaced] == [
        ("conv", "Conv3d-BatchNorm3d-add-relu"),
        ("one.0", "Conv1d-BatchNorm1d-ReLU"),
        ("two.0", "Conv2d-BatchNorm2d-SiLU"),
    ]


class ByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x)


def test_a_caller_that_no_patch_reaches_is_said() -> None:
    report = ptk.replace(nn.Sequential(ByName()))
    assert report.replaced == []
    assert [(item.path, item.reason) for item in report.kept] == [
        ("0", "has imported scaled_dot_product_attention by name: call it as F.scaled_dot_product_attention")
    ]


class Both(nn.Module):
    """A convolution with its activation and attention within one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).unsqueeze(1)
        return F.scaled_dot_product_attention(y, y, y)


def test_a_forward_is_exchanged_once() -> None:
    for first, second in (("attention", "conv_bn_relu"), ("conv_bn_relu", "attention")):
        model = Both()
        report = ptk.replace(model, (first, second), verify=True, example_inputs=torch.randn(2, 8, 5))
        assert [item.op for item in report.replaced] == [first]
        assert [(item.op, item.reason) for item in report.kept] == [(second, "its forward has been exchanged already")]


def test_threads_enter_and_leave_the_patch_in_any_order() -> None:
    """The first one out leaves the others inside; the last one out puts torch's function back."""
    original = F.scaled_dot_product_attention
    inside, out = threading.Event(), threading.Event()
    found: list[object] = []

    def other() -> None:
        with ptk.patch_sdpa():
            inside.set()
            out.wait(10)
            found.append(F.scaled_dot_product_attention)

    thread = threading.Thread(target=other)
    with ptk.patch_sdpa():
        thread.start()
        assert inside.wait(10)
    assert F.scaled_dot_product_attention is ptk.attention
    out.set()
    thread.join()
    assert found == [ptk.attention]
    assert F.scaled_dot_product_attention is original
