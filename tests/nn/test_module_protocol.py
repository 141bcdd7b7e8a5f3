"""What torch.nn.Module promises, kept by networks of every family: state, hooks, modes, dtypes, copies, memory."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from families import FAMILIES, SHAPE, batch, network, trained
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import ptkernels as ptk

per_family = pytest.mark.parametrize("family", FAMILIES)


@per_family
def test_state_is_saved_loaded_and_mapped(family: str) -> None:
    """weights_only, through a file, onto another device; strictly into a network of other values."""
    model, (x, _) = network(family).eval(), batch()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location="cpu", weights_only=True)
    torch.manual_seed(5)
    other = FAMILIES[family]().double().eval()
    assert not torch.equal(other(x), model(x))
    assert str(other.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(other(x), model(x))
    file.seek(0)
    assert all(tensor.is_meta for tensor in torch.load(file, map_location="meta", weights_only=True).values())
    with torch.device("meta"):
        empty = FAMILIES[family]() if family != "quantized" else None
    if empty is not None:
        empty.double().load_state_dict(state, assign=True)
        assert torch.equal(empty.eval()(x), model(x))


@per_family
def test_partial_load(family: str) -> None:
    model = network(family)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head")}
    torch.manual_seed(5)
    other = FAMILIES[family]().double()
    head = other.head.weight.clone()
    found = other.load_state_dict({**state, "extra": torch.zeros(1)}, strict=False)
    assert sorted(found.missing_keys) == ["head.bias", "head.weight"]
    assert found.unexpected_keys == ["extra"]
    assert torch.equal(other.head.weight, head)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*\"head.weight\""):
        other.load_state_dict(state)


@per_family
def test_state_dict_hooks(family: str) -> None:
    """Names and values may be changed on the way out and on the way in; missing keys are told after."""
    model, (x, _) = network(family).eval(), batch()
    layer, seen = model.layer, []

    def rename(state: dict[str, Any], prefix: str, old: str, new: str) -> None:
        for name in [name for name in state if name.startswith(prefix + old)]:
            state[prefix + new + name[len(prefix + old) :]] = state.pop(name)

    layer.register_state_dict_pre_hook(lambda module, prefix, keep_vars: seen.append("saving"))
    layer.register_state_dict_post_hook(lambda module, state, prefix, _: rename(state, prefix, "", "old."))
    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: rename(state, prefix, "old.", ""))
    layer.register_load_state_dict_post_hook(lambda module, keys: seen.append(tuple(keys.missing_keys)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.startswith("layer.old.") for name in state)
    expected = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not torch.equal(model(x), expected)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(x), expected)
    assert seen == ["saving", ()]


@per_family
def test_copies_are_independent(family: str) -> None:
    model, (x, _) = network(family).eval(), batch()
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.5)
        assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)


@per_family
def test_hooks_fire_in_order(family: str) -> None:
    model, (x, _) = network(family), batch()
    seen: list[str] = []
    layer = model.layer
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, out: seen.append("after"))
    layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    handle = layer.register_forward_hook(lambda module, args, out: seen.append("removed"))
    handle.remove()
    model(x.requires_grad_()).sum().backward()
    calls = SHAPE[0] if family == "gated" else 1  # a cell runs once a step
    assert seen == ["before", "after"] * calls + ["backward"] * calls
    assert layer.training


@per_family
def test_hooks_can_replace_results(family: str) -> None:
    model, (x, _) = network(family).eval(), batch()

    def half(module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5

    expected = model(x)
    with torch.no_grad():
        handle = model.layer.register_forward_hook(half)
        assert not torch.equal(model(x), expected)
        handle.remove()
        assert torch.equal(model(x), expected)


@per_family
def test_modes_and_trees(family: str) -> None:
    model = network(family)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in model.eval().modules())
    assert set(dict(model.named_parameters())) >= {"head.weight", "head.bias"}
    container = nn.ModuleDict({"one": model, "others": nn.ModuleList([network(family)])})
    assert len(list(container.parameters())) == 2 * len(list(model.parameters()))
    assert all(name.split(".")[0] in ("one", "others") for name, _ in container.named_parameters())
    assert type(model.layer).__name__ in repr(container)
    assert sum(p.numel() for p in container.parameters()) == 2 * sum(p.numel() for p in model.parameters())


@per_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(family: str, dtype: torch.dtype) -> None:
    model, (x, _) = network(family).eval(), batch()
    expected = model(x)
    cast = copy.deepcopy(model).to(dtype)
    out = cast(x.to(dtype))
    assert out.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert all(p.dtype == dtype for p in trained(cast))


@per_family
def test_nothing_is_recorded_without_gradients(family: str) -> None:
    model, (x, _) = network(family), batch()
    assert model(x).grad_fn is not None
    with torch.no_grad():
        out = model.eval()(x)
        assert out.grad_fn is None
        assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(model(x), out)
        assert model(x).is_inference()


@per_family
@torch.no_grad()
def test_a_batch_is_its_samples(family: str) -> None:
    """What a server that collects requests relies on."""
    model, (x, _) = network(family, torch.float32).eval(), batch(5, torch.float32)
    alone = torch.cat([model(sample[None]) for sample in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-6)
    assert model(x[:0]).shape == (0, 4)


@per_family
@torch.no_grad()
def test_latency_cold_warm_and_batched(family: str) -> None:
    """torch.utils.benchmark times our modules as any others; the numbers are for people."""
    model = network(family, torch.float32).eval()
    for count in (1, 8):
        x = torch.randn(count, *SHAPE)
        cold = Timer("model(x)", globals={"model": model, "x": x}).timeit(1)
        warm = Timer("model(x)", globals={"model": model, "x": x}).timeit(3)
        assert cold.number_per_run == 1
        assert warm.median > 0.0


# --- memory


def huge(*shape: int) -> Tensor:
    """More elements than any machine has memory for, in one."""
    return torch.zeros(1).expand(*shape)


MUCH = 1 << 46


@pytest.mark.parametrize(
    "call",
    [
        lambda: ptk.attention(huge(1, 1, MUCH, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)),
        lambda: ptk.conv_bn_relu(huge(1, 1, MUCH), torch.randn(2, 1, 1)),
        lambda: ptk.quantized_linear(huge(MUCH, 8), ptk.quantize_weight(torch.randn(4, 8), "int8_weight_only")),
        lambda: ptk.nn.GRU(8, 4)(huge(MUCH, 1, 8)),
    ],
    ids=["attention", "conv_bn_relu", "quantized_linear", "gru"],
)
def test_too_little_memory_is_a_runtime_error(call: Any) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"(?i)memory|allocat|aten::contiguous"):
        call()
