"""Calibration, rounding, training through rounding, and checkpoints of others."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels import quantization as q
from ptkernels.nn import QuantizedLinear, quantize_

# --- checkpoints: synthetic ones, packed here by the formats' definitions


def bit_stream(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes along the last dimension as int32 words of one stream of bits."""
    stream = (codes.unsqueeze(-1) >> torch.arange(bits)) & 1
    words = stream.flatten(-2).unflatten(-1, (-1, 32)).long() << torch.arange(32)
    return words.sum(-1).to(torch.int32)  # wraps: the top bit is the sign


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_checkpoints(bits: int, act_order: bool) -> None:
    k, n, group = 64, 32, 32
    codes = torch.randint(0, 2**bits, (k, n))
    zeros = torch.randint(1, 2**bits, (k // group, n))
    scales = torch.rand(k // group, n).half()
    g_idx = torch.arange(k) // group
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    expected = (scales.float()[g_idx] * (codes - zeros[g_idx])).T
    qweight, qzeros = bit_stream(codes.T, bits).T.contiguous(), bit_stream(zeros - 1, bits)
    weight, order = q.from_gptq(qweight, qzeros, scales, g_idx.int(), bits=bits)
    assert (order is None) != act_order
    x = torch.randn(5, k)
    if order is None:
        assert torch.equal(weight.dequantize(), expected)
    else:
        assert torch.equal(weight.dequantize(), expected[:, order])
        x = x[:, order]
    back = x if order is None else torch.empty_like(x).index_copy(1, order, x)
    torch.testing.assert_close(ptk.quantized_linear(x, weight), back @ expected.T, rtol=1e-4, atol=1e-3)


def test_awq_checkpoints() -> None:
    k, n, group = 64, 16, 32
    codes, zeros = torch.randint(0, 16, (k, n)), torch.randint(0, 16, (k // group, n))
    scales = torch.rand(k // group, n).half()
    interleaved = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(values: Tensor) -> Tensor:
        return bit_stream(values.unflatten(1, (-1, 8))[..., interleaved].flatten(1), 4)

    weight = q.from_awq(pack(codes), pack(zeros), scales)
    spread = torch.arange(k) // group
    assert torch.equal(weight.dequantize(), (scales.float()[spread] * (codes - zeros[spread])).T)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_gguf_blocks(kind: str) -> None:
    rows, k = 3, 96
    scales = torch.rand(rows, k // 32, 1).half()
    if kind == "Q8_0":
        values = torch.randint(-128, 128, (rows, k // 32, 32), dtype=torch.int8)
        payload = values.view(torch.uint8)
    else:
        values = torch.randint(-8, 8, (rows, k // 32, 32), dtype=torch.int8)
        codes = (values + 8).to(torch.uint8)
        payload = codes[..., :16] | codes[..., 16:] << 4
    blocks = torch.cat([scales.view(torch.uint8), payload], -1)
    weight = q.from_gguf(blocks.flatten(), kind, k)
    assert torch.equal(weight.dequantize(), (scales.float() * values).flatten(1))
    x = torch.randn(4, k)
    torch.testing.assert_close(ptk.quantized_linear(x, weight), x @ weight.dequantize().T, rtol=1e-4, atol=1e-3)


def test_checkpoints_that_are_wrong() -> None:
    words, scales = torch.zeros(8, 8, dtype=torch.int32), torch.ones(2, 8)
    zeros = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="from_gptq: bits: got 5"):
        q.from_gptq(words, zeros, scales, bits=5)
    with pytest.raises(TypeError, match=r"from_gptq: qweight: got dtype torch\.int64"):
        q.from_gptq(words.long(), zeros, scales)
    with pytest.raises(ValueError, match="from_gptq: scales: got shape"):
        q.from_gptq(words, zeros, scales[:, :4])
    with pytest.raises(ValueError, match="from_gptq: g_idx: got groups of unequal sizes"):
        q.from_gptq(words, zeros, scales, torch.zeros(64, dtype=torch.int32))
    with pytest.raises(ValueError, match="from_awq: scales: got shape"):
        q.from_awq(words, zeros, scales)
    with pytest.raises(ValueError, match="from_gguf: kind: got 'Q5_0'"):
        q.from_gguf(torch.zeros(18, dtype=torch.uint8), "Q5_0", 32)
    with pytest.raises(ValueError, match="from_gguf: blocks: got 19 bytes"):
        q.from_gguf(torch.zeros(19, dtype=torch.uint8), "Q4_0", 32)
    with pytest.raises(TypeError, match="from_gguf: blocks: got dtype"):
        q.from_gguf(torch.zeros(18), "Q4_0", 32)


# --- observers


@pytest.mark.parametrize("observer", [q.MinMaxObserver, q.PercentileObserver, q.MSEObserver])
def test_observers_see_batches_as_one(observer: type[q.MinMaxObserver]) -> None:
    x = torch.randn(4000)
    whole, parts = observer(), observer()
    whole.observe(x)
    for part in (x * 0, *x.split(700)):
        parts.observe(part)
    assert math.isclose(whole.threshold(), parts.threshold(), rel_tol=0.02)
    assert 0 < whole.threshold() <= float(x.abs().max())
    assert whole.scale().shape == (1,)


def test_clipping_observers_ignore_outliers() -> None:
    x = torch.cat([torch.rand(100_000), torch.tensor([500.0])])
    for observer, below in ((q.PercentileObserver(99.9), 2), (q.MSEObserver(), 400)):
        observer.observe(x)
        assert 0.9 < observer.threshold() < below, observer
    with pytest.raises(ValueError, match="percentile: got 0"):
        q.PercentileObserver(0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_observers_refuse_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="MSEObserver: x: got NaN or infinities"):
        q.MSEObserver().observe(torch.tensor([1.0, bad]))


def test_zeros_have_a_scale() -> None:
    for observer in (q.MinMaxObserver(), q.PercentileObserver(), q.MSEObserver()):
        assert observer.scale().item() == 1.0
        observer.observe(torch.zeros(3))
        assert observer.scale().item() == 1.0


def mlp() -> nn.Sequential:
    """The perceptron 50-30-20-3 of the source documents."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)).requires_grad_(
        False
    )


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static", "int8_weight_only", "fp8"])
def test_the_perceptron_keeps_its_decisions(scheme: str) -> None:
    model, x = mlp(), torch.randn(500, 50)
    assert sum(p.numel() for p in model.parameters()) == 2213
    scores = model(x)
    scales = q.calibrate(model, [x[:250], (x[250:],)]) if scheme == "int8_static" else None
    assert quantize_(model, scheme, input_scales=scales) == ["0", "2", "4"]
    top = scores.topk(2).values
    clear = top[:, 0] - top[:, 1] > 0.05 * scores.abs().max()
    assert clear.float().mean() > 0.5
    assert torch.equal(model(x).argmax(1)[clear], scores.argmax(1)[clear])


def test_calibrated_layers_only() -> None:
    model, x = mlp(), torch.randn(20, 50)
    scales = q.calibrate(model, [x], q.MSEObserver, lambda name, layer: layer.in_features > 20)
    assert sorted(scales) == ["0", "2"]
    assert quantize_(model, "int8_static", input_scales=scales) == ["0", "2"]
    assert not model[0]._forward_pre_hooks


# --- smoothing


def outlier_inputs(rows: int = 256, k: int = 64) -> Tensor:
    return torch.randn(rows, k) * torch.where(torch.arange(k) % 16 == 3, 40.0, 1.0)


def test_smoothquant_helps_where_channels_are_unequal() -> None:
    x = outlier_inputs()
    norm, linear = nn.LayerNorm(64), nn.Linear(64, 48)
    norm.weight.data = torch.where(torch.arange(64) % 16 == 3, 40.0, 1.0)
    expected = linear(norm(x))

    def error() -> Tensor:
        layer = QuantizedLinear.from_float(linear, "int8_dynamic")
        return (layer(norm(x)) - expected).square().mean()

    before = error()
    peaks = norm(x).abs().amax(0).detach()
    q.fold_scales(norm, [linear], q.smoothquant_scales(peaks, [linear.weight], 0.6))
    torch.testing.assert_close(linear(norm(x)), expected, rtol=1e-4, atol=1e-4)
    assert error() < 0.5 * before


def test_awq_helps_where_channels_are_unequal() -> None:
    x, linear = outlier_inputs(), nn.Linear(64, 48, bias=False)
    scales = q.awq_scales(x, [linear.weight], group_size=32)
    plain = ptk.quantize_weight(linear.weight, "int4_weight_only", 32).dequantize()
    scaled = ptk.quantize_weight(linear.weight * scales, "int4_weight_only", 32).dequantize() / scales
    exact = x @ linear.weight.T
    assert (x @ scaled.T - exact).norm() < 0.7 * (x @ plain.T - exact).norm()


def test_smoothing_errors() -> None:
    with pytest.raises(ValueError, match="alpha: got 2"):
        q.smoothquant_scales(torch.ones(3), [], 2)
    with pytest.raises(ValueError, match="weights: got shape"):
        q.smoothquant_scales(torch.ones(3), [torch.ones(2, 4)])
    with pytest.raises(TypeError, match="previous: got ReLU"):
        q.fold_scales(nn.ReLU(), [], torch.ones(3))
    with pytest.raises(ValueError, match="not positive"):
        q.fold_scales(nn.LayerNorm(3), [nn.Linear(3, 3)], torch.zeros(3))
    with pytest.raises(ValueError, match=r"scales: got shape \[2\]"):
        q.fold_scales(nn.LayerNorm(3), [nn.Linear(3, 3)], torch.ones(2))


# --- rounding


@pytest.mark.parametrize("scheme", ["int4_weight_only", "int3_weight_only", "int2_weight_only", "nf4", "int8_dynamic"])
def test_gptq_beats_rounding_to_nearest(scheme: str) -> None:
    weight, x = torch.randn(32, 128), torch.randn(512, 128) @ torch.randn(128, 128)
    found, nearest = q.gptq(weight, x, scheme), ptk.quantize_weight(weight, scheme)
    assert (found.scheme, found.group_size) == (nearest.scheme, nearest.group_size)
    errors = [float((x @ (w.dequantize() - weight).T).norm()) for w in (found, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_gptq_with_zero_points_and_a_short_group() -> None:
    weight, x = torch.rand(8, 80), torch.randn(300, 80)
    found = q.gptq(weight, x, "int4_weight_only", 32, symmetric=False)
    assert found.zeros is not None
    assert (found.dequantize() - weight).abs().max() < 0.2
    with pytest.raises(ValueError, match="gptq: x: got 8 features"):
        q.gptq(weight, torch.randn(3, 8))


@pytest.mark.parametrize("scheme", ["int4_weight_only", "int3_weight_only", "int2_weight_only"])
def test_hqq_beats_zero_points_of_extremes(scheme: str) -> None:
    weight = torch.randn(32, 128) * torch.where(torch.rand(32, 128) < 0.02, 6.0, 1.0)
    found = q.hqq(weight, scheme, 32)
    nearest = ptk.quantize_weight(weight, scheme, 32, symmetric=False)
    errors = [float((w.dequantize() - weight).abs().pow(0.7).sum()) for w in (found, nearest)]
    assert errors[0] < errors[1]
    x = torch.randn(7, 128)
    torch.testing.assert_close(ptk.quantized_linear(x, found), x @ found.dequantize().T, rtol=1e-4, atol=1e-4)


# --- training


def test_fake_quantization_is_the_grid() -> None:
    x, scale = torch.randn(50) * 3, torch.tensor(0.1)
    out = q.fake_quantize(x, scale, -8, 7)
    torch.testing.assert_close(out, (x / scale).round().clamp(-8, 7) * scale)
    assert torch.equal(q.fake_quantize(x, torch.tensor(0.0)), torch.zeros(50))
    assert q.fake_quantize(torch.tensor([math.nan]), scale).isnan().all()


def test_fake_quantization_differentiates_as_its_surrogate() -> None:
    x = (torch.randn(20, dtype=torch.float64) * 2).requires_grad_()
    scale = torch.rand(20, dtype=torch.float64).add(0.2).requires_grad_()
    level = (x / scale).clamp(-4, 3)
    residual = (level.round() - level).detach()

    def surrogate(x: Tensor, scale: Tensor) -> Tensor:
        return q.fake_quantize_surrogate(x, scale, residual, -4, 3)

    assert torch.autograd.gradcheck(surrogate, (x, scale))
    assert torch.autograd.gradgradcheck(surrogate, (x, scale))
    out = q.fake_quantize(x, scale, -4, 3)
    weights = torch.randn(20, dtype=torch.float64)
    actual = torch.autograd.grad(out, (x, scale), weights)
    inside = (x / scale > -4) & (x / scale < 3)
    torch.testing.assert_close(actual[0], weights * inside)
    learned = torch.where(inside, (x / scale).round() - x / scale, (x / scale).clamp(-4, 3))
    torch.testing.assert_close(actual[1], weights * learned)


def test_fake_quantization_compiles_and_maps() -> None:
    x, scale = torch.randn(4, 6), torch.rand(4, 1)
    expected = q.fake_quantize(x, scale, -8, 7)
    compiled = torch.compile(q.fake_quantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, scale, -8, 7), expected)
    mapped = torch.vmap(lambda x, s: q.fake_quantize(x, s, -8, 7))(x, scale)
    assert torch.equal(mapped, expected)


def test_fake_quantization_errors() -> None:
    with pytest.raises(TypeError, match=r"fake_quantize: x: got torch\.int64"):
        q.fake_quantize(torch.tensor(1), torch.tensor(1.0))
    with pytest.raises(ValueError, match="low: got 3, expected below high"):
        q.fake_quantize(torch.ones(2), torch.tensor(1.0), 3, 3)
    with pytest.raises(ValueError, match=r"scale: got shape \[3\]"):
        q.fake_quantize(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="scheme: got 'int8_static'"):
        q.FakeQuantizedLinear(nn.Linear(2, 2), "int8_static")
    with pytest.raises(ValueError, match="learned_step: got True with nf4"):
        q.FakeQuantizedLinear(nn.Linear(2, 2), "nf4", learned_step=True)


@pytest.mark.parametrize("learned_step", [False, True])
def test_training_through_two_bits_recovers_what_rounding_lost(learned_step: bool) -> None:
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
    student = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    student.load_state_dict(teacher.state_dict())
    student.requires_grad_(True)
    x = torch.randn(512, 32)
    target = teacher(x)
    assert q.prepare_(student, "int2_weight_only", learned_step=learned_step) == ["0", "2"]
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    first = F.mse_loss(student(x), target).item()
    for _ in range(120):
        optimizer.zero_grad()
        F.mse_loss(student(x), target).backward()
        optimizer.step()
    trained = student(x).detach()
    assert F.mse_loss(trained, target).item() < 0.6 * first
    assert q.convert_(student) == ["0", "2"]
    assert isinstance(student[0], QuantizedLinear)
    torch.testing.assert_close(student(x).detach(), trained, rtol=1e-3, atol=1e-3)


# --- models


def test_sensitivity_finds_the_layer_that_matters() -> None:
    model = mlp()
    model[2].weight.mul_(torch.where(torch.rand(20, 30) < 0.02, 30.0, 1.0))  # a layer that 4 bits ruin
    report = q.sensitivity(model, [torch.randn(64, 50)], ["int8_weight_only", "int4_weight_only"])
    assert len(report) == 6
    assert report[0].layer == "2"
    assert report[0].scheme == "int4_weight_only"
    assert [entry.sqnr for entry in report] == sorted(entry.sqnr for entry in report)
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))
    with pytest.raises(ValueError, match="schemes: got 'int8_static'"):
        q.sensitivity(model, [], ["int8_static"])


class Classifier(nn.Module):
    """One encoder layer: which of four tokens is most frequent in a sequence?"""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(self.embedding(tokens)).mean(1))
        return scores


def test_a_trained_transformer_keeps_its_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (3000, 15), generator=generator)
    labels = F.one_hot(tokens, 4).sum(1).argmax(1)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        batch = slice(step * 64 % 1984, step * 64 % 1984 + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[batch]), labels[batch]).backward()
        optimizer.step()
    model.eval()

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(tokens[2000:]).argmax(1) == labels[2000:]).float().mean())

    before = accuracy()
    assert before > 0.9
    assert sorted(quantize_(model, "int8_dynamic")) == ["head", "layer.linear1", "layer.linear2"]
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fused layer reads floating weights
    try:
        after = accuracy()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    print(f"accuracy {before:.3f} in float32, {after:.3f} in int8_dynamic")
    assert after > before - 0.01
