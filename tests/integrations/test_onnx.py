"""Models of ours as ONNX: ONNX Runtime gives what they give, at other sizes than those of the example."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from every_module import MAKERS, example, made
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels.integrations import onnx
from ptkernels.models.decoder import DecoderConfig, DecoderLM
from ptkernels.ops.conv_bn_relu.reference import ACTIVATIONS
from ptkernels.ops.quantized_matmul.formats import SCHEMES

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BATCH = torch.export.Dim("batch")


def exported(model: nn.Module, inputs: tuple[Any, ...], file: Path, dynamic_shapes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own translations
        return onnx.export(model, inputs, str(file), dynamic_shapes=dynamic_shapes, verbose=False)


def assert_same(
    model: nn.Module, example: tuple[Any, ...], others: list[tuple[Any, ...]], file: Path, dims: Any
) -> Any:
    """Exported with the example, compared on the others; the program."""
    program = exported(model.eval(), example, file, dims)
    session = onnxruntime.InferenceSession(file)
    names = [value.name for value in session.get_inputs()]
    for inputs in (example, *others):
        given = dict(zip(names, (x.numpy() for x in inputs), strict=True))
        with torch.no_grad():
            expected = model(*inputs)
        expected = torch.utils._pytree.tree_leaves(expected)
        for found, wanted in zip(session.run(None, given), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
    return program


def kinds(program: Any) -> set[str]:
    return {node.op_type for node in program.model.graph}


class EveryModule(nn.Module):
    """All in one: starting the exporter is what takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.every = nn.ModuleDict({name: made(name, training=False) for name in MAKERS})

    def forward(self, x: Tensor, indices: Tensor) -> dict[str, Tensor]:
        return {name: module(indices if name == TABLE else x) for name, module in self.every.items()}


TABLE = "QuantizedEmbedding"


def test_every_module(tmp_path: Path) -> None:
    inputs = (example("LSTM"), example(TABLE))
    program = assert_same(EveryModule(), inputs, [], tmp_path / "every.onnx", None)
    assert {"Conv", "LSTM", "GRU", "RNN"} <= kinds(program)


class Options(nn.Module):
    """Attention with whatever it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes, self.sinks = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(4))

    def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> list[Tensor]:
        grouped = {"enable_gqa": True, "is_causal": True}
        rotated, _ = ptk.rotary_embedding(query, key, key[0, 0, :, :3].cos(), key[0, 0, :, :3].sin())
        return [
            ptk.attention(query, key, key, **grouped),
            ptk.attention(rotated, key, key, mask, enable_gqa=True),
            ptk.attention(query, key, key, mask.float() * 0.3, enable_gqa=True, softcap=2.0),
            ptk.attention(query, key, key, **grouped, window=(2, 0), sinks=self.sinks),
            *ptk.attention(query, key, key, **grouped, alibi_slopes=self.slopes, return_lse=True),
        ]


def test_options_of_attention(tmp_path: Path) -> None:
    length = torch.export.Dim("length", min=2)

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        mask = torch.randn(batch, 1, 1, length) > -0.5
        mask[..., 0] = True
        return torch.randn(batch, 4, length, 6), torch.randn(batch, 2, length, 6), mask

    dims = ({0: BATCH, 2: length}, {0: BATCH, 2: length}, {0: BATCH, 3: length})
    assert_same(Options(), inputs(2, 5), [inputs(3, 9)], tmp_path / "attention.onnx", dims)


class Convolutions(nn.Module):
    """Every activation; two and three dimensions, groups and residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.ModuleList(ptk.nn.ConvBNReLU2d(4, 6, 3, 2, 1, activation=name) for name in ACTIVATIONS)
        self.deep = ptk.nn.ConvBNReLU3d(2, 2, (1, 2, 3), groups=2, norm=False, bias=True)
        self.same = ptk.nn.ConvBNReLU2d(4, 4, 3, padding="same", dilation=2)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.running_mean)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [*(block(x) for block in self.flat), self.deep(x.unflatten(1, (2, 2))), self.same(x, x)]


def test_convolutions(tmp_path: Path) -> None:
    program = assert_same(
        Convolutions(), (torch.randn(2, 4, 7, 8),), [(torch.randn(3, 4, 7, 8),)], tmp_path / "c.onnx", ({0: BATCH},)
    )
    assert "Conv" in kinds(program)


class Layers(nn.Module):
    """A quantized layer of every scheme, one too large to be decoded in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for scheme, spec in SCHEMES.items():
            if not spec.is_static:
                self.layers.append(ptk.nn.QuantizedLinear.from_float(nn.Linear(128, 8), scheme, activation="gelu"))
        uneven = nn.Linear(67, 8)
        self.uneven = ptk.nn.QuantizedLinear.from_float(uneven, "int4_weight_only", 16, symmetric=False)
        static = ptk.quantize_weight(torch.randn(8, 128), "int8_static", input_scale=0.02)
        self.layers.append(ptk.nn.QuantizedLinear.from_weight(static))
        self.large = ptk.nn.QuantizedLinear.from_float(nn.Linear(128, 16384), "int8_weight_only")

    def forward(self, x: Tensor) -> list[Tensor]:
        return [*(layer(x) for layer in self.layers), self.uneven(x[..., :67]), self.large(x)]


def test_quantized_layers(tmp_path: Path) -> None:
    file = tmp_path / "quantized.onnx"
    program = assert_same(Layers(), (torch.randn(2, 3, 128),), [(torch.randn(5, 3, 128),)], file, ({0: BATCH},))
    stored = program.model.graph.initializers
    assert any(value.shape == (16384, 128) and value.dtype.name == "INT8" for value in stored.values())


class Recurrent(nn.Module):
    """Layers with lengths, states, both directions and a projection."""

    def __init__(self) -> None:
        super().__init__()
        options = {"bidirectional": True, "batch_first": True}
        self.lstm = ptk.nn.LSTM(5, 6, 2, **options)
        self.gru = ptk.nn.GRU(5, 6, **options)
        self.rnn = ptk.nn.RNN(5, 6, 2, "relu", bias=False, **options)
        self.plain = ptk.nn.LSTM(5, 6)
        self.projected = ptk.nn.LSTM(5, 6, proj_size=3, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor) -> Any:
        found = [layer(x, lengths=lengths) for layer in (self.lstm, self.gru, self.rnn)]
        # ONNX has neither projections nor the cells of every token: as many steps as in the example.
        unrolled = self.projected(h[..., :5]), *self.plain(h[..., :5], return_all_states=True)[2][0]
        return *found, self.gru(x, h), self.plain(x.transpose(0, 1)), *unrolled


def test_recurrent_layers(tmp_path: Path) -> None:
    steps = torch.export.Dim("steps", min=2)
    first = (torch.randn(3, 4, 5), torch.tensor([4, 1, 2]), torch.randn(2, 3, 6))
    second = (torch.randn(4, 7, 5), torch.tensor([3, 7, 1, 2]), torch.randn(2, 4, 6))
    dims = ({0: BATCH, 1: steps}, {0: BATCH}, {1: BATCH})
    program = assert_same(Recurrent(), first, [second], tmp_path / "recurrent.onnx", dims)
    assert {"LSTM", "GRU", "RNN", "Sigmoid"} <= kinds(program)


def test_language_model(tmp_path: Path) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
    model = DecoderLM(DecoderConfig.llama(**sizes, intermediate_size=24, max_positions=32))
    tokens = torch.randint(20, (2, 5))
    others = [(torch.randint(20, (3, 9)),)]
    length = torch.export.Dim("length", min=2, max=32)
    assert_same(model, (tokens,), others, tmp_path / "model.onnx", ({0: BATCH, 1: length},))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = ptk.nn.LSTM(5, 6)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.lstm(x, cu_seqlens=cu_seqlens)[0]


class PackedAttention(nn.Module):
    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ptk.attention_varlen(x, x, x, cu_seqlens, cu_seqlens)


@pytest.mark.parametrize(
    ("model", "shape", "error"),
    [
        (Packed(), (7, 5), "a recurrent layer on varlen sequences has no ONNX operator"),
        (PackedAttention(), (7, 2, 5), "attention on packed sequences has no ONNX operators"),
    ],
    ids=["recurrent", "attention"],
)
def test_what_onnx_cannot_say_is_refused(model: nn.Module, shape: tuple[int, ...], error: str) -> None:
    program = torch.export.export(model, (torch.randn(shape), torch.tensor([0, 3, 7])))
    with pytest.raises(NotImplementedError, match=error):
        onnx.export(program)
