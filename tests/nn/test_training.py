"""What people do to models in training, done to networks of every family of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, batch, network, torch_side, trained
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, trained(model)))


def assert_all_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)


# --- gradients


def test_accumulated_gradients_are_those_of_one_large_batch(family: str) -> None:
    model = network(family).eval()
    x, labels = batch(8)
    whole = gradients(model, F.cross_entropy(model(x), labels))
    for part, wanted in zip(x.split(2), labels.split(2), strict=True):
        (F.cross_entropy(model(part), wanted) / 4).backward()
    assert_all_close([p.grad for p in trained(model)], whole)


def test_a_graph_kept_gives_its_gradients_twice(family: str) -> None:
    model = network(family)
    x, labels = batch()
    loss = F.cross_entropy(model(x), labels)
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in trained(model)]
    loss.backward()
    assert_all_close([p.grad for p in trained(model)], [2 * gradient for gradient in first])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
def test_anomaly_mode_finds_the_nan(family: str) -> None:
    model = network(family)
    x, labels = batch()
    with torch.autograd.set_detect_anomaly(True):
        F.cross_entropy(model(x), labels).backward()
        out = model(x)
        out.register_hook(lambda gradient: gradient * float("nan"))
        with pytest.raises(RuntimeError, match="returned nan values"):
            out.sum().backward()


def test_clipping(family: str) -> None:
    model = network(family)
    x, labels = batch()
    (1000 * F.cross_entropy(model(x), labels)).backward()
    norm = nn.utils.clip_grad_norm_(trained(model), 1.0)
    assert norm > 1.0
    clipped = torch.cat([p.grad.flatten() for p in trained(model)])
    torch.testing.assert_close(clipped.norm(), torch.ones((), dtype=torch.float64), rtol=1e-5, atol=0.0)
    nn.utils.clip_grad_value_(trained(model), 0.01)
    assert max(float(p.grad.abs().max()) for p in trained(model)) <= 0.01
    trained(model)[0].grad.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(trained(model), 1.0, error_if_nonfinite=True)


def test_one_module_in_two_places_gets_both_gradients(family: str) -> None:
    """And two modules that share a parameter see each other's updates."""
    model = network(family).eval()
    x, labels = batch()
    both = gradients(model, F.cross_entropy(model(x), labels) + F.cross_entropy(model(x.flip(0)), labels))
    first = gradients(model, F.cross_entropy(model(x), labels))
    second = gradients(model, F.cross_entropy(model(x.flip(0)), labels))
    assert_all_close(both, [a + b for a, b in zip(first, second, strict=True)])

    twin = copy.deepcopy(model)
    twin.layer, twin.head.weight = model.layer, model.head.weight
    with torch.no_grad():
        trained(model)[0].mul_(1.5)
        model.head.weight.add_(0.1)
    twin.head.bias = model.head.bias
    assert torch.equal(twin(x), model(x))


# --- second derivatives


def hessian_vector_product(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    parameters = trained(model)
    first = torch.autograd.grad(F.cross_entropy(model(x), labels), parameters, create_graph=True)
    generator = torch.Generator().manual_seed(2)
    vector = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    return list(torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, vector, strict=True)), parameters))


def test_hessian_vector_product(family: str) -> None:
    model, (x, labels) = network(family), batch()
    with torch_side(model) as theirs:
        expected = hessian_vector_product(theirs, x, labels)
    assert_all_close(hessian_vector_product(model, x, labels), expected)


def meta_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """MAML: the loss on one half after a step on the other, differentiated through that step."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = F.cross_entropy(functional_call(model, named, (x[:2],)), labels[:2])
    steps = torch.autograd.grad(inner, list(named.values()), create_graph=True)
    moved = {name: p - 0.1 * step for (name, p), step in zip(named.items(), steps, strict=True)}
    outer = F.cross_entropy(functional_call(model, moved, (x[2:],)), labels[2:])
    return list(torch.autograd.grad(outer, list(named.values())))


def test_learning_to_learn(family: str) -> None:
    model, (x, labels) = network(family).eval(), batch()
    with torch_side(model) as theirs:
        expected = meta_gradient(theirs, x, labels)
    assert_all_close(meta_gradient(model, x, labels), expected)


def test_per_sample_gradients(family: str) -> None:
    """One gradient per example (differential privacy), by vmap over grad, as by a loop."""
    model, (x, labels) = network(family).eval(), batch(3)
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (example[None],)), label[None])

    mapped = vmap(grad(loss), (None, 0, 0))(named, x, labels)
    for index in range(3):
        alone = gradients(model, F.cross_entropy(model(x[index : index + 1]), labels[index : index + 1]))
        assert_all_close([mapped[name][index] for name in named], alone)


# --- gradients of the input


def test_attack_on_a_frozen_network(family: str) -> None:
    """Projected gradient descent on the input alone: nothing of the network is differentiated."""
    model = network(family).eval().requires_grad_(False)
    x, labels = batch()
    delta = torch.zeros_like(x, requires_grad=True)
    start = F.cross_entropy(model(x), labels)
    for _ in range(5):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + delta), labels), delta)
        delta = (delta + 0.05 * gradient.sign()).clamp(-0.1, 0.1).detach().requires_grad_()
    assert F.cross_entropy(model(x + delta), labels) > start
    with torch_side(model) as theirs:
        expected = torch.autograd.grad(F.cross_entropy(theirs(x + delta), labels), delta)
    actual = torch.autograd.grad(F.cross_entropy(model(x + delta), labels), delta)
    assert_all_close(list(actual), list(expected))


def test_integrated_gradients_are_complete(family: str) -> None:
    """Attributions along the way from one input to another sum to the difference of their scores."""
    model = network(family).eval().requires_grad_(False)
    start, end = batch(2)[0].split(1)
    steps = (torch.arange(256, dtype=torch.float64) + 0.5)[:, None, None] / 256
    path = torch.lerp(start, end, steps).requires_grad_()
    (gradient,) = torch.autograd.grad(model(path)[:, 2].sum(), path)
    attribution = (gradient.mean(0, keepdim=True) * (end - start)).sum()
    difference = model(end)[0, 2] - model(start)[0, 2]
    torch.testing.assert_close(attribution, difference, rtol=1e-3, atol=1e-4)


# --- optimizers that call back


def sharpness_aware(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """SAM: the gradient where the loss is highest near by."""
    parameters = trained(model)
    first = gradients(model, F.cross_entropy(model(x), labels))
    scale = 0.05 / torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, first, strict=True):
            parameter.add_(scale * gradient)
    second = gradients(model, F.cross_entropy(model(x), labels))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, first, strict=True):
            parameter.sub_(scale * gradient)
    return second


def test_sharpness_aware_minimisation(family: str) -> None:
    model, (x, labels) = network(family), batch()
    with torch_side(model) as theirs:
        expected = sharpness_aware(theirs, x, labels)
    assert_all_close(sharpness_aware(model, x, labels), expected)


def test_lbfgs(family: str) -> None:
    model, (x, labels) = network(family), batch()
    optimizer = torch.optim.LBFGS(trained(model), max_iter=8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        return loss

    start = float(closure())
    optimizer.step(closure)
    assert float(closure()) < 0.7 * start


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, 0.02, fused=True),
        lambda p: torch.optim.RMSprop(p, 0.01),
        lambda p: torch.optim.Adagrad(p, 0.05),
    ],
    ids=["sgd", "adamw", "rmsprop", "adagrad"],
)
def test_optimizers(family: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model, (x, labels) = network(family, torch.float32), batch(dtype=torch.float32)
    optimizer = make(trained(model))
    losses = []
    for _ in range(8):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# --- averages


def test_averaged_model_with_statistics_of_its_own(family: str) -> None:
    """Stochastic weight averaging: equal weights, then statistics recomputed over the data."""
    model, (x, labels) = network(family), batch(8)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        average.update_parameters(model)
        seen.append([p.detach().clone() for p in trained(model)])
    expected = [torch.stack(steps).mean(0) for steps in zip(*seen, strict=True)]
    assert_all_close([p.detach() for p in trained(average.module)], expected)
    torch.optim.swa_utils.update_bn([x[:4], x[4:]], average)
    with torch_side(average) as theirs:
        torch.optim.swa_utils.update_bn([x[:4], x[4:]], theirs)
        wanted = theirs.eval()(x)
    torch.testing.assert_close(average.eval()(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_gradient_scaler(family: str, dtype: torch.dtype) -> None:
    """Parameters stay float32; scaled gradients are unscaled to what they were; an overflow skips the step."""
    model, (x, labels) = network(family, torch.float32), batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    plain = gradients(model, F.cross_entropy(model(x), labels))
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(x).float(), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for parameter, expected in zip(trained(model), plain, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - expected).abs().max() < 0.05 * expected.abs().max() + 0.01
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in trained(model)]
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype):
        overflowing = (model(x).float() * float("inf")).sum()
    scaler.scale(overflowing).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, old) for p, old in zip(trained(model), before, strict=True))
    assert scaler.get_scale() == 32.0
