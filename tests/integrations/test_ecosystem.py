"""New weights count in the next call, however they came; and what PyTorch's tools make of every module of ours."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from every_module import MAKERS, TRAINED, called, example, gradients, made, trained_parameters
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import ptkernels as ptk

each = pytest.mark.parametrize("name", MAKERS)
each_trained = pytest.mark.parametrize("name", TRAINED)


def test_no_module_is_forgotten() -> None:
    exported = {kind for name in ptk.nn.__all__ if isinstance(kind := getattr(ptk.nn, name), type)}
    covered = {type(part) for name in MAKERS for part in made(name).modules()}
    assert exported <= covered


def fresh(module: nn.Module) -> nn.Module:
    """The same module made anew, with today's weights: it can remember nothing of earlier calls."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# New weights count in the next call.


def ema_update(module: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(
        copy.deepcopy(module), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for _ in range(2):  # the first one copies
        averaged.update_parameters(module)
    with torch.no_grad():
        for parameter in trained_parameters(averaged.module).values():
            parameter.mul_(3.0)
    averaged.update_parameters(module)
    module.load_state_dict(averaged.module.state_dict())


def optimizer_step(module: nn.Module, fused: bool = False) -> None:
    parameters = list(trained_parameters(module).values())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(parameters, 0.3, fused=fused).step()


def data_write(module: nn.Module) -> None:
    for parameter in trained_parameters(module).values():
        parameter.data.mul_(1.7)


def data_exchange(module: nn.Module) -> None:
    for parameter in trained_parameters(module).values():
        parameter.data = parameter.data * 1.7


def numpy_write(module: nn.Module) -> None:
    for parameter in trained_parameters(module).values():
        parameter.detach().numpy()[...] *= 1.7


def state_dict_load(module: nn.Module, assign: bool = False) -> None:
    state = {n: t * 1.7 if t.is_floating_point() else t for n, t in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)


def device_move(module: nn.Module) -> None:
    state = {n: t * 1.7 if t.is_floating_point() else t.clone() for n, t in module.state_dict().items()}
    module.to("meta").to_empty(device="cpu").load_state_dict(state)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that results depend on: running statistics; codes and scales."""
    return {n: t for n, t in module.named_buffers() if n.split(".")[-1] not in ("num_batches_tracked", "format")}


def buffers_write(module: nn.Module) -> None:
    for tensor in buffers(module).values():
        if tensor.is_floating_point():
            tensor.data.mul_(1.7)
        else:
            tensor.data.bitwise_xor_(1)


def buffers_exchange(module: nn.Module) -> None:
    for tensor in buffers(module).values():
        tensor.data = tensor.data * 1.7 if tensor.is_floating_point() else tensor.data ^ 1


def attribute(module: nn.Module) -> None:
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(child, name, nn.Parameter(parameter.detach() * 1.7))


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "optimizer.step": optimizer_step,
    "fused optimizer.step": lambda module: optimizer_step(module, fused=True),
    ".data in place": data_write,
    ".data exchanged": data_exchange,
    "through numpy": numpy_write,
    "buffers in place": buffers_write,
    "buffers exchanged": buffers_exchange,
    "load_state_dict": state_dict_load,
    "load_state_dict(assign)": lambda module: state_dict_load(module, assign=True),
    "exponential moving average": ema_update,
    "new parameter": attribute,
    "to bfloat16 and back": lambda module: module.bfloat16().float() and None,
    "to another device and back": device_move,
}
BUFFERS = ("buffers in place", "buffers exchanged")
# What changes weights that are not trained.
UNTRAINED = ("load_state_dict", "load_state_dict(assign)", "to another device and back", *BUFFERS)


@each
@pytest.mark.parametrize("write", WRITES)
def test_the_next_call_uses_the_new_weights(name: str, write: str) -> None:
    if name not in TRAINED and write not in UNTRAINED:
        pytest.skip("its weights are not trained")
    if write in BUFFERS and not buffers(made(name)):
        pytest.skip("it has no buffers")
    # Statistics of the batch depend on no buffers.
    for training in (False,) if write in BUFFERS else (False, True):
        module, x = made(name, training), example(name)
        with torch.no_grad():
            before = called(module, x)
            again = called(module, x)
        assert torch.equal(before, again)
        WRITES[write](module)
        other = fresh(module)
        with torch.no_grad():
            after = called(module, x)
            assert torch.equal(after, called(other, x))
        if not (training and name == "SyncBatchNorm"):  # statistics of the batch have no weights
            assert not torch.equal(after, before)
        if name in TRAINED:
            assert all(map(torch.equal, gradients(module, x), gradients(other, x)))


# torch.func.


@each
def test_functional_call(name: str) -> None:
    module, x = made(name, training=False), example(name)
    state = {
        n: t * 0.5 if t.is_floating_point() and t.requires_grad else t
        for n, t in module.state_dict(keep_vars=True).items()
    }
    other = copy.deepcopy(module)
    other.load_state_dict({n: t.detach() for n, t in state.items()})
    torch.testing.assert_close(functional_call(module, state, (x,)), other(x))


@each_trained
def test_per_sample_gradients(name: str) -> None:
    """One gradient per example (differential privacy), by vmap over grad, as by a loop."""
    module, x = made(name, training=False).double(), example(name).double()
    parameters = trained_parameters(module)

    def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(module, values, (one[None],)).sin().sum()

    mapped = vmap(grad(loss), (None, 0))({n: p.detach() for n, p in parameters.items()}, x)
    for index, one in enumerate(x):
        alone = torch.autograd.grad(loss(parameters, one), list(parameters.values()))
        for key, expected in zip(parameters, alone, strict=True):
            torch.testing.assert_close(mapped[key][index], expected)


@each_trained
def test_forward_mode(name: str) -> None:
    module, x = made(name, training=False).double(), example(name).double()
    direction = torch.randn_like(x)
    _, tangent = jvp(module, (x,), (direction,))
    step = 1e-6
    with torch.no_grad():
        expected = (module(x + step * direction) - module(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)


# Training.


@each_trained
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(name: str, use_reentrant: bool) -> None:
    results = []
    for save in (False, True):
        module, x = made(name), example(name).requires_grad_()
        torch.manual_seed(2)
        out = checkpoint(module, x, use_reentrant=use_reentrant) if save else module(x)
        out.sin().sum().backward()
        results.append(
            [out.detach(), x.grad, *(p.grad for p in trained_parameters(module).values()), *module.buffers()]
        )
    assert all(map(torch.equal, *results))


# Compilation, export, other processes, the profiler.


@each
def test_compiled_in_one_graph_for_any_batch(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = made(name)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in (11, 13):  # no size of anything else
        x = example(name, size)
        torch.testing.assert_close(called(compiled, x), called(module, x))
        if name in TRAINED:
            for found, expected in zip(gradients(compiled, x), gradients(module, x), strict=True):
                torch.testing.assert_close(found, expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@each
def test_export_with_dynamic_batch(name: str) -> None:
    module = nn.Sequential(made(name, training=False))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (example(name),), dynamic_shapes=({0: batch},))
    for size in (3, 6):
        x = example(name, size)
        torch.testing.assert_close(program.module()(x), module(x))


class Rows(Dataset[Tensor]):
    """Samples that are computed by modules, as a loader's process would."""

    def __init__(self, module: nn.ModuleDict) -> None:
        self.module = module

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            results = {name: part(example(name)) for name, part in self.module.items()}
            return torch.cat([(index + 1) * result.flatten() for result in results.values()])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_processes(context: str) -> None:
    """One process for all modules: starting it is what takes time."""
    rows = Rows(nn.ModuleDict({name: made(name, training=False) for name in MAKERS}))
    expected = torch.stack([rows[index] for index in range(4)])
    loader = DataLoader(rows, batch_size=2, num_workers=2, multiprocessing_context=context)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_profiler_names_the_operators() -> None:
    names: set[str] = set()
    for name in ("MultiheadAttention", "ConvBNReLU1d", "QuantizedLinear", "LSTM"):
        module = made(name)
        with torch.profiler.profile() as profile:
            module(example(name).requires_grad_()).sum().backward()
        names |= {event.name for event in profile.events()}
    found = {name.removeprefix("ptkernels::") for name in names if name.startswith("ptkernels::")}
    assert {"attention", "_attention_backward", "conv_bn_relu", "_conv_bn_relu_backward"} <= found
    assert {"quantized_linear", "packed_rnn", "_packed_rnn_backward"} <= found
