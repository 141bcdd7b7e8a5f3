"""Peers of the recurrent layers: torch on packed and on padded sequences, ONNX Runtime with lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptkernels.cli.bench.gate import Part, whole
from ptkernels.cli.bench.problem import Contender, Peer, Problem, UnsupportedError

from .engines import OnnxSession, onnx_type

PACKED, PADDED, ONNX = "torch-packed", "torch-padded", "onnxruntime"

_TORCH: dict[str, Callable[..., Any]] = {"lstm": torch.lstm, "gru": torch.gru}


def peers() -> list[Peer]:
    return [
        Peer(PACKED, lambda: torch.__version__, _packed),
        Peer(PADDED, lambda: torch.__version__, _padded),
        Peer(ONNX, _onnxruntime_version, _onnxruntime),
    ]


def parts(problem: Problem, flops: float) -> list[Part]:
    """Sequences share weights, whose gradients need all of them: a problem is checked whole."""
    return whole(problem)


def _params(named: dict[str, Any]) -> list[Tensor]:
    weights = [named[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return weights if weights[0].dim() == 2 else [weight[d] for d in (0, 1) for weight in weights]


def _zeros(named: dict[str, Any]) -> Any:
    weight = named["weight_hh"]
    directions = 2 if weight.dim() == 3 else 1
    state = weight.new_zeros(directions, named["batch_size"], weight.size(-1))
    return [state, state] if named["mode"] == "lstm" else state


def _packed(problem: Problem, threads: int) -> Contender:
    def run(input: Tensor, weight_ih: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        named = dict(
            zip(("input", "weight_ih", "weight_hh", "bias_ih", "bias_hh"), (input, weight_ih, *args), strict=True)
        )
        named |= kwargs
        function = _TORCH[kwargs["mode"]]
        both = weight_ih.dim() == 3
        found: tuple[Tensor, ...] = function(
            input, kwargs["sizes"], _zeros(named), _params(named), True, 1, 0.0, False, both
        )
        return found

    return problem.contender(PACKED, run)


def _rows(problem: Problem) -> tuple[Tensor, list[int]]:
    """Row of every token in a padded time-first tensor, and the lengths."""
    sizes, batch = problem.named["sizes"].tolist(), problem.named["batch_size"]
    rows = torch.cat([torch.arange(running) + step * batch for step, running in enumerate(sizes)])
    return rows, [sum(running > index for running in sizes) for index in range(batch)]


def _padded_input(problem: Problem, rows: Tensor) -> Tensor:
    data = problem.named["input"].detach()
    steps, batch = len(problem.named["sizes"]), problem.named["batch_size"]
    padded: Tensor = data.new_zeros(steps * batch, data.size(1)).index_copy(0, rows, data)
    return padded.reshape(steps, batch, -1)


def _padded(problem: Problem, threads: int) -> Contender:
    """torch's dense path, padding computed along: what users write to be spared the packed one.

    Its states are those after the padding, so its outputs are compared here, on real tokens, and the rest of what it
    hands to the check is the packed path's.
    """
    named, (rows, _) = problem.named, _rows(problem)
    x, both = _padded_input(problem, rows), named["weight_ih"].dim() == 3
    if both and len(rows) < x.size(0) * x.size(1):
        raise UnsupportedError("the reverse direction would begin in the padding")
    function, params, state = _TORCH[named["mode"]], _params(named), _zeros(named)
    x.requires_grad_(problem.backward)
    leaves = [x, *(leaf for name, leaf in zip(problem.leaf_names, problem.leaves, strict=True) if name != "input")]

    def forward() -> Tensor:
        output: Tensor = function(x, state, params, True, 1, 0.0, False, both, False)[0]
        return output

    packed = _packed(problem, threads)
    expected = packed.outputs()[0].detach()
    found = forward().detach().flatten(0, 1).index_select(0, rows)
    if not torch.allclose(found, expected, rtol=0.05, atol=0.05):
        raise UnsupportedError("differs from the packed path on real tokens")
    if not problem.backward:
        return Contender(PADDED, forward, packed.outputs)
    flowing = torch.zeros_like(forward()).flatten(0, 1).index_copy(0, rows, problem.cotangents(packed.outputs())[0])
    flowing = flowing.reshape(*x.shape[:2], -1)
    return Contender(PADDED, lambda: torch.autograd.grad(forward(), leaves, flowing), packed.outputs)


def _onnxruntime_version() -> str:
    import onnx  # noqa: F401 - a graph is needed as much as the runtime
    import onnxruntime

    return str(onnxruntime.__version__)


def _onnx_weights(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """W, R and B of the ONNX operators, gates in their order: i o f c, and z r h."""
    order = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}[problem.named["mode"]]

    def reordered(tensor: Tensor) -> Tensor:
        stacked = tensor.detach() if problem.named["weight_ih"].dim() == 3 else tensor.detach()[None]
        gates: Tensor = stacked.unflatten(1, (len(order), -1))[:, list(order)]
        return gates.flatten(1, 2).contiguous()

    weights = [reordered(problem.named[name]) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return weights[0], weights[1], torch.cat(weights[2:], 1)


def _onnxruntime(problem: Problem, threads: int) -> Contender:
    problem.require_forward()
    from onnx import helper, numpy_helper

    named = problem.named
    if problem.case.dtype != torch.float32:
        raise UnsupportedError("its recurrent operators are float32 only on the CPU")
    rows, lengths = _rows(problem)
    x = _padded_input(problem, rows)
    weights, both = _onnx_weights(problem), named["weight_ih"].dim() == 3
    initializers = [
        numpy_helper.from_array(tensor.numpy(), name) for tensor, name in zip(weights, ("W", "R", "B"), strict=True)
    ]
    initializers.append(numpy_helper.from_array(torch.tensor(lengths, dtype=torch.int32).numpy(), "lengths"))
    hidden = named["weight_hh"].size(-1)
    options: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if both else "forward"}
    if named["mode"] == "gru":
        options["linear_before_reset"] = 1
    node = helper.make_node(named["mode"].upper(), ["X", "W", "R", "B", "lengths"], ["Y"], **options)
    kind = onnx_type(torch.float32)
    shape = [x.size(0), 2 if both else 1, x.size(1), hidden]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("X", kind, list(x.shape))],
        [helper.make_tensor_value_info("Y", kind, shape)],
        initializers,
    )
    session = OnnxSession(graph, {"": 14}, {"X": x}, threads)
    packed = _packed(problem, threads)

    def outputs() -> tuple[Tensor, ...]:
        session.run()
        found = session.output().transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, rows)
        return (found, *packed.outputs()[1:])

    return Contender(ONNX, session.run, outputs)
