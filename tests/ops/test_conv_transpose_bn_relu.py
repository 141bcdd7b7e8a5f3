"""What conv_transpose_bn_relu alone must do: any geometry, phases that share packed weights, modules, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ptkernels as ptk
import ptkernels.nn
from ptkernels.errors import FallbackError
from ptkernels.ops.conv_transpose_bn_relu.spec import SPEC, composition

FUNCTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def unfused(block: Any) -> nn.Sequential:
    """torch's own modules with the same parameters."""
    return nn.Sequential(*(copy.deepcopy(child) for child in (block.conv, block.bn, block.act)))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    """Value and gradients against torch's own in float64, over sizes and options at random."""
    draw = data.draw
    dims = draw(st.integers(1, 3), "dimensions")
    groups = draw(st.sampled_from([1, 1, 2, 3]), "groups")
    ins, outs = (groups * draw(st.integers(1, 9), name) for name in ("in", "out"))
    if draw(st.booleans(), "depthwise"):
        outs = groups = ins
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(2))
    more = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    space = [draw(st.integers(1, 5)) for _ in range(dims)]
    reached = [
        (n - 1) * s + d * (k - 1) + 1 + o for n, s, d, k, o in zip(space, stride, dilation, kernel, more, strict=True)
    ]
    padding = [draw(st.integers(0, min(3, (size - 1) // 2))) for size in reached]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99), "seed"))
    x = torch.randn(2, ins, *space, generator=generator, dtype=torch.float64)
    weight = torch.randn(ins, outs // groups, *kernel, generator=generator, dtype=torch.float64)
    if draw(st.booleans(), "channels last"):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "output_padding": more, "dilation": dilation}
    results = []
    for function in (ptk.conv_transpose_bn_relu, FUNCTIONS[dims]):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        activation = {"activation": "tanh"} if function is ptk.conv_transpose_bn_relu else {}
        y = function(*inputs, groups=groups, **options, **activation)
        y = y if activation else torch.tanh(y)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_of_one_geometry_are_not_taken_for_another(dtype: torch.dtype) -> None:
    """What inference keeps of equal weights: which taps are whose depends on stride, padding and dilation."""
    x, weight = torch.randn(2, 8, 6, 7).to(dtype), torch.randn(8, 8, 4, 4).to(dtype)
    geometries: list[dict[str, Any]] = [
        *({"stride": s, "padding": p} for s in (1, 2, 3, (1, 2), (2, 1)) for p in (0, 1, 2)),
        {"stride": 2, "dilation": 2},
        {"stride": 2, "output_padding": 1},
        {"stride": 4},
    ]
    expected = [composition(x.double(), weight.double(), activation="none", **options) for options in geometries]
    for _ in range(4):  # packed, kept, found
        for options, exact in zip(geometries, expected, strict=True):
            y = ptk.conv_transpose_bn_relu(x, weight, activation="none", **options)
            error = torch.finfo(dtype).eps * exact.abs().max().item()
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=16 * error, msg=str(options))
        forward = ptk.conv_bn_relu(x, weight, activation="none", padding=1)
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        torch.testing.assert_close(
            forward.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps * exact.abs().max()
        )


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_winograd(layout: torch.memory_format) -> None:
    """A transposed convolution of stride 1 is one with its taps turned round."""
    x, weight = torch.randn(2, 24, 12, 13).contiguous(memory_format=layout), torch.randn(24, 20, 3, 3) / 15
    assert ptk.explain(ptk.conv_transpose_bn_relu, x, weight, padding=1).kernel.endswith("winograd_f2x2_3x3")
    exact = composition(x.double(), weight.double(), padding=1, training=True)
    y, peer = (f(x, weight, padding=1, training=True) for f in (ptk.conv_transpose_bn_relu, composition))
    bound = SPEC.tolerances.bound(
        peer_error=(peer - exact).abs().max().item(),
        magnitude=exact.abs().max().item(),
        dtype=torch.float32,
        gradient=False,
    )
    assert (y - exact).abs().max().item() <= bound


def test_explain() -> None:
    x = torch.randn(1, 8, 9, 9)
    for weight, groups, stride, kernel in (
        (torch.randn(8, 4, 3, 3), 1, 2, "implicit_gemm"),
        (torch.randn(8, 4, 1, 1), 1, 1, "pointwise"),
        (torch.randn(8, 1, 3, 3), 8, 2, "depthwise"),
    ):
        account = ptk.explain(ptk.conv_transpose_bn_relu, x, weight, groups=groups, stride=stride)
        assert account.kernel.endswith(kernel)
        assert "modulo the stride" in account.reason


@pytest.mark.usefixtures("strict")
def test_strict_refuses_the_reference_in_the_name_of_the_function() -> None:
    x, weight = torch.randn(1, 2, 4), torch.randn(2, 2, 3)
    with pytest.raises(FallbackError, match=r"^conv_transpose_bn_relu: .*forward-mode"):
        torch.func.jvp(lambda t: ptk.conv_transpose_bn_relu(t, weight), (x,), (x,))


def test_saved_for_backward_is_the_input_and_the_convolution() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    weight = torch.randn(8, 8, 1, 1, requires_grad=True)
    for recompute, tensors in ((False, 2), (True, 1)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            ptk.conv_transpose_bn_relu(x, weight, training=True, recompute=recompute)
        assert len({tensor.data_ptr() for tensor in saved if tensor.numel() == x.numel()}) == tensors


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_modules_are_torchs_with_their_state(dims: int, training: bool) -> None:
    kind = getattr(ptkernels.nn, f"ConvTransposeBNReLU{dims}d")
    block = kind(4, 6, 3, 2, 1, 1, 2, True, activation="silu").double().train(training)
    block.bn.running_mean.normal_()
    peer = unfused(block)
    x = torch.randn(3, 4, *(5, 4, 3)[:dims], dtype=torch.float64)
    residual = torch.randn(peer[0](x).shape, dtype=torch.float64)
    block(x, residual).sin().sum().backward()
    peer[2](peer[1](peer[0](x)) + residual).sin().sum().backward()
    for (name, ours), expected in zip(block.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, buffer in peer[1].named_buffers():
        torch.testing.assert_close(getattr(block.bn, name), buffer)
    other = kind(4, 6, 3, 2, 1, 1, 2, True).double()
    other.load_unfused(peer)
    names = {"conv": "0", "bn": "1"}
    for name, value in other.state_dict().items():
        child, _, rest = name.partition(".")
        assert torch.equal(value, peer.state_dict()[f"{names[child]}.{rest}"]), name


def test_output_size() -> None:
    block = ptkernels.nn.ConvTransposeBNReLU2d(4, 6, 3, stride=3, padding=1).eval()
    x = torch.randn(2, 4, 5, 6)
    sizes = [(13, 16), (14, 18), (15, 17)]
    for size in sizes:
        expected = F.relu(block.bn(block.conv(x, output_size=list(size))))
        torch.testing.assert_close(block(x, output_size=list(size)), expected)
    with pytest.raises(ValueError, match="output size"):
        block(x, output_size=[16, 16])


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_module_with_another_normalisation(norm: str) -> None:
    groups = {"num_groups": 3} if norm == "group" else {}
    block = ptkernels.nn.ConvTransposeBNReLU2d(4, 6, 4, 2, 1, norm=norm, pre_activation="relu", **groups).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), unfused(block)(F.relu(x)))
    assert type(block.bn) is {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "group": nn.GroupNorm}[norm]


@pytest.mark.parametrize("training", [True, False])
def test_replace_finds_the_blocks_of_a_generator(training: bool) -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(5, 8, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True),
        nn.ConvTranspose2d(4, 2, 4, 2, 1), nn.Tanh(),
    ).double().train(training)  # fmt: skip
    plain = copy.deepcopy(model)
    report = ptk.replace(model, ops="conv_bn_relu")
    assert [entry.path for entry in report.replaced] == ["0", "3", "6"]
    noise = torch.randn(3, 5, 1, 1, dtype=torch.float64)
    for ours, expected in ((model(noise), plain(noise)), (model(noise[:2]), plain(noise[:2]))):
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(y.square().sum(), m.parameters()) for y, m in ((ours, model), (expected, plain))]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_replace_adds_a_residual_of_a_transposed_convolution() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 2, 2)
            self.norm = nn.GroupNorm(2, 6)

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return torch.relu(self.norm(self.up(x)) + skip)

    model = Up()
    x, skip = torch.randn(2, 4, 5, 6), torch.randn(2, 6, 10, 12)
    expected, broadcast = model(x, skip), model(x, skip[:1])
    assert len(ptk.replace(model, ops="conv_bn_relu").replaced) == 1
    torch.testing.assert_close(model(x, skip), expected)
    torch.testing.assert_close(model(x, skip[:1]), broadcast)


def t(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options)


def good() -> dict[str, Any]:
    return {"input": t(2, 4, 5, 6), "weight": t(4, 8, 3, 3), "bias": t(8), "stride": 2}


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("input None", {"input": None}, TypeError, "input: got .*NoneType, expected torch.Tensor"),
    ("weight of a convolution", {"weight": t(8, 4, 3, 3)}, ValueError, "weight: got 8 input channels, expected .* 4"),
    ("groups", {"groups": 3}, ValueError, "groups: got 3, expected a divisor of input's 4 channels"),
    ("bias length", {"bias": t(4)}, ValueError, r"bias: got shape \[4\], expected \[8\]"),
    ("bias in groups", {"groups": 2}, ValueError, r"bias: got shape \[8\], expected \[16\]"),
    ("output_padding", {"output_padding": 2}, ValueError, r"output_padding: got \[2, 2\], expected numbers below"),
    ("output_padding negative", {"output_padding": -1}, ValueError, "output_padding: got .* expected numbers"),
    ("output_padding float", {"output_padding": 0.5}, TypeError, "output_padding: got 0.5, expected an int or 2 ints"),
    ("output_padding three", {"output_padding": (0, 0, 1)}, ValueError, "output_padding: got 3 numbers"),
    ("padding", {"padding": 6}, ValueError, "padding: got .*, which leaves nothing of a result of size 11"),
    ("padding word", {"padding": "same"}, TypeError, "padding: got 'same', expected an int or 2 ints"),
    ("no positions", {"input": t(2, 4, 0, 6)}, ValueError, "input: got shape .*, expected at least one position"),
    ("residual", {"residual": t(2, 8, 5, 6)}, ValueError, r"residual: got shape .*, expected \[2, 8, 11, 13\]"),
    ("norm", {"norm": "layer"}, ValueError, "norm: got 'layer', expected one of batch, instance, group"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_call(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (ptk.conv_transpose_bn_relu, lambda **kwargs: ptk.explain("conv_transpose_bn_relu", **kwargs)):
        with pytest.raises(error, match=f"^conv_transpose_bn_relu: {message}"):
            function(**{**good(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transposed": True, "output_padding": [2, 0]}, "output_padding"),
        ({"transposed": True, "output_padding": [0]}, "output_padding"),
        ({"transposed": True}, "output_padding"),
        ({"transposed": True, "output_padding": [0, 0], "padding": [6, 0]}, "padding"),
        ({"transposed": True, "output_padding": [0, 0], "weight": t(3, 8, 3, 3)}, "weight"),
        ({"transposed": True, "output_padding": [0, 0], "groups": 3}, "weight"),
        ({"transposed": True, "output_padding": [0, 0], "num_groups": 3}, "num_groups"),
        ({"transposed": True, "output_padding": [0, 0], "num_groups": -2}, "num_groups"),
        ({"transposed": True, "output_padding": [0, 0], "pre_activation": "swish"}, "pre_activation"),
        ({"output_padding": [0, 0], "weight": t(8, 4, 3, 3)}, "output_padding"),
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any], message: str) -> None:
    plain = dict.fromkeys(("bn_weight", "bn_bias", "running_mean", "running_var", "residual"))
    options = {"training": False, "eps": 1e-5, "padding": [0, 0], "dilation": [1, 1], "groups": 1, "stride": [2, 2]}
    arguments = {**good(), **plain, **options, **changes}
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"conv_bn_relu: {message}: got"):
        torch.ops.ptkernels.conv_bn_relu(**arguments)
