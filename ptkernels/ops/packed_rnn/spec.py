"""The recurrent layers' entry in the table of operators: sample calls, PyTorch's own version, bench shapes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptkernels._registry import BenchCase, Direction, Level, OpSpec, Sample, Tolerances, register
from ptkernels.ops.packed_rnn import layer, reference, routing

_GATES = reference.GATES
_TORCHS = ("lstm", "gru", "tanh", "relu")
_BEYOND_TORCH = ("peephole_lstm", "reset_before_gru", "layer_norm_lstm", "layer_norm_gru")


@dataclass(frozen=True)
class _Case:
    name: str
    mode: str = "lstm"
    lengths: tuple[int, ...] = (4, 3, 3, 1)
    features: int = 5
    hidden: int = 7
    both: bool = False
    bias: bool = True
    projection: int = 0
    state: bool = False
    layout: str = "packed"
    sorted: bool = True
    steps: int = 0
    strided: bool = False
    recompute: bool = False
    cells: bool = False
    zoneout: float | tuple[float, float] = 0.0
    train: bool = False

    def sizes(self) -> tuple[Tensor | None, tuple[int, ...]]:
        """What describes the lengths, and the shape of the data in front of its features."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        batch = len(self.lengths)
        longest = max((*self.lengths, self.steps))
        if self.layout == "packed":
            running = [int((lengths > step).sum()) for step in range(longest)]
            return torch.tensor(running, dtype=torch.int64), (int(lengths.sum()),)
        if self.layout == "varlen":
            return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), (int(lengths.sum()),)
        full = all(length == longest for length in self.lengths)
        shape = (longest, batch) if self.layout == "time_first" else (batch, longest)
        return None if full else lengths, shape

    def sample(self, dtype: torch.dtype, device: str, requires_grad: bool) -> Sample:
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float64) * scale
            return values.to(dtype).requires_grad_(requires_grad)

        sizes, shape = self.sizes()
        directions, batch = (2,) if self.both else (), len(self.lengths)
        rows, outputs = _GATES[self.mode] * self.hidden, self.projection or self.hidden
        scale = self.hidden**-0.5
        normalised = self.mode in reference.NORMALISED
        data = draw(*shape, (2 if self.both else 1) * rows if normalised else self.features)
        if self.strided:
            data = data.detach().mT.contiguous().mT.requires_grad_(requires_grad)
        kwargs: dict[str, Any] = {}
        if self.mode == "relu" and self.bias:
            # Far from the kink: a sign that rounding decides would make errors of any size.
            scale *= 0.2
            sign = torch.randn(rows, generator=generator, device=device).sign() * 2
            bias = (sign.expand(*directions, rows) + draw(*directions, rows, scale=0.1).detach()).to(dtype)
            kwargs = {"bias_ih": bias.requires_grad_(requires_grad), "bias_hh": draw(*directions, rows, scale=0.1)}
        else:
            known = max(reference.param_orders(self.mode), key=len)
            names = [name for name in ("bias_ih", "bias_hh") if self.bias and name in known]
            kwargs |= {name: draw(*directions, rows, scale=scale) for name in names}
            sizes_of = {"weight_peephole": (3, self.hidden), "norm_hidden": (2, rows), "norm_cell": (2, self.hidden)}
            kwargs |= {name: draw(*directions, *size) for name, size in sizes_of.items() if name in known}
        args = (
            data,
            None if normalised else draw(*directions, rows, self.features, scale=scale),
            draw(*directions, rows, outputs, scale=scale),
        )
        if self.state:
            kwargs["hx"] = draw(2 if self.both else 1, batch, outputs)
            if reference.has_cells(self.mode):
                kwargs["cx"] = draw(2 if self.both else 1, batch, self.hidden)
        if self.projection:
            kwargs["weight_hr"] = draw(*directions, outputs, self.hidden, scale=scale)
        grad_inputs = ("input", *(() if normalised else ("weight_ih",)), "weight_hh", *kwargs)
        kwargs |= {"mode": self.mode, "sizes": sizes, "layout": self.layout, "batch_size": batch}
        if self.recompute:
            kwargs["recompute"] = True
        if self.cells:
            kwargs["return_cells"] = True
        if self.zoneout:
            kwargs |= {"zoneout": self.zoneout, "train": self.train}
        if not self.sorted:
            kwargs["sorted_indices"] = torch.randperm(batch, generator=generator, device=device)
        return Sample(self.name, args, kwargs, grad_inputs)


_GRADCHECK = [
    _Case("lstm", lengths=(3, 2, 1), features=2, hidden=3),
    _Case("gru-both", "gru", lengths=(3, 2), features=2, hidden=2, both=True, state=True, sorted=False),
    _Case("lstm-both-projected", lengths=(2, 2), features=2, hidden=3, both=True, projection=2, state=True),
    _Case("tanh-padded", "tanh", lengths=(1, 3), features=2, hidden=2, state=True, layout="batch_first"),
    _Case("relu-padded", "relu", lengths=(2, 0, 1), features=2, hidden=3, layout="time_first", bias=False, state=True),
    _Case("lstm-padded-both", lengths=(1, 0, 2), features=2, hidden=2, both=True, layout="time_first", state=True),
    _Case("gru", "gru", lengths=(2, 1), features=3, hidden=2, bias=False, state=True),
    _Case("lstm-recompute", lengths=(2, 1), features=2, hidden=2, both=True, state=True, recompute=True),
    _Case(
        "lstm-cells", lengths=(2, 0, 1), features=2, hidden=2, both=True, state=True, layout="time_first", cells=True
    ),
    *(
        _Case(mode.replace("_", "-"), mode, lengths=(3, 1), features=2, hidden=3, both=True, state=True)
        for mode in _BEYOND_TORCH
    ),
    _Case("layer-norm-lstm-cells", "layer_norm_lstm", lengths=(2, 1), hidden=2, cells=True, recompute=True),
    *(
        _Case(
            f"{mode}-zoneout".replace("_", "-"),
            mode,
            lengths=(2, 1),
            features=2,
            hidden=3,
            state=True,
            zoneout=(0.3, 0.6),
        )
        for mode in ("lstm", "gru", *_BEYOND_TORCH)
    ),
]

_RAGGED = (7, 12, 19, 66)


def _beyond_torch() -> Iterator[_Case]:
    """Cells that torch lacks: alone, in batches of more rows than a tile, in every layout, and with zoneout."""
    for mode in _BEYOND_TORCH:
        name = mode.replace("_", "-")
        yield _Case(name, mode, hidden=19, both=True, state=True, sorted=False)
        yield _Case(f"{name}-alone", mode, lengths=(9,), hidden=40, bias=False)
        yield _Case(f"{name}-one-step", mode, lengths=(1,) * 9, hidden=33, state=True, layout="time_first")
        yield _Case(f"{name}-concatenated", mode, lengths=_RAGGED, hidden=65, layout="varlen", both=True)
        yield _Case(f"{name}-recompute", mode, lengths=(3, 0, 5), layout="batch_first", recompute=True, state=True)
        yield _Case(f"{name}-zoneout", mode, hidden=19, both=True, state=True, zoneout=(0.2, 0.5), train=True)
    yield _Case("peephole-lstm-cells", "peephole_lstm", lengths=(3, 0, 2), steps=4, layout="time_first", cells=True)
    yield _Case("layer-norm-lstm-cells", "layer_norm_lstm", both=True, hidden=19, state=True, cells=True)
    yield _Case("layer-norm-gru-all-empty", "layer_norm_gru", lengths=(0, 0), layout="varlen", state=True)
    for mode in ("lstm", "gru"):
        yield _Case(f"{mode}-zoneout", mode, lengths=_RAGGED, hidden=35, layout="varlen", zoneout=0.3, train=True)
        yield _Case(
            f"{mode}-zoneout-mean", mode, lengths=(3, 0, 5), layout="time_first", state=True, zoneout=(0.3, 0.1)
        )


_QUICK = [
    *(_Case(f"{mode}-{n}", mode, hidden=19, both=n == 2, state=n == 2) for mode in _TORCHS for n in (1, 2)),
    _Case("lstm-projected", hidden=19, projection=6, both=True, state=True),
    _Case("lstm-projected-wide", hidden=9, projection=21, lengths=(3, 3), bias=False),
    *(_Case(f"{mode}-no-bias", mode, bias=False, hidden=16) for mode in ("lstm", "gru")),
    _Case("lstm-unsorted", sorted=False, state=True),
    _Case("lstm-concatenated", lengths=_RAGGED, layout="varlen", both=True, hidden=33),
    _Case("gru-padded", "gru", lengths=(3, 0, 5, 1), layout="batch_first", both=True, state=True),
    _Case("lstm-padded-more", lengths=(3, 0, 2), steps=6, layout="time_first", state=True),
    _Case("lstm-full", lengths=(4, 4), layout="batch_first"),
    _Case("lstm-strided", lengths=(4, 2), layout="batch_first", strided=True),
    _Case("gru-many-rows", "gru", lengths=(3,) * 140, hidden=17, layout="time_first"),
    _Case("lstm-recompute", recompute=True, both=True, projection=4, state=True),
    _Case("gru-recompute", "gru", recompute=True, lengths=(3, 0, 5), layout="time_first"),
    *(
        _Case(f"lstm-cells-{layout}", both=True, hidden=19, state=True, layout=layout, cells=True)
        for layout in ("packed", "varlen", "batch_first")
    ),
    _Case("lstm-cells-recompute", lengths=(3, 0, 2), steps=4, layout="time_first", recompute=True, cells=True),
    _Case("one-token", lengths=(1,), hidden=8),
    *(_Case(f"{mode}-alone", mode, lengths=(15,), features=37, hidden=70, both=True, state=True) for mode in _TORCHS),
    _Case("lstm-alone-projected", lengths=(6,), features=18, hidden=39, projection=21, layout="varlen", state=True),
    _Case("all-empty", lengths=(0, 0), layout="varlen", state=True),
    _Case("no-sequences", lengths=(), layout="batch_first", steps=3),
    _Case("one-unit", "gru", features=1, hidden=1, state=True),
    *_beyond_torch(),
]
_FULL = [
    *_QUICK,
    _Case("lstm-deep-product", lengths=(9, 5), features=1100, hidden=530, both=True),
    _Case("gru-deep-product", "gru", lengths=(9, 5), features=530, hidden=600),
    *(
        _Case(f"{mode}-long", mode, lengths=(200, 130, 7), features=64, hidden=64, both=True)
        for mode in ("lstm", "gru", *_BEYOND_TORCH)
    ),
]
_CASES: dict[Level, list[_Case]] = {"gradcheck": _GRADCHECK, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls: ``gradcheck`` is tiny, ``quick`` has every feature and known trap, ``full`` adds size."""
    return (case.sample(dtype, device, requires_grad) for case in _CASES[level])


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators, with gradients required."""
    full = _Case("op-full", lengths=(2, 2), features=2, hidden=2, layout="time_first", state=True)
    cells = replace(full, name="op-cells", cells=True)
    beyond = [replace(full, name=f"op-{mode}", mode=mode, zoneout=(0.2, 0.4)) for mode in _BEYOND_TORCH]
    for index, case in enumerate((_GRADCHECK[0], _GRADCHECK[1], _GRADCHECK[5], full, cells, *beyond)):
        sample = case.sample(dtype, device, requires_grad=True)
        args = _op_arguments(*sample.args, **sample.kwargs)
        seed = torch.tensor(2**40 + index) if case.zoneout else None
        extras = (case.cells, *layer.as_options(1e-3, case.zoneout, train=False)[:3], seed)
        yield "ptkernels::packed_rnn", (*args, False, False, *extras)
        plain = [
            value.detach()
            if isinstance(value, Tensor)
            else [t.detach() for t in value]
            if isinstance(value, list)
            else value
            for value in args
        ]
        output, h_n, c_n, gates, saved_cells = torch.ops.ptkernels.packed_rnn(*plain, True, False, *extras)
        input, sizes, indices, state, params, *options = args
        # The double backward is the reference, which reads the lengths: it can be traced only where there are none.
        twice = sizes is None
        leaves = [
            input.detach().requires_grad_(twice),
            *([t.detach().requires_grad_(twice) for t in ts] for ts in (state, params)),
        ]
        grads = [torch.randn_like(t).requires_grad_(twice) if t.dim() > 1 else None for t in (output, h_n, c_n)]
        wanted = [True, *[index != 1] * len(state), *[index != 2] * len(params)]
        yield (
            "ptkernels::_packed_rnn_backward",
            (
                *grads,
                leaves[0],
                sizes,
                indices,
                leaves[1],
                leaves[2],
                output,
                gates,
                saved_cells,
                *options,
                wanted,
                *extras,
            ),
        )


def _op_arguments(*args: Any, **kwargs: Any) -> layer.OpArguments:
    from ptkernels.cli.arguments import bind

    named = bind(layer.packed_rnn, args, kwargs)
    for name in ("recompute", "return_cells", "eps", "zoneout", "train"):
        del named[name]
    return layer.as_op_arguments(weights=[named.pop(name) for name in layer.WEIGHTS], **named)


def torch_layer(
    input: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    hx: Tensor | None = None,
    cx: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    mode: str = "lstm",
    sizes: Tensor | None = None,
    layout: str = "packed",
    batch_size: int | None = None,
    sorted_indices: Tensor | None = None,
    recompute: bool = False,
    return_cells: bool = False,
    weight_peephole: Tensor | None = None,
    norm_hidden: Tensor | None = None,
    norm_cell: Tensor | None = None,
    eps: float = 1e-5,
    zoneout: float | tuple[float, float] = 0.0,
    train: bool = False,
) -> tuple[Tensor, ...]:
    """PyTorch's own layer on packed data, tokens moved there and back where they lie otherwise.

    What torch has no layer for is composed of its operators, step by step, in the dtype of the input.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole, norm_hidden, norm_cell)
    args = layer.as_op_arguments(input, weights, hx, cx, mode, sizes, layout, batch_size, sorted_indices)
    if mode not in _TORCHS or zoneout:
        options = layer.as_options(eps, zoneout, train)
        return layer.as_results(reference.layer(*args, return_cells, options, input.dtype), mode, return_cells)
    _, sizes, indices, state, params, batch, layout, _, both = args
    order = reference.order_of(input, sizes, indices, batch, layout)
    directions, hidden = 2 if both else 1, params[0].size(0) // _GATES[mode]
    outputs = hidden if weight_hr is None else weight_hr.size(-2)
    running = order.batch_sizes[0] if order.batch_sizes else 0
    features = (outputs, hidden) if mode == "lstm" else (outputs,)
    states = state or [input.new_zeros(directions, batch, size) for size in features]
    states = [tensor.index_select(1, order.slots) for tensor in states]
    data = input.reshape(-1, input.size(-1)).index_select(0, order.rows)
    if running:
        inside = [tensor[:, :running] for tensor in states]
        run: Any = {"lstm": torch.lstm, "gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[mode]
        batch_sizes = torch.tensor(order.batch_sizes)
        first = inside if mode == "lstm" else inside[0]
        rows, *found = run(data, batch_sizes, first, params, bias_ih is not None, 1, 0.0, False, both)
        states = [torch.cat([new, old[:, running:]], 1) for new, old in zip(found, states, strict=True)]
        if return_cells:
            rows = torch.cat([rows, _torch_cells(data.split(order.batch_sizes), inside, params)], -1)
    else:
        nothing = data.sum() + sum(param.flatten()[:0].sum() for param in params)
        rows = data.new_zeros(0, directions * outputs) + nothing
        states = [tensor + nothing for tensor in states]
    unsorted = order.slots.argsort()
    output = rows.new_zeros(input.shape[:-1].numel(), rows.size(1)).index_copy(0, order.rows, rows)
    output = output.reshape(*input.shape[:-1], rows.size(1))
    final = [tensor.index_select(1, unsorted) for tensor in states]
    if not return_cells:
        return output, *final
    output, cells = layer.split_cells(output, final[0])
    return output, *final, cells


def _torch_cells(x: Sequence[Tensor], states: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Cells of every token, for which torch has its cell alone."""
    found = []
    each = len(params) // states[0].size(0)
    for d, (h, c) in enumerate(zip(*states, strict=True)):
        own, cells = params[d * each : (d + 1) * each], []
        for rows in reversed(x) if d else x:
            running = rows.size(0)
            new = torch.lstm_cell(rows, (h[:running], c[:running]), *own)
            cells.append(new[1])
            h, c = (torch.cat([n, old[running:]]) for n, old in zip(new, (h, c), strict=True))
        found.append(torch.cat(cells[::-1] if d else cells))
    return torch.cat(found, -1)


def enlarged(arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """The packed call with every step repeated so often."""
    return {
        "input": torch.cat([arguments["input"].detach()] * times),
        "sizes": arguments["sizes"].repeat_interleave(times),
    }


def _make_inputs(
    shape: dict[str, Any], dtype: torch.dtype, direction: Direction, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows, directions = _GATES[shape["mode"]] * shape["H"], (2,) if shape["both"] else ()
    lengths = _lengths(shape)
    tokens = sum(lengths)
    shapes = [(tokens, shape["I"]), (*directions, rows, shape["I"]), (*directions, rows, shape["H"])]
    shapes += [(*directions, rows)] * 2
    scales = [1.0] + [shape["H"] ** -0.5] * 4
    args = tuple(
        (torch.randn(size, generator=generator, device=generator.device) * scale)
        .to(dtype)
        .requires_grad_(direction == "forward+backward")
        for size, scale in zip(shapes, scales, strict=True)
    )
    running = torch.tensor([sum(length > step for length in lengths) for step in range(shape["T"])])
    return args, {"mode": shape["mode"], "sizes": running, "batch_size": shape["B"]}


def _lengths(shape: dict[str, Any]) -> list[int]:
    """From T down to T / 8 in equal steps, or all T."""
    batch, longest = shape["B"], shape["T"]
    if shape["uniform"] or batch == 1:
        return [longest] * batch
    shortest = max(1, longest // 8)
    return [longest - (longest - shortest) * index // (batch - 1) for index in range(batch)]


def _bench_case(name: str, shape: dict[str, Any], dtype: torch.dtype, direction: Direction) -> BenchCase:
    tokens, directions = sum(_lengths(shape)), 2 if shape["both"] else 1
    rows = _GATES[shape["mode"]] * shape["H"]
    flops = 2 * tokens * directions * rows * (shape["I"] + shape["H"])
    weights = directions * rows * (shape["I"] + shape["H"] + 2)
    traffic = (weights + tokens * (shape["I"] + directions * shape["H"])) * dtype.itemsize
    if direction == "forward+backward":
        flops, traffic = 3 * flops, 3 * traffic
    make = partial(_make_inputs, shape, dtype, direction)
    return BenchCase(name, name, shape, dtype, direction, make, flops, traffic)


_BENCH_SHAPES: list[tuple[str, str, int, int, int, int, bool, bool]] = [
    # name, mode, features, hidden, sequences, steps, both directions, uniform lengths
    ("lstm-300-256", "lstm", 300, 256, 32, 128, False, False),
    ("lstm-256-both", "lstm", 256, 256, 32, 128, True, False),
    ("lstm-512", "lstm", 512, 512, 32, 200, False, False),
    ("lstm-512-uniform", "lstm", 512, 512, 32, 200, False, True),
    ("gru-512", "gru", 512, 512, 32, 200, False, False),
    ("lstm-1024", "lstm", 1024, 1024, 16, 100, False, False),
    ("lstm-128-one", "lstm", 128, 128, 1, 64, True, True),
    ("lstm-64", "lstm", 64, 64, 128, 64, False, False),
    ("lstm-2048", "lstm", 2048, 2048, 8, 16, False, False),
    *((f"lstm-{h}-stream", "lstm", h, h, 1, 1, False, True) for h in (128, 256, 512)),
]


def bench_cases() -> list[BenchCase]:
    """Layers of the sizes that tagging, speech and language models have, ragged and not."""
    cases = []
    for name, mode, features, hidden, batch, steps, both, uniform in _BENCH_SHAPES:
        shape = {"mode": mode, "I": features, "H": hidden, "B": batch, "T": steps, "both": both, "uniform": uniform}
        directions: tuple[Direction, ...] = ("forward",) if steps == 1 else ("forward", "forward+backward")
        for dtype in (torch.float32, torch.bfloat16):
            cases += [_bench_case(name, shape, dtype, direction) for direction in directions]
    return cases


SPEC = register(
    OpSpec(
        name="packed_rnn",
        function=layer.packed_rnn,
        reference=reference.packed_rnn,
        baseline=torch_layer,
        torch_ops=("ptkernels::packed_rnn", "ptkernels::_packed_rnn_backward"),
        samples=samples,
        torch_op_samples=torch_op_samples,
        bench_cases=bench_cases,
        kernels=routing.kernels,
        explain=routing.explain,
        # Gradients of packed layouts: sums over tokens in another order than torch's.
        tolerances=Tolerances(gradient=3.0),
        enlarged=enlarged,
        host_inputs=("sizes", "sorted_indices"),
        one_call_under_vmap=("input", "hx", "cx"),
    )
)
