"""Statistics of every image and activations before a convolution, as torch's modules have them and beyond."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ptkernels as ptk
import ptkernels.nn
from ptkernels.ops.conv_bn_relu import routing
from ptkernels.ops.conv_bn_relu.reference import ACTIVATIONS
from ptkernels.ops.conv_bn_relu.spec import composition
from ptkernels.ops.conv_bn_relu.variant import PLAIN

CORNERS = {"relu", "relu6", "leaky_relu", "hardswish"}


def unfused(block: Any) -> nn.Sequential:
    """torch's own modules with the same parameters."""
    return nn.Sequential(*(copy.deepcopy(child) for child in (block.conv, block.bn, block.act)))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Value and gradients against the reference, over sizes and options at random."""
    draw = data.draw
    dims = draw(st.integers(1, 3), "dimensions")
    num_groups = draw(st.integers(1, 4), "normalised groups")
    outs = num_groups * draw(st.integers(1, 6), "channels of one")
    ins = draw(st.integers(1, 9), "in")
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    space = [size + draw(st.integers(1, 9)) for size in kernel]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99), "seed"))
    x = torch.randn(draw(st.integers(1, 3), "batch"), ins, *space, generator=generator, dtype=torch.float64)
    if draw(st.booleans(), "channels last"):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = torch.randn(outs, ins, *kernel, generator=generator, dtype=torch.float64)
    vectors = torch.randn(3, outs, generator=generator, dtype=torch.float64)
    smooth = sorted(set(ACTIVATIONS) - CORNERS)
    options: dict[str, Any] = {"pre_activation": draw(st.sampled_from(smooth)), "recompute": draw(st.booleans())}
    options |= {"activation": draw(st.sampled_from(smooth))}
    options |= draw(st.sampled_from([{"norm": "instance"}, {"norm": "group", "num_groups": num_groups}]))
    results = []
    for function in (ptk.conv_bn_relu, ptk.reference.conv_bn_relu):
        inputs = [t.clone().requires_grad_() for t in (x, weight, *vectors)]
        y = function(*inputs, **options)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_modules_are_torchs_with_their_state(dims: int, norm: str, training: bool, affine: bool) -> None:
    kind = getattr(ptkernels.nn, f"ConvBNReLU{dims}d")
    options = {"norm": norm, "affine": affine, "bias": True, "activation": "silu"}
    options |= {"num_groups": 3} if norm == "group" else {}
    block = kind(4, 6, 2, **options).double().train(training)
    peer = unfused(block)
    x = torch.randn(3, 4, *(5, 4, 3)[:dims], dtype=torch.float64)
    residual = torch.randn(peer[0](x).shape, dtype=torch.float64)
    y, expected = block(x, residual), peer[2](peer[1](peer[0](x)) + residual)
    torch.testing.assert_close(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    for (name, ours), theirs in zip(block.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    other = kind(4, 6, 2, **options).double()
    other.load_unfused(peer)
    assert all(map(torch.equal, other.state_dict().values(), block.state_dict().values()))


@pytest.mark.parametrize("options", [{"norm": "instance"}, {"norm": "group", "num_groups": 4}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_a_mean_of_ten_thousand_deviations(options: dict[str, Any], layout: torch.memory_format) -> None:
    x = (torch.randn(4, 16, 30, 21, dtype=torch.float64) + 1e4).float().contiguous(memory_format=layout)
    weight = torch.eye(16).view(16, 16, 1, 1)  # what is normalised is what was given, to the bit
    y = ptk.conv_bn_relu(x, weight, activation="none", **options)
    groups = options.get("num_groups", 16)
    exact = F.group_norm(x.double(), groups)
    # What is left is the rounding of the mean to float32, half a unit of it in deviations.
    assert (y - exact).abs().max() <= 1.1 * torch.finfo(torch.float32).eps * 1e4
    spread = y.reshape(4, groups, -1).var(
        2, correction=0
    )  # squares of numbers of that size would have lost the variance
    torch.testing.assert_close(spread, torch.ones(4, groups), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shift", [1.0, 100.0])
def test_a_group_whose_channels_have_means_of_their_own(shift: float) -> None:
    """What the channels of a group differ by is part of its variance."""
    x = torch.randn(2, 8, 12, 13) + shift * torch.arange(8.0).view(1, 8, 1, 1)
    weight = torch.eye(8).view(8, 8, 1, 1)
    y, peer = (f(x, weight, activation="none", norm="group", num_groups=2) for f in (ptk.conv_bn_relu, composition))
    exact = F.group_norm(x.double(), 2)
    assert (y - exact).abs().max() <= 2 * (peer - exact).abs().max() + 1e-6


def test_an_image_does_not_see_the_others() -> None:
    x, weight = torch.randn(5, 6, 9, 7), torch.randn(8, 6, 3, 3)
    y = ptk.conv_bn_relu(x, weight, norm="group", num_groups=4)
    changed = x.clone()
    changed[2] *= 7
    again = ptk.conv_bn_relu(changed, weight, norm="group", num_groups=4)
    same = [torch.equal(*pair) for pair in zip(y, again, strict=True)]
    assert same == [True, True, False, True, True]
    alone = torch.cat([ptk.conv_bn_relu(image[None], weight, norm="group", num_groups=4) for image in x])
    torch.testing.assert_close(alone, y)


@pytest.mark.parametrize(("options", "is_removed"), [
    ({"norm": "instance"}, True),
    ({"norm": "group", "num_groups": 6}, True),
    ({"norm": "group", "num_groups": 3}, False),
    ({"norm": "group", "num_groups": 1}, False),
])  # fmt: skip
def test_gradient_of_a_bias(options: dict[str, Any], is_removed: bool) -> None:
    """Statistics of a channel take a bias away, exactly; those of more channels do not."""
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 6, 6), (6, 4, 3, 3), (6,)))
    grads = []
    for function in (ptk.conv_bn_relu, composition):
        leaf = bias.clone().requires_grad_()
        y = function(x, weight, leaf, activation="silu", **options)
        grads += torch.autograd.grad(y.sin().sum(), leaf)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)
    assert torch.equal(grads[0], torch.zeros_like(bias)) == is_removed


def test_groups_of_one_value_as_torch_has_them() -> None:
    x, weight = torch.randn(3, 4, 1, 1), torch.randn(6, 4, 1, 1)
    gamma, beta = torch.randn(6), torch.randn(6)
    options: dict[str, Any] = {"norm": "group", "num_groups": 6, "activation": "none"}
    y = ptk.conv_bn_relu(x, weight, None, gamma, beta, **options)
    assert torch.equal(y, beta.view(1, 6, 1, 1).expand_as(y))
    torch.testing.assert_close(y, composition(x, weight, None, gamma, beta, **options), rtol=0, atol=1e-3)
    for bad in ({"norm": "group", "num_groups": 6}, {"norm": "instance"}):
        with pytest.raises(ValueError, match=r"^conv_bn_relu: input: .*more than one value per mean and variance"):
            ptk.conv_bn_relu(x[:1], weight, **bad)
        with pytest.raises(ValueError, match="Expected more than 1"):
            composition(x[:1], weight, **bad)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_activation_before(activation: str, layout: torch.memory_format) -> None:
    """Value and all gradients; the padding is zero behind the activation, and not activated itself."""
    generator = torch.Generator().manual_seed(3)
    x = (3 * torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64)).contiguous(memory_format=layout)
    weight = torch.randn(4, 5, 3, 3, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {"pre_activation": activation, "padding": 1, "activation": "none", "negative_slope": 0.2}
    results = []
    for function in (ptk.conv_bn_relu, composition):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = function(*inputs, **options)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_saved_for_backward_is_the_input_as_given() -> None:
    x, weight = torch.randn(4, 8, 16, 16, requires_grad=True), torch.randn(8, 8, 1, 1, requires_grad=True)
    for recompute, tensors in ((False, 2), (True, 1)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            ptk.conv_bn_relu(x, weight, norm="group", num_groups=2, pre_activation="relu", recompute=recompute)
        large = {tensor.data_ptr() for tensor in saved if tensor.numel() == x.numel()}
        assert x.data_ptr() in large
        assert len(large) == tensors


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_relu_conv_bn(dims: int) -> None:
    kind = getattr(ptkernels.nn, f"ReLUConvBN{dims}d")
    block = kind(4, 6, 2, affine=False).double()
    peer = nn.Sequential(nn.ReLU(), copy.deepcopy(block.conv), copy.deepcopy(block.bn))
    x = torch.randn(3, 4, *(6, 5, 4)[:dims], dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(block(x), peer(x))
    torch.testing.assert_close(block.bn.running_var, peer[2].running_var)
    block.eval()
    torch.testing.assert_close(block(x), peer.eval()(x))
    other = kind(4, 6, 2, affine=False).double()
    other.load_unfused(peer)
    assert all(map(torch.equal, other.state_dict().values(), peer.state_dict().values()))


def test_leaky_relu_before() -> None:
    block = ptkernels.nn.ReLUConvBN2d(3, 4, 3, pre_activation="leaky_relu", negative_slope=0.3).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(block(x), block.bn(block.conv(F.leaky_relu(x, 0.3))))


@pytest.mark.parametrize("name", ["group", "instance", "before", "transposed"])
def test_modules_compile_export_and_script(name: str) -> None:
    blocks: dict[str, nn.Module] = {
        "group": ptkernels.nn.ConvBNReLU2d(3, 6, 3, norm="group", num_groups=2),
        "instance": ptkernels.nn.ConvBNReLU2d(3, 6, 3, norm="instance", affine=False),
        "before": ptkernels.nn.ReLUConvBN2d(3, 6, 3),
        "transposed": ptkernels.nn.ConvTransposeBNReLU2d(3, 6, 3, 2, bias=True, norm=False),
    }
    block = blocks[name].eval()
    x = torch.randn(2, 3, 8, 8)
    expected = block(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(block, (x,)).module()(x), expected)
    assert torch.equal(torch.jit.script(block)(x), expected)


def test_per_sample_gradients_under_group_norm() -> None:
    """As differentially private training takes them: vmap of grad is one call, and each its own."""
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    weight, gamma = torch.randn(6, 3, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def loss(weight: Tensor, gamma: Tensor, image: Tensor) -> Tensor:
        y = ptk.conv_bn_relu(image[None], weight, None, gamma, norm="group", num_groups=3, activation="silu")
        return y.square().sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, None, 0))(weight, gamma, x)
    for index, image in enumerate(x):
        single = torch.func.grad(loss, argnums=(0, 1))(weight, gamma, image)
        for many, one in zip(found, single, strict=True):
            torch.testing.assert_close(many[index], one)


def test_replace_finds_group_and_instance_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.SiLU(),
        nn.Conv2d(6, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU(),
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    expected = copy.deepcopy(model)(x)
    report = ptk.replace(model, ops="conv_bn_relu")
    assert [entry.path for entry in report.replaced] == ["0", "3"]
    torch.testing.assert_close(model(x), expected)


def test_triton_kernels_say_what_they_have_not() -> None:
    assert routing.uncovered_by_triton(PLAIN) is None
    lacking: list[dict[str, Any]] = [{"transposed": True}, {"num_groups": -1}]
    reasons = [routing.uncovered_by_triton(PLAIN._replace(**fields)) for fields in lacking]
    assert reasons == [
        "the Triton kernels have no transposed convolutions",
        "the Triton kernels have no statistics of every image",
    ]


def good() -> dict[str, Any]:
    return {"input": torch.randn(2, 4, 6, 6), "weight": torch.randn(8, 4, 3, 3)}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"norm": "layer"}, ValueError, "norm: got 'layer', expected one of batch, instance, group"),
    ({"norm": None}, TypeError, "norm: got NoneType, expected str"),
    ({"norm": "group"}, TypeError, "num_groups: got None, expected an int with norm='group'"),
    ({"norm": "group", "num_groups": 2.0}, TypeError, "num_groups: got 2.0, expected an int"),
    ({"norm": "group", "num_groups": True}, TypeError, "num_groups: got True, expected an int"),
    ({"norm": "group", "num_groups": 0}, ValueError, "num_groups: got 0, expected at least 1"),
    ({"norm": "group", "num_groups": 3}, ValueError, "num_groups: got 3, expected a divisor of the result's 8"),
    ({"norm": "instance", "num_groups": 2}, ValueError, "num_groups: got 2, expected None with norm='instance'"),
    ({"num_groups": 2}, ValueError, "num_groups: got 2, expected None with norm='batch'"),
    ({"pre_activation": "swish"}, ValueError, "pre_activation: got 'swish', expected one of none, relu"),
    ({"pre_activation": None}, TypeError, "pre_activation: got NoneType, expected str"),
    (
        {"norm": "instance", "running_mean": torch.zeros(8), "running_var": torch.ones(8)},
        ValueError,
        "running_mean: got a tensor, expected None where every image has its own statistics",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_bad_call(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (ptk.conv_bn_relu, lambda **kwargs: ptk.explain("conv_bn_relu", **kwargs)):
        with pytest.raises(error, match=f"^conv_bn_relu: {message}"):
            function(**{**good(), **changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "group"}, "num_groups: got None, expected an int"),
        ({"norm": "instance", "num_groups": 2}, "num_groups: got 2, expected None"),
        ({"norm": "layer"}, "norm: got 'layer', expected True or 'batch'"),
        ({"pre_activation": "swish"}, "pre_activation: got 'swish', expected one of none"),
    ],
)
def test_modules_name_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ConvBNReLU2d: {message}"):
        ptkernels.nn.ConvBNReLU2d(3, 4, 3, **options)


def test_running_statistics_of_instances_are_refused() -> None:
    block = ptkernels.nn.ConvBNReLU2d(3, 4, 3, norm="instance")
    block.bn = nn.InstanceNorm2d(4, track_running_stats=True)
    with pytest.raises(ValueError, match="InstanceNorm2d: track_running_stats: got True"):
        block(torch.randn(2, 3, 8, 8))
