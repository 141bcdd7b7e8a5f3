"""What recurrent layers promise beyond the contract: torch.nn's behaviour, for every form of input."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import ptkernels as ptk
from ptkernels.errors import FallbackError

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = torch.tensor([4, 6, 1, 6, 3])
CELLS = ("LSTM", "GRU", "RNN")


def pair(name: str, *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Any, Any]:
    """torch's module and ours, with the same parameters."""
    theirs, ours = (getattr(module, name)(*args, **kwargs).to(dtype) for module in (nn, ptk.nn))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def states(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def values_and_gradients(module: Any, data: Any, hx: Any, *leaves: Tensor) -> list[Tensor]:
    output, final = module(data, hx)
    output = output.data if isinstance(output, PackedSequence) else output
    results = (output, *states(final))
    generator = torch.Generator().manual_seed(3)
    flowing = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    grads = torch.autograd.grad(results, [*leaves, *module.parameters()], flowing)
    return [*(r.detach() for r in results), *grads]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


VARIANTS = [
    (name, bias, first, both, projection, layers)
    for name, bias, first, both, projection, layers in itertools.product(
        CELLS, (True, False), (True, False), (True, False), (0, 3), (1, 2)
    )
    if name == "LSTM" or not projection
]


@pytest.mark.parametrize(("name", "bias", "batch_first", "both", "projection", "layers"), VARIANTS)
def test_modules_are_torchs(name: str, bias: bool, batch_first: bool, both: bool, projection: int, layers: int) -> None:
    """Values, states and every gradient, for padded, packed and one sequence."""
    options: dict[str, Any] = {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": both}
    if projection:
        options["proj_size"] = projection
    theirs, ours = pair(name, 4, 5, **options)
    directions, batch = layers * (2 if both else 1), len(LENGTHS)
    # The states' last dimension is not contiguous.
    hx = torch.randn(projection or 5, batch, directions, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    cx = torch.randn(5, batch, directions, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    state = (hx, cx) if name == "LSTM" else hx
    leaves = (hx, cx) if name == "LSTM" else (hx,)
    x = torch.randn(6, batch, 4, dtype=torch.float64)
    x = (x.transpose(0, 1) if batch_first else x).requires_grad_()
    assert_all_close(
        values_and_gradients(ours, x, state, x, *leaves), values_and_gradients(theirs, x, state, x, *leaves)
    )
    packed = pack_padded_sequence(x, LENGTHS, batch_first, enforce_sorted=False)
    assert_all_close(
        values_and_gradients(ours, packed, state, *leaves), values_and_gradients(theirs, packed, state, *leaves)
    )
    one = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    state = tuple(s[:, 0] for s in leaves) if name == "LSTM" else hx[:, 0]
    assert_all_close(values_and_gradients(ours, one, state, one), values_and_gradients(theirs, one, state, one))


@pytest.mark.parametrize("name", CELLS)
def test_state_dict_and_initialisation(name: str) -> None:
    torch.manual_seed(5)
    theirs = getattr(nn, name)(4, 5, num_layers=2, bidirectional=True)
    torch.manual_seed(5)
    ours = getattr(ptk.nn, name)(4, 5, num_layers=2, bidirectional=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.flatten_parameters()
    clone = copy.deepcopy(ours)
    x = torch.randn(3, 2, 4)
    assert torch.equal(clone(x)[0], ours(x)[0])
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_torchs(name: str, bias: bool) -> None:
    theirs, ours = pair(f"{name}Cell", 4, 5, bias=bias)
    x, h, c = (torch.randn(3, n, dtype=torch.float64) for n in (4, 5, 5))
    for data, state in ((x, None), (x, (h, c)), (x[0], (h[0], c[0]))):
        given = state if name == "LSTM" or state is None else state[0]
        assert_all_close(list(states(ours(data, given))), list(states(theirs(data, given))))


# --- forms of input


def per_sequence(module: Any, sequences: list[Tensor], hx: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Concatenated outputs and stacked states of torch's module run on one sequence after the other."""
    outputs, finals = [], []
    for index, sequence in enumerate(sequences):
        state = tuple(s[:, index : index + 1].contiguous() for s in hx)
        if sequence.size(0) == 0:
            outputs.append(sequence.new_zeros(0, module.hidden_size * (2 if module.bidirectional else 1)))
            finals.append(state)
            continue
        output, final = module(sequence[:, None], state if len(state) > 1 else state[0])
        outputs.append(output[:, 0])
        finals.append(states(final))
    return torch.cat(outputs), [torch.cat(tensors, 1) for tensors in zip(*finals, strict=True)]


@pytest.mark.parametrize("name", CELLS)
def test_every_form_agrees_with_a_loop_over_sequences(name: str) -> None:
    theirs, ours = pair(name, 3, 19, num_layers=2, bidirectional=True)
    cu_seqlens = torch.tensor([0, 7, 19, 19, 27, 93])
    lengths = cu_seqlens.diff()
    batch, longest = len(lengths), int(lengths.max())
    data = torch.randn(93, 3, dtype=torch.float64, requires_grad=True)
    hx = tuple(
        torch.randn(4, batch, 19, dtype=torch.float64, requires_grad=True) for _ in range(2 if name == "LSTM" else 1)
    )
    state = hx if name == "LSTM" else hx[0]
    sequences = list(data.split(lengths.tolist()))
    expected, finals = per_sequence(theirs, sequences, hx)
    leaves = [data, *hx]
    wanted = torch.autograd.grad(
        [expected, *finals], [*leaves, *theirs.parameters()], [expected.cos(), *map(torch.cos, finals)]
    )

    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    nested = torch.nested.nested_tensor_from_jagged(data, cu_seqlens)
    inside = torch.arange(longest) < lengths[:, None]
    forms: dict[str, tuple[Any, Any, Any]] = {
        "concatenated": (data, {"cu_seqlens": cu_seqlens.int()}, lambda out: out),
        "nested": (nested, {}, lambda out: out.values()),
        "time first": (padded.transpose(0, 1), {"lengths": lengths}, lambda out: out.transpose(0, 1)[inside]),
    }
    for form, (input, options, flat) in forms.items():
        output, final = ours(input, state, **options)
        found = flat(output)
        results = [found, *states(final)]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11, msg=form)
        assert_all_close(list(states(final)), finals)
        grads = torch.autograd.grad(results, [*leaves, *ours.parameters()], [r.cos() for r in results])
        assert_all_close(list(grads), list(wanted), 1e-10)


def test_padding_is_zero_and_costs_no_copy() -> None:
    module = ptk.nn.LSTM(4, 5, bidirectional=True)
    x = torch.full((6, 5, 4), math.nan)
    for index, length in enumerate(LENGTHS):
        x[:length, index] = torch.randn(length, 4)
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():
        output, (h_n, _) = module(x, lengths=LENGTHS)
    assert "ptkernels::packed_rnn" in seen
    assert not {"aten::index_select", "aten::sort", "aten::index", "aten::clone", "aten::copy_"} & set(seen)
    for index, length in enumerate(LENGTHS):
        assert (output[length:, index] == 0).all()
        # The reverse direction ends at the first token, and begins at the sequence's own last one.
        assert torch.equal(h_n[0, index], output[length - 1, index, :5])
        assert torch.equal(h_n[1, index], output[0, index, 5:])


def test_sequences_without_tokens_keep_their_own_state() -> None:
    module = ptk.nn.LSTM(4, 5)
    hx = (torch.randn(1, 3, 5), torch.randn(1, 3, 5))
    for lengths in ([2, 0, 3], [0, 0, 0], [0, 3, 1]):
        _, (h_n, c_n) = module(torch.randn(3, 3, 4), hx, lengths=torch.tensor(lengths))
        for index, length in enumerate(lengths):
            assert torch.equal(h_n[0, index], hx[0][0, index]) == (length == 0)
            assert torch.equal(c_n[0, index], hx[1][0, index]) == (length == 0)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CELLS)
def test_pieces_give_the_bits_of_the_whole(name: str, dtype: torch.dtype, batch: int) -> None:
    module = getattr(ptk.nn, name)(37, 70, num_layers=2).to(dtype)
    x = torch.randn(23, batch, 37, dtype=dtype)
    with torch.no_grad():
        whole, final = module(x)
        for pieces in ([1] * 23, [5, 6, 12], [22, 1]):
            state, outputs = None, []
            for piece in x.split(pieces):
                output, state = module(piece, state)
                outputs.append(output)
            assert torch.equal(torch.cat(outputs), whole)
            assert all(map(torch.equal, states(state), states(final)))
        for count in range(1, batch):
            some, _ = module(x[:, :count])
            # Two or more are summed as any others are; one alone has an order of its own.
            tolerance = 64 * torch.finfo(dtype).eps if count == 1 else 0
            torch.testing.assert_close(some, whole[:, :count], rtol=0, atol=tolerance)


def test_gru_resets_after_the_product() -> None:
    x, h = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    cell = ptk.nn.GRUCell(3, 4).double()
    (r, z, n), (hr, hz, hn) = (
        nn.functional.linear(v, w, b).chunk(3, 1)
        for v, w, b in ((x, cell.weight_ih, cell.bias_ih), (h, cell.weight_hh, cell.bias_hh))
    )
    z = (z + hz).sigmoid()
    expected = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h
    torch.testing.assert_close(cell(x, h), expected, rtol=1e-13, atol=1e-13)


# --- dropout, weights at call time


def test_dropout_is_torchs_and_replays() -> None:
    theirs, ours = pair("LSTM", 4, 5, num_layers=3, dropout=0.4)
    packed = pack_padded_sequence(torch.randn(6, 5, 4, dtype=torch.float64), LENGTHS, enforce_sorted=False)
    results = []
    for module, seed in ((theirs, 7), (ours, 7), (ours, 7), (ours, 8)):
        torch.manual_seed(seed)
        results.append(module(packed)[0].data)
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[1], results[3])
    ours.eval()
    assert torch.equal(ours(packed)[0].data, ours(packed)[0].data)


def test_dropout_replays_under_checkpointing() -> None:
    module = ptk.nn.GRU(4, 5, num_layers=2, dropout=0.5)
    x = torch.randn(6, 3, 4, requires_grad=True)
    torch.manual_seed(1)
    plain = torch.autograd.grad(module(x)[0].sum(), x)
    torch.manual_seed(1)
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(lambda t: module(t)[0], x, use_reentrant=False).sum(), x
    )
    assert torch.equal(plain[0], again[0])


def test_weights_are_those_of_the_call() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    module, x = ptk.nn.LSTM(4, 5), torch.randn(3, 2, 4)
    before = module(x)[0]
    module.weight_hh_l0.data.mul_(0.5)
    halved = module(x)[0]
    assert not torch.equal(before, halved)
    module.weight_hh_l0.data.mul_(2)
    parametrize.register_parametrization(module, "weight_hh_l0", Halved())
    assert torch.equal(module(x)[0], halved)


# --- threads


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_more_threads_than_cores(threads: int) -> None:
    module = ptk.nn.LSTM(32, 128, bidirectional=True)
    x = torch.randn(12, 16, 32)
    torch.set_num_threads(1)
    expected = module(x)[0]
    torch.set_num_threads(threads)
    for _ in range(5):
        assert torch.equal(module(x)[0], expected)


def test_calls_from_several_threads_at_once() -> None:
    module, x = ptk.nn.GRU(32, 128), torch.randn(12, 16, 32)
    expected = module(x)[0]
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.extend(module(x)[0] for _ in range(5))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 20
    assert all(torch.equal(result, expected) for result in results)


CHILD = """
import os, torch, ptkernels as ptk
torch.set_num_threads({threads})
torch.manual_seed(0)
module, x = ptk.nn.LSTM(32, 256, bidirectional=True), torch.randn(12, 16, 32)
{body}
print("done", float(module(x)[0].double().sum()))
"""
FORK = """
if os.fork() == 0:
    torch.set_num_threads(1)
    os._exit(0 if module(x)[0].isfinite().all() else 1)
assert os.wait()[1] == 0
"""


@pytest.mark.parametrize(
    ("body", "environment"),
    [("", {}), ("", {"OMP_THREAD_LIMIT": "1"}), ("", {"OMP_THREAD_LIMIT": "2"}), (FORK, {})],
    ids=["plain", "one-thread-of-four", "two-threads-of-four", "after-fork"],
)
def test_pool_with_fewer_threads_than_asked_for(body: str, environment: dict[str, str]) -> None:
    code = CHILD.format(threads=4, body=body)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.startswith("done"), result.stderr
    torch.manual_seed(0)
    module, x = ptk.nn.LSTM(32, 256, bidirectional=True), torch.randn(12, 16, 32)
    assert float(result.stdout.split()[1]) == float(module(x)[0].double().sum())


# --- numerics and memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_are_accurate_everywhere(dtype: torch.dtype) -> None:
    """sigmoid within 3 ULP, tanh within 4, infinities and NaN included."""
    bound = 80 if dtype == torch.float32 else 690
    x = torch.cat([torch.linspace(-bound, bound, 20001), torch.logspace(-30, 1, 5000), -torch.logspace(-30, 1, 5000)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e30, -1e30])]).to(dtype)
    one, zero = torch.ones(4, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)
    gates = torch.ops.ptkernels.packed_rnn(
        x[:, None], torch.tensor([len(x)]), None, [], [one, zero], len(x), "packed", "lstm", False, True
    )[3][0, :, :, 0]
    for gate, exact, limit in ((0, torch.sigmoid(x.double()), 3), (2, torch.tanh(x.double()), 4)):
        normal = exact.abs() > torch.finfo(dtype).tiny
        if dtype == torch.float64 and gate == 0:
            exact = 1 / (1 + torch.exp(-x))
        ulp = (gates[:, gate].double() - exact).abs() / (exact.abs() * torch.finfo(dtype).eps)
        assert ulp[normal].max() < limit
        assert gates[:, gate][~normal].abs().max() < 1e-37
    lost = ptk.packed_rnn(torch.full((1, 1), math.nan, dtype=dtype), one, zero, sizes=torch.tensor([1]))
    assert all(result.isnan().all() for result in lost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CELLS)
def test_memory_kept_for_the_backward(name: str, dtype: torch.dtype) -> None:
    """Beyond inputs and parameters: at most what torch keeps."""

    def kept(module: Any, data: Any) -> int:
        given = {t.untyped_storage().data_ptr() for t in (data.data, *module.parameters())}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in given:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept_alive = module(data)
        assert kept_alive is not None
        return sum(found.values())

    theirs, ours = pair(name, 32, 64, dtype=dtype)
    packed = pack_padded_sequence(torch.randn(6, 5, 32).to(dtype), LENGTHS, enforce_sorted=False)
    tokens = int(LENGTHS.sum())
    assert kept(ours, packed) <= kept(theirs, packed)
    gates = {"LSTM": 4, "GRU": 4, "RNN": 0}[name] * dtype.itemsize + (4 if name == "LSTM" else 0)
    integers = 8 * (6 + 5)
    assert kept(ours, packed) <= tokens * 64 * (gates + dtype.itemsize) + integers


# --- torch's subsystems


def test_compile_of_ragged_input_compiles_once() -> None:
    module = ptk.nn.LSTM(4, 5, bidirectional=True)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(data: Tensor, cu_seqlens: Tensor) -> Tensor:
        return module(data, cu_seqlens=cu_seqlens)[0]

    for index, lengths in enumerate(([7, 3, 9], [2, 9, 6], [5, 1, 30], [3, 30, 8])):
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
        data = torch.randn(sum(lengths), 4)
        torch._dynamo.mark_dynamic(data, 0)
        assert torch.equal(run(data, cu_seqlens), module(data, cu_seqlens=cu_seqlens)[0])
        assert counter.frame_count == 1, index


@pytest.mark.parametrize("name", CELLS)
def test_compile_and_export_of_packed_sequences(name: str) -> None:
    module = getattr(ptk.nn, name)(4, 5, num_layers=2)
    packed = pack_padded_sequence(torch.randn(6, 5, 4), LENGTHS, enforce_sorted=False)
    torch._dynamo.reset()
    compiled = torch.compile(lambda data: module(data)[0].data, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), module(packed)[0].data)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.inner(x, lengths=lengths)[0]

    x = torch.randn(6, 5, 4)
    exported = torch.export.export(Padded(), (x, LENGTHS)).module()
    assert torch.equal(exported(x, LENGTHS), module(x, lengths=LENGTHS)[0])


def test_ensembles_under_vmap() -> None:
    modules = [ptk.nn.GRU(4, 5) for _ in range(3)]
    params, _ = torch.func.stack_module_state(modules)
    x = torch.randn(6, 2, 4)

    def run(p: dict[str, Tensor], data: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], p, (data,))[0]

    together = torch.vmap(run, (0, None))(params, x)
    for index, module in enumerate(modules):
        torch.testing.assert_close(together[index], module(x)[0])
    per_sample = torch.vmap(torch.func.grad(lambda p, d: run(p, d[:, None]).sin().sum()), (None, 1))(
        dict(modules[0].named_parameters()), x
    )
    for index in range(2):
        loss = modules[0](x[:, index : index + 1])[0].sin().sum()
        for name, grad in zip(per_sample, torch.autograd.grad(loss, modules[0].parameters()), strict=True):
            torch.testing.assert_close(per_sample[name][index], grad)


def test_autocast_of_modules() -> None:
    module, x = ptk.nn.LSTM(4, 5), torch.randn(6, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = module(x)
    assert output.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
    output.sum().backward()
    assert module.weight_ih_l0.grad.dtype == torch.float32


def test_double_backward_is_announced(strict: None) -> None:
    module = ptk.nn.LSTM(4, 5).double()
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
    with pytest.raises(FallbackError, match="double backward has no kernel"):
        grad.sum().backward()


def test_gradient_penalty() -> None:
    """A second derivative through two layers, as WGAN-GP takes it, against torch's."""
    theirs, ours = pair("LSTM", 3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (theirs, ours):
        (grad,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad((grad.norm() - 1) ** 2, list(module.parameters()), allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_reference_and_backends() -> None:
    module = ptk.nn.LSTM(4, 5).double()
    x, params = torch.randn(6, 5, 4, dtype=torch.float64), list(module.parameters())
    ours = ptk.lstm(x, None, params, lengths=LENGTHS)
    for results in (ptk.reference.lstm(x, None, params, lengths=LENGTHS), _on_reference(x, params)):
        assert_all_close(list(results), list(ours))
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    torch.testing.assert_close(pad_packed_sequence(ptk.lstm(packed, None, params)[0])[0], ours[0])


@ptk.backend("reference")
def _on_reference(x: Tensor, params: list[Tensor]) -> Any:
    return ptk.lstm(x, None, params, lengths=LENGTHS)
