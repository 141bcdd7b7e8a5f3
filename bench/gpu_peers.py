"""PyTorch's best ways on a GPU to compute what each operator computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptkernels.cli.bench.peers import compile_peer
from ptkernels.cli.bench.peers.packed_rnn import _packed, _padded
from ptkernels.cli.bench.problem import Contender, Problem, UnsupportedError
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight

Prepare = Callable[[Problem], Contender]


def _sdpa(backend: SDPBackend) -> Prepare:
    def prepare(problem: Problem) -> Contender:
        baseline = problem.spec.baseline

        def call(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(backend):
                return baseline(*args, **kwargs)

        return problem.contender(backend.name, call)

    return prepare


def _baseline(problem: Problem) -> Contender:
    return problem.contender("torch", problem.spec.baseline)


def _compiled(problem: Problem) -> Contender:
    return compile_peer(problem.spec.baseline).prepare(problem, 1)


def _weight(problem: Problem) -> QuantizedWeight:
    weight: QuantizedWeight = problem.named["qweight"]
    return weight


def _plain(problem: Problem, name: str, call: Callable[[], Tensor]) -> Contender:
    """Of what rounds its operands in its own way: timed, and not compared."""
    problem.require_forward()
    return Contender(name, call, lambda: (call(),))


def _dense(problem: Problem) -> Contender:
    dense, x = _weight(problem).dequantize(problem.case.dtype), problem.named["x"]
    return _plain(problem, "dense", lambda: F.linear(x, dense))


def _int_mm(problem: Problem) -> Contender:
    """The integer product alone, its input quantized ahead."""
    weight, x = _weight(problem), problem.named["x"]
    if weight.spec.code.name != "s8" or not weight.spec.quantizes_input:
        raise UnsupportedError(f"does not do {weight.scheme}")
    codes = (x.float() * 10).clamp(-127, 127).to(torch.int8)
    return _plain(problem, "_int_mm", lambda: torch._int_mm(codes, weight.codes.t()))


def _scaled_mm(problem: Problem) -> Contender:
    """The float8 product alone with a scale per row, its input quantized ahead."""
    weight, x = _weight(problem), problem.named["x"]
    if weight.spec.code.name != "fp8":
        raise UnsupportedError(f"does not do {weight.scheme}")
    codes, stored = x.to(torch.float8_e4m3fn), weight.codes.view(torch.float8_e4m3fn)
    rows, columns = x.new_ones(x.size(0), 1, dtype=torch.float32), weight.scales[:, :1].t().contiguous()
    return _plain(
        problem, "_scaled_mm", lambda: torch._scaled_mm(codes, stored.t(), rows, columns, out_dtype=torch.bfloat16)
    )


PEERS: dict[str, dict[str, Prepare]] = {
    "attention": {
        "torch-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "torch-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "torch-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    },
    "conv_bn_relu": {"torch-eager": _baseline, "torch-compile": _compiled},
    "rotary_embedding": {"torch-eager": _baseline, "torch-compile": _compiled},
    "quantized_matmul": {"torch-dense": _dense, "torch-int-mm": _int_mm, "torch-scaled-mm": _scaled_mm},
    "packed_rnn": {
        "cudnn-packed": lambda problem: _packed(problem, 1),
        "cudnn-padded": lambda problem: _padded(problem, 1),
    },
}
