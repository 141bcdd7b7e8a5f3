"""What conv_bn_relu alone must do: batch normalisation as torch's, every activation, layouts, modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ptkernels as ptk
import ptkernels.nn
from ptkernels.errors import FallbackError
from ptkernels.ops.conv_bn_relu.reference import ACTIVATIONS
from ptkernels.ops.conv_bn_relu.spec import SPEC, composition

ACTS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.01),
    "relu6": nn.ReLU6(),
    "elu": nn.ELU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


def unfused(block: Any) -> nn.Sequential:
    """torch's own modules with the same parameters."""
    return nn.Sequential(*(copy.deepcopy(child) for child in (block.conv, block.bn, block.act)))


def test_every_activation_is_tested() -> None:
    assert set(ACTS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTS)
def test_activation_over_its_whole_range(activation: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 1999), torch.tensor([-200.0, 0.0, 200.0])]).to(dtype)
    x = x.view(1, 1, -1).requires_grad_()
    y = ptk.conv_bn_relu(x, torch.ones(1, 1, 1, dtype=dtype), activation=activation)
    wide = x.detach().double().requires_grad_()
    expected = ACTS[activation](wide)
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=eps)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("activation", ACTS)
def test_nan_stays_nan(activation: str) -> None:
    x = torch.tensor([[[torch.nan, 1.0, torch.nan]]])
    y = ptk.conv_bn_relu(x, torch.ones(1, 1, 1), activation=activation)
    assert y.isnan().tolist() == [[[True, False, True]]]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    """Value and gradients against float64 convolutions of torch, over sizes and options at random."""
    draw = data.draw
    dims = draw(st.integers(1, 3), "dimensions")
    groups = draw(st.sampled_from([1, 1, 2, 3]), "groups")
    ins, outs = (groups * draw(st.integers(1, 9), name) for name in ("in", "out"))
    if draw(st.booleans(), "depthwise"):
        outs = groups = ins
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(2))
    padding = [draw(st.integers(0, 3)) for _ in range(dims)]
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    space = [draw(st.integers(size, size + 6)) for size in least]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99), "seed"))
    batch = draw(st.sampled_from([1, 2, 9]), "batch")
    x = torch.randn(batch, ins, *space, generator=generator, dtype=torch.float64)
    weight = torch.randn(outs, ins // groups, *kernel, generator=generator, dtype=torch.float64)
    if draw(st.booleans(), "channels last"):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    activation = draw(st.sampled_from(sorted(set(ACTS) - {"relu", "relu6", "leaky_relu", "hardswish"})))
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    training = draw(st.booleans(), "training")
    convolved = ptk.conv_bn_relu(x, weight, activation="none", **options)
    if convolved[:, 0].numel() < 2:
        training = False
    results = []
    for function in (ptk.conv_bn_relu, ptk.reference.conv_bn_relu):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = function(*inputs, training=training, activation=activation, **options)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_statistics_as_torch_keeps_them(momentum: float | None, affine: bool, tracks: bool) -> None:
    block = ptkernels.nn.ConvBNReLU2d(
        3, 5, 3, bias=True, momentum=momentum, affine=affine, track_running_stats=tracks
    ).double()
    peer = unfused(block)
    for step in range(4):
        x = torch.randn(4, 3, 6, 7, dtype=torch.float64) * (step + 1) + step
        torch.testing.assert_close(block(x), peer(x))
        for name, buffer in peer[1].named_buffers():
            torch.testing.assert_close(getattr(block.bn, name), buffer)
    block.eval()
    peer.eval()
    torch.testing.assert_close(block(x), peer(x))
    block.bn.train()  # as in models that freeze some of their children
    peer[1].train()
    torch.testing.assert_close(block(x), peer(x))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_every_parameter_as_torch_has_them(training: bool) -> None:
    block = ptkernels.nn.ConvBNReLU2d(4, 6, 3, padding=1, bias=True, activation="silu").double().train(training)
    block.bn.running_mean.normal_()
    peer = unfused(block)
    x, residual = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 6, 5, 5, dtype=torch.float64)
    block(x, residual).sin().sum().backward()
    peer[2](peer[1](peer[0](x)) + residual).sin().sum().backward()
    for (name, ours), expected in zip(block.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    if training:
        assert torch.equal(block.conv.bias.grad, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_of_a_mean_of_ten_thousand_deviations(layout: str) -> None:
    x = (torch.randn(8, 16, 20, 20, dtype=torch.float64) + 1e4).float()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    weight = torch.eye(16).view(16, 16, 1, 1)  # what is normalised is what was given, to the bit
    y = ptk.conv_bn_relu(x, weight, training=True, activation="none")
    expected = F.batch_norm(x.double(), None, None, training=True)
    # What is left is the rounding of the mean to float32, which torch's result has too.
    assert (y - expected).abs().max() <= 2 * (F.batch_norm(x, None, None, training=True) - expected).abs().max()
    spread = y.var((0, 2, 3), correction=0)  # squares of numbers of that size would have lost the variance
    torch.testing.assert_close(spread, torch.ones(16), rtol=1e-4, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_updates_statistics_once(use_reentrant: bool) -> None:
    block = ptkernels.nn.ConvBNReLU1d(2, 3, 3)
    once = copy.deepcopy(block)
    x = torch.randn(4, 2, 9, requires_grad=True)
    once(x)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert block.bn.num_batches_tracked == 1
    assert torch.equal(block.bn.running_mean, once.bn.running_mean)
    assert torch.equal(block.bn.running_var, once.bn.running_var)


def test_compiled_module_trains_as_the_eager_one() -> None:
    torch._dynamo.reset()
    block = ptkernels.nn.ConvBNReLU2d(3, 4, 3)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        ours, expected = compiled(x), eager(x)
        assert torch.equal(ours, expected)
        ours.sum().backward()
        expected.sum().backward()
    assert torch.equal(block.bn.running_var, eager.bn.running_var)
    assert block.bn.num_batches_tracked == 2
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(block.parameters(), eager.parameters(), strict=True))


def test_saved_for_backward_is_the_input_and_the_convolution() -> None:
    x, weight = torch.randn(4, 8, 16, 16, requires_grad=True), torch.randn(8, 8, 1, 1, requires_grad=True)
    for recompute, tensors in ((False, 2), (True, 1)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            ptk.conv_bn_relu(x, weight, training=True, recompute=recompute)
        large = {tensor.data_ptr() for tensor in saved if tensor.numel() == x.numel()}
        assert len(large) == tensors


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "groups", "kernel"), [((6, 9), 1, 3), ((6, 9), 1, 1), ((6, 6), 6, 5)])
def test_a_convolution_alone_keeps_its_input_only(
    channels: tuple[int, int], groups: int, kernel: int, layout: torch.memory_format
) -> None:
    """Its gradients, that of the bias among them, need nothing else, and are those of torch."""
    ins, outs = channels
    x = torch.randn(3, ins, 15, 14, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(outs, ins // groups, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(outs, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ptk.conv_bn_relu(x, weight, bias, activation="none", padding=kernel // 2, groups=groups)
    assert {tensor.data_ptr() for tensor in saved if tensor.dim() == 4 and tensor.size(0) == 3} == {x.data_ptr()}
    expected = torch.nn.functional.conv2d(x, weight, bias, padding=kernel // 2, groups=groups)
    grad = torch.randn_like(y)
    for wanted in ((x, weight, bias), (bias,), (weight,)):
        ours, theirs = (torch.autograd.grad(out, wanted, grad, retain_graph=True) for out in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_recompute_gives_the_same_bits() -> None:
    x, weight = torch.randn(4, 8, 9, 9), torch.randn(8, 8, 3, 3)
    grads = []
    for recompute in (False, True):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = ptk.conv_bn_relu(*inputs, training=True, recompute=recompute)
        grads.append(torch.autograd.grad(y.sin().sum(), inputs))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_memory_format_goes_through(groups: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 6, 7).to(dtype)
    weight = torch.randn(4, 4 // groups, 3, 3).to(dtype)
    last = x.to(memory_format=torch.channels_last)
    y, y_last = (ptk.conv_bn_relu(t, weight, groups=groups, padding=1) for t in (x, last))
    assert y.is_contiguous()
    assert y_last.is_contiguous(memory_format=torch.channels_last)
    # Channels-first convolutions of few channels have kernels, and orders of sums, of their own.
    torch.testing.assert_close(y, y_last)


def test_weights_written_behind_autograds_back_are_noticed() -> None:
    block = ptkernels.nn.ConvBNReLU2d(3, 4, 3).eval()
    x = torch.randn(1, 3, 8, 8)
    before = block(x)
    assert torch.equal(block(x), before)
    block.conv.weight.data.mul_(2)
    # The second call finds what the first one after the change has packed.
    for _ in range(3):
        torch.testing.assert_close(block(x), unfused(block)(x))
    assert not torch.equal(block(x), before)


@pytest.mark.parametrize("channels", [(16, 16), (40, 72), (256, 33), (512, 32)])
@pytest.mark.parametrize("space", [(7, 9), (12, 13)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_winograd(channels: tuple[int, int], space: tuple[int, int], layout: torch.memory_format) -> None:
    """Values and input gradients of the transforms, of activations as a layer sees them: not centred."""
    ins, outs = channels
    generator = torch.Generator().manual_seed(ins)
    x = torch.randn(3, ins, *space, generator=generator).relu().contiguous(memory_format=layout)
    weight = torch.randn(outs, ins, 3, 3, generator=generator) / (9 * ins) ** 0.5
    residual = torch.randn(3, outs, *space, generator=generator)
    assert ptk.explain(ptk.conv_bn_relu, x, weight, padding=1).kernel.endswith("winograd_f2x2_3x3")

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        y = function(*inputs, residual=residual.to(dtype), padding=1, activation="silu")
        return [y, *torch.autograd.grad(y, inputs, residual.to(dtype))]

    ours, theirs = results(ptk.conv_bn_relu, torch.float32), results(composition, torch.float32)
    exact = results(ptk.reference.conv_bn_relu, torch.float64)
    for name, mine, peer, expected in zip(("out", "input", "weight"), ours, theirs, exact, strict=True):
        bound = SPEC.tolerances.bound(
            peer_error=(peer - expected).abs().max().item(),
            magnitude=expected.abs().max().item(),
            dtype=torch.float32,
            gradient=name != "out",
        )
        assert (mine - expected).abs().max().item() <= bound, name


def test_winograd_can_be_excluded() -> None:
    x, weight = torch.randn(2, 16, 12, 12).to(memory_format=torch.channels_last), torch.randn(16, 16, 3, 3)
    torch.ops.ptkernels._allow_winograd(False)
    try:
        assert ptk.explain(ptk.conv_bn_relu, x, weight).kernel.endswith("implicit_gemm")
        direct = ptk.conv_bn_relu(x, weight)
    finally:
        torch.ops.ptkernels._allow_winograd(True)
    transformed = ptk.conv_bn_relu(x, weight)
    assert not torch.equal(transformed, direct)
    torch.testing.assert_close(transformed, direct)


@pytest.mark.parametrize("batch", [3, 17])  # few positions and many, but for the largest
@pytest.mark.parametrize(
    ("channels", "space", "kernel", "options"),
    [
        ((3, 20), (5, 250), (3, 5), {"padding": (1, 2)}),
        ((2, 7), (300,), (1,), {}),
        ((40, 50), (3, 130), (1, 1), {"stride": (2, 1)}),
        ((70, 30), (9, 9), (3, 3), {"padding": 1, "stride": 2}),
        ((48, 36), (6, 7), (2, 3), {"groups": 2, "dilation": 2, "padding": 1}),
        ((4, 6), (3, 4, 5), (2, 2, 2), {"stride": (1, 2, 3)}),
        ((17, 300), (2, 2), (5, 5), {"padding": 3}),
    ],
)
def test_weight_gradient(
    channels: tuple[int, int], space: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any], batch: int
) -> None:
    ins, outs = channels
    x = torch.randn(batch, ins, *space, dtype=torch.float64)
    weight = torch.randn(outs, ins // options.get("groups", 1), *kernel, dtype=torch.float64, requires_grad=True)
    y = ptk.conv_bn_relu(x, weight, activation="none", **options)
    expected = ptk.reference.conv_bn_relu(x, weight, activation="none", **options)
    flowing = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, weight, flowing), torch.autograd.grad(expected, weight, flowing), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1, 2), "same", "valid"])
def test_padding(mode: str, padding: Any) -> None:
    block = ptkernels.nn.ConvBNReLU2d(3, 4, (2, 3), padding=padding, padding_mode=mode, dilation=(1, 2)).double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), unfused(block)(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_state_of_the_unfused_modules_loads_strictly(dims: int) -> None:
    module = getattr(ptkernels.nn, f"ConvBNReLU{dims}d")
    block = module(3, 4, 2, bias=True)
    other = module(3, 4, 2, bias=True)
    block.load_unfused(unfused(other))
    assert {name.split(".")[0] for name in block.state_dict()} == {"conv", "bn"}
    assert all(torch.equal(block.state_dict()[name], value) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*conv\.bias"):
        block.load_unfused(unfused(module(3, 4, 2)))


def test_no_normalisation() -> None:
    block = ptkernels.nn.ConvBNReLU2d(3, 4, 3, bias=True, norm=False, activation="leaky_relu", negative_slope=0.2)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(block(x), F.leaky_relu(block.conv(x), 0.2))


def test_gradient_penalty() -> None:
    """Double backward through a critic, as WGAN-GP trains it."""
    critic = ptkernels.nn.ConvBNReLU2d(2, 3, 3, activation="leaky_relu", negative_slope=0.2).double()
    peer = unfused(critic)
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    grads = []
    for model in (critic, peer):
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("strict")
def test_strict_refuses_the_reference() -> None:
    x, weight = torch.randn(1, 2, 4), torch.randn(2, 2, 3)
    with pytest.raises(FallbackError, match="forward-mode"):
        torch.func.jvp(lambda t: ptk.conv_bn_relu(t, weight), (x,), (x,))


def test_explain() -> None:
    x = torch.randn(1, 8, 9, 9)
    large = torch.randn(1, 8, 16, 16)
    last = torch.channels_last
    for image, weight, groups, kernel in (
        (large, torch.randn(64, 8, 3, 3), 1, ".implicit_gemm"),
        (x, torch.randn(64, 8, 3, 3), 1, ".planes"),
        (x, torch.randn(4, 8, 3, 3), 1, ".planes"),
        (x.to(memory_format=last), torch.randn(4, 8, 3, 3), 1, ".implicit_gemm"),
        (x, torch.randn(4, 8, 1, 1), 1, ".planes"),
        (x.to(memory_format=last), torch.randn(4, 8, 1, 1), 1, ".pointwise"),
        (x, torch.randn(8, 1, 3, 3), 8, ".depthwise"),
        (large, torch.randn(8, 1, 3, 3), 8, ".depthwise_planes"),
    ):
        account = ptk.explain(ptk.conv_bn_relu, image, weight, groups=groups)
        assert account.kernel.endswith(kernel)
        transposes = not kernel.endswith("planes") and image.is_contiguous()
        assert any("channels_last" in hint for hint in account.faster) == transposes
    with ptk.backend("reference"):
        assert ptk.explain("conv_bn_relu", x, torch.randn(4, 8, 3, 3)).backend == "reference"


def test_training_step_on_digits_follows_torch() -> None:
    """Real images that ship in a package; the same curve, ours and torch's."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float64).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    block = ptkernels.nn.ConvBNReLU2d
    ours = nn.Sequential(
        block(1, 16, 3, padding=1), block(16, 16, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(256, 10)
    ).double()
    peer = nn.Sequential(unfused(ours[0]), unfused(ours[1]), nn.Flatten(), copy.deepcopy(ours[3]))
    curves = []
    for model in (ours, peer):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        losses = []
        for step in range(20):
            batch = slice(step * 64, (step + 1) * 64)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def composed(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.relu(F.batch_norm(F.conv2d(x, weight, padding=1), None, None, gamma, beta, training=True))


def fused(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return ptk.conv_bn_relu(x, weight, None, gamma, beta, training=True, padding=1)


def corner_gradients(function: Function, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    *tensors, grad = (tensor.to(dtype) for tensor in operands)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return list(torch.autograd.grad(function(*leaves), leaves, grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_through_the_corner_of_relu(dtype: torch.dtype) -> None:
    """A sum that rounding moves across 0 turns a whole gradient on or off, for torch as for us: compare many draws."""
    errors = {fused: 0.0, composed: 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        x, weight, beta = torch.randn(2, 16, 10, 10), 0.1 * torch.randn(24, 16, 3, 3), 0.1 * torch.randn(24)
        drawn = [x, weight, torch.rand(24) + 0.5, beta, torch.randn(2, 24, 10, 10)]
        operands = [tensor.to(dtype) for tensor in drawn]
        exact = corner_gradients(composed, operands, torch.float64)
        for function in errors:
            for got, expected in zip(corner_gradients(function, operands, dtype), exact, strict=True):
                errors[function] += float((got.double() - expected).norm() / expected.norm())
    assert errors[fused] <= 2.0 * errors[composed]


_PLANES = {
    # (input, weight, stride, padding, dilation, groups) of kernels that read channels-first tensors as they lie.
    "pointwise": ((2, 5, 7, 9), (6, 5, 1, 1), 1, 0, 1, 1),
    "pointwise of many channels": ((1, 450, 5, 5), (20, 450, 1, 1), 1, 0, 1, 1),
    "pointwise of many images": ((9, 3, 2, 3), (17, 3, 1, 1), 1, 0, 1, 1),
    "pointwise to one channel": ((3, 3, 7, 14), (1, 3, 1, 1), 1, 0, 1, 1),
    "pointwise from one channel": ((3, 1, 7, 14), (5, 1, 1, 1), 1, 0, 1, 1),
    "pointwise, large": ((1, 4, 40, 33), (70, 4, 1, 1), 1, 0, 1, 1),
    "pointwise, strided": ((2, 5, 9, 8), (6, 5, 1, 1), (2, 3), 0, 1, 1),
    "pointwise, padded": ((2, 5, 4, 5), (6, 5, 1, 1), 1, 1, 1, 1),
    "pointwise in one dimension": ((2, 5, 37), (6, 5, 1), 1, 0, 1, 1),
    "pointwise in three": ((2, 5, 3, 4, 5), (6, 5, 1, 1, 1), 1, 0, 1, 1),
    "few channels": ((2, 3, 11, 13), (5, 3, 3, 3), 1, 1, 1, 1),
    "few channels, strided": ((2, 3, 19, 21), (5, 3, 7, 7), 2, 3, 1, 1),
    "few channels, stride 3": ((2, 3, 19, 21), (5, 3, 5, 3), 3, (4, 1), (1, 2), 1),
    "few channels in three dimensions": ((2, 3, 5, 6, 7), (5, 3, 2, 3, 3), (1, 2, 1), (0, 1, 2), (2, 1, 1), 1),
    "few positions": ((2, 40, 4, 5), (48, 40, 3, 3), 1, 1, 1, 1),
    "few positions, strided and dilated": ((3, 70, 11, 9), (40, 70, 3, 2), (3, 2), (2, 1), (1, 2), 1),
    "few positions in one dimension": ((4, 20, 31), (130, 20, 5), 1, 2, 1, 1),
    "few positions in three dimensions": ((2, 20, 3, 5, 6), (33, 20, 3, 1, 3), (1, 2, 2), 1, 1, 1),
    "grouped": ((3, 12, 6, 5), (8, 3, 3, 3), 1, 1, 1, 4),
    "depthwise": ((2, 5, 14, 15), (5, 1, 3, 3), 1, 1, 1, 5),
    "depthwise 5x5": ((2, 19, 16, 33), (19, 1, 5, 5), 1, 2, 1, 19),
    "depthwise 7x1": ((2, 5, 20, 16), (5, 1, 7, 1), 1, (3, 0), 1, 5),
    "depthwise 2x4, dilated": ((2, 5, 17, 19), (5, 1, 2, 4), 1, 1, (2, 1), 5),
    "depthwise, wide padding": ((1, 3, 14, 14), (3, 1, 3, 3), 1, 6, 1, 3),
    "depthwise in bands": ((1, 2, 90, 90), (2, 1, 3, 3), 1, 1, 1, 2),
    "depthwise, strided": ((2, 5, 15, 17), (5, 1, 3, 3), 2, 1, 1, 5),
    "depthwise 5x5, strided": ((2, 3, 31, 30), (3, 1, 5, 5), 2, 2, 1, 3),
    "depthwise 7x3, strided and dilated": ((1, 3, 20, 33), (3, 1, 7, 3), 2, (3, 2), (1, 2), 3),
    "depthwise, strided in bands": ((1, 2, 120, 150), (2, 1, 3, 3), 2, 1, 1, 2),
    "depthwise in one dimension": ((2, 5, 211), (5, 1, 9), 1, 4, 1, 5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", _PLANES)
def test_planes(case: str, training: bool, dtype: torch.dtype) -> None:
    """Values, statistics and gradients of channels-first tensors, against the reference in float64."""
    size, kernel, stride, padding, dilation, groups = _PLANES[case]
    generator = torch.Generator().manual_seed(len(case))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, bias = normal(*size), normal(*kernel), normal(kernel[0])
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    assert ptk.explain(ptk.conv_bn_relu, x, weight, **options).kernel.endswith("planes")
    gamma, beta = normal(kernel[0]).abs() + 0.5, normal(kernel[0])
    running = [] if training else [normal(kernel[0]), normal(kernel[0]).abs() + 0.5]
    residual = normal(*ptk.reference.conv_bn_relu(x, weight, **options).shape)
    # Smooth: where a mask flips for what the dtype rounds away, gradients say nothing of the kernel.
    options |= {"training": training, "activation": "silu"}
    grad = normal(*residual.shape)

    def run(function: Any, cast: Any) -> list[torch.Tensor]:
        leaves = [cast(t).detach().clone().requires_grad_() for t in (x, weight, bias, gamma, beta, residual)]
        out = function(*leaves[:5], *(cast(t).clone() for t in running), residual=leaves[5], **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, cast(grad))]

    names = ("out", "input", "weight", "bias", "bn_weight", "bn_bias", "residual")
    ours = run(ptk.conv_bn_relu, lambda t: t)
    peer = run(ptk.reference.conv_bn_relu, lambda t: t)
    exact = run(ptk.reference.conv_bn_relu, torch.Tensor.double)
    for name, mine, theirs, expected in zip(names, ours, peer, exact, strict=True):
        if training and (name == "bias" or (name == "weight" and weight[0].numel() == 1)):
            continue  # statistics of the batch remove both: what is left of these gradients is rounding
        bound = SPEC.tolerances.bound(
            peer_error=(theirs.double() - expected).abs().max().item(),
            magnitude=expected.abs().max().item(),
            dtype=dtype,
            gradient=name != "out",
        )
        assert (mine.double() - expected).abs().max().item() <= bound, name
    assert ours[0].is_contiguous()
    with torch.no_grad():
        again = ptk.conv_bn_relu(x, weight, bias, gamma, beta, *running, residual=residual, **options)
    assert torch.equal(again, ours[0]), "the same bits with and without gradients"


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (4, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_images_of_few_channels(
    channels: int, kernel: tuple[int, ...], stride: int, padding: int, dtype: torch.dtype
) -> None:
    """Windows that lie partly, or wholly, outside: small integers, whose sums every type holds exactly."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randint(-3, 4, (2, channels, *(5, 7, 6)[: len(kernel)]), generator=generator).double()
    weight = torch.randint(-2, 3, (34, channels, *kernel), generator=generator).double()
    convolution = {2: F.conv2d, 3: F.conv3d}[len(kernel)]
    expected = convolution(x, weight, stride=stride, padding=padding)
    mean, var = torch.zeros(34), torch.ones(34)
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[len(kernel)]
    for source in (x, x.to(memory_format=layout)):
        got = ptk.conv_bn_relu(
            source.to(dtype),
            weight.to(dtype),
            running_mean=mean.to(dtype),
            running_var=var.to(dtype),
            eps=0.0,
            stride=stride,
            padding=padding,
            activation="none",
        )
        assert torch.equal(got.double(), expected)
