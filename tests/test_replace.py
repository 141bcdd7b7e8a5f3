"""replace(): in place, told, verified, and undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels._replace.verify import compare


class Block(nn.Module):
    """A model that calls torch's attention itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(-2)


class OwnAttention(nn.MultiheadAttention):
    pass


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def runs_ours(call: object, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the operator is reached: with PyTorch's own attention out of reach, everything else would fail."""
    from ptkernels.nn import attention as module

    calls = []
    monkeypatch.setattr(module, "attention", lambda *a, **k: calls.append(1) or ptk.attention(*a, **k))
    call()  # type: ignore[operator]
    monkeypatch.undo()
    return bool(calls)


def test_encoder_in_evaluation_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = encoder(), torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = copy.deepcopy(model).eval()(x, src_key_padding_mask=padding)
    report = ptk.replace(model, verify=True, example_inputs={"src": x, "src_key_padding_mask": padding})
    assert [item.path for item in report.replaced] == [
        "", "layers.0", "layers.0.self_attn", "layers.1", "layers.1.self_attn",
    ]  # fmt: skip
    assert report.verified
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            assert runs_ours(lambda: model(x, src_key_padding_mask=padding), monkeypatch)
    kept = ~padding
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected[kept])


def test_everything_others_hold_stays() -> None:
    model = encoder()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    modules = [id(module) for module in model.modules()]
    seen = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append("self_attn"))
    model.layers[0].linear1.register_forward_hook(lambda *_: seen.append("linear1"))
    ptk.replace(model)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [id(module) for module in model.modules()] == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    model(torch.randn(1, 3, 8))
    assert seen == ["self_attn", "linear1"]


def test_undo_restores_and_a_second_call_finds_nothing() -> None:
    model = nn.Sequential(encoder(), Block())
    types = [type(module) for module in model.modules()]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    report = ptk.replace(model)
    assert [type(module) for module in model.modules()] != types
    assert ptk.replace(model).replaced == []
    report.undo()
    report.undo()
    assert [type(module) for module in model.modules()] == types
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    assert model[0].use_nested_tensor


def test_callers_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(), torch.randn(2, 5, 8)
    expected = model(x)
    report = ptk.replace(model, verify=True, example_inputs=x)
    assert "F.scaled_dot_product_attention" in str(report)
    with monkeypatch.context() as patch:
        # What a caller would reach without the replacement.
        patch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("torch's attention was called"))
        torch.testing.assert_close(model(x), expected)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), expected)


def test_dry_run_changes_nothing() -> None:
    model = encoder()
    types = [type(module) for module in model.modules()]
    report = ptk.replace(model, dry_run=True)
    assert len(report.replaced) == 5
    assert "would run on attention" in str(report)
    assert [type(module) for module in model.modules()] == types


def test_subclasses_are_left_and_said() -> None:
    report = ptk.replace(nn.ModuleDict({"a": OwnAttention(8, 2)}))
    assert report.replaced == []
    assert [(item.path, item.reason) for item in report.kept] == [
        ("a", "a subclass, whose own forward a replacement would lose")
    ]
    assert "OwnAttention" in str(report)


def test_failed_verification_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptkernels.nn import attention as module

    model = encoder()
    right = ptk.attention

    def wrong(*args: object, **options: object) -> Tensor:
        out: Tensor = right(*args, **options)  # type: ignore[call-overload]
        return out * 1.01

    monkeypatch.setattr(module, "attention", wrong)
    with pytest.raises(RuntimeError, match=r"output 0: got error .* the model was restored"):
        ptk.replace(model, verify=True, example_inputs=torch.randn(2, 5, 8))
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


class Kink(nn.Module):
    """A ReLU of a difference that float32 may round to either side of 0, and a gradient that depends on the side."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.tensor([1.0, 0.5])), shift

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.weight * x - 1.0 - self.shift)


def test_verification_knows_what_rounding_may_do() -> None:
    """A gradient that jumps is no error where another rounding of the original's weights makes it jump as well."""
    x = torch.tensor([1.0, 4.0])
    ulp = torch.finfo(torch.float32).eps
    assert all(item.holds for item in compare(Kink(0.0), Kink(-ulp / 2), x))
    assert not all(item.holds for item in compare(Kink(0.0), Kink(-1e-4), x))
    assert not all(item.holds for item in compare(Kink(1e-4), Kink(-1e-4), x))


@pytest.mark.parametrize(
    ("model", "options", "error"),
    [
        ("bert", {}, "replace: model: got str"),
        (nn.Linear(2, 2), {"ops": "softmax"}, "replace: ops: got 'softmax'"),
        (nn.Linear(2, 2), {"verify": True}, "replace: example_inputs: got None"),
        (
            nn.Linear(2, 2),
            {"verify": True, "ops": "quantized_matmul", "example_inputs": torch.zeros(1, 2)},
            "replace: verify: got True with 'quantized_matmul'",
        ),
    ],
)
def test_bad_calls(model: object, options: dict[str, object], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        ptk.replace(model, **options)  # type: ignore[arg-type]


def test_nothing_to_do_is_said() -> None:
    assert "nothing in this model" in str(ptk.replace(nn.Linear(2, 2)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.cell = nn.GRUCell(12, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(words))
        return self.head(self.cell(states.flatten(0, 1))).unflatten(0, words.shape)


def test_recurrent_layers_and_cells() -> None:
    torch.manual_seed(0)
    model, words = Tagger(), torch.randint(0, 20, (3, 7))
    report = ptk.replace(model, verify=True, example_inputs=words)
    assert [(item.path, item.op) for item in report.replaced] == [("lstm", "packed_rnn"), ("cell", "packed_rnn")]
    assert isinstance(model.lstm, ptk.nn.LSTM)
    assert any("lstm.weight_hh_l1_reverse" in item.name for item in report.verified)
    report.undo()
    assert type(model.lstm) is nn.LSTM


class Residual(nn.Module):
    """As in torchvision: one ReLU that runs twice, an addition in place, a shortcut that may be a convolution."""

    def __init__(self, channels: int, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Net(nn.Module):
    """A stem, residual blocks, a functional activation, a result that two read, and a convolution with none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Identity(), nn.ReLU())
        shortcut = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(Residual(8), Residual(8, shortcut))
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        y = F.silu(self.bn(self.conv(x)))
        y = F.leaky_relu(self.last(y), 0.3) * self.last(y)
        return y * y.sigmoid()


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(3, 4, 3), nn.LeakyReLU(0.2), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1))
        self.tail = nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x)) if x.sum() > -1e9 else x


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from ptkernels.nn import conv as module

    calls: list[int] = []
    right = ptk.conv_bn_relu
    monkeypatch.setattr(module, "conv_bn_relu", lambda *a, **k: calls.append(1) or right(*a, **k))
    return calls


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_and_what_follows_them(training: bool, fused_calls: list[int]) -> None:
    torch.manual_seed(0)
    model, x = Net().train(training), torch.randn(2, 3, 6, 5)
    plain, types = copy.deepcopy(model), [type(module) for module in model.modules()]
    report = ptk.replace(model, "conv_bn_relu", verify=True, example_inputs=x)
    assert [(item.path, item.module) for item in report.replaced] == [
        ("conv", "Conv2d-BatchNorm2d-silu"),
        ("stem.0", "Conv2d-BatchNorm2d-Identity-ReLU"),
        ("blocks.0.conv1", "Conv2d-BatchNorm2d-ReLU"),
        ("blocks.0.conv2", "Conv2d-BatchNorm2d-add-ReLU"),
        ("blocks.1.conv1", "Conv2d-BatchNorm2d-ReLU"),
        ("blocks.1.conv2", "Conv2d-BatchNorm2d-add-ReLU"),
        ("blocks.1.shortcut.0", "Conv2d-BatchNorm2d"),
    ]
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == list(plain.state_dict())
    assert ptk.replace(model, "conv_bn_relu").replaced == []
    fused_calls.clear()
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))
    assert len(fused_calls) == 2 * 7
    for (name, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))
        assert other.blocks[0].forward.module is other.blocks[0]
    report.undo()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_depthwise_convolution_of_many_taps_alone(fused_calls: list[int]) -> None:
    """The parameters' gradients are why: in the original as in the replaced model, exactly that one is exchanged."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 6, 5, padding=2, groups=6), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 5), nn.Flatten()
    )
    x = torch.randn(2, 6, 9, 8)
    report = ptk.replace(model, verify=True, example_inputs=x)
    assert [(item.path, item.module) for item in report.replaced] == [("0", "Conv2d")]
    assert "many taps" in str(report)
    fused_calls.clear()
    model(x).sum().backward()
    assert len(fused_calls) == 1


def test_the_other_mode_and_changed_attributes_are_traced_anew(fused_calls: list[int]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.alpha, self.act = nn.Conv2d(2, 2, 1), 1.0, nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.999, self.training)
            return self.alpha * self.act(self.conv(x))

    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(1, 2, 50, 50)
    ptk.replace(model, "conv_bn_relu")
    assert (model(x) == model.act(model.conv.bias).view(1, 2, 1, 1)).float().mean() > 0.9
    model.eval()
    once = model(x)
    torch.testing.assert_close(once, F.relu(model.conv(x)))
    model.alpha = 2.0
    assert torch.equal(model(x), 2 * once)
    assert len(fused_calls) == 3
    model.act = nn.Softplus()  # nothing to fuse any more
    torch.testing.assert_close(model(x), 2 * F.softplus(model.conv(x)))
    assert len(fused_calls) == 3


def test_residuals_that_broadcast_or_promote_are_added_apart() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding="same")

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return (self.conv(x) + shift).relu_()

    model, x = Biased(), torch.randn(2, 3, 5, 5)
    plain = copy.deepcopy(model)
    assert ptk.replace(model, "conv_bn_relu").replaced[0].module == "Conv2d-add-relu_"
    for shift in (torch.randn(4, 1, 1), torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5, dtype=torch.float64)):
        # The convolution is float32's, whatever is added to it.
        torch.testing.assert_close(model(x, shift), plain(x, shift), rtol=1e-5, atol=1e-5)


def test_untraceable_models_are_said_and_their_parts_fused() -> None:
    torch.manual_seed(0)
    model, x = Untraceable(), torch.randn(2, 3, 6)
    report = ptk.replace(model, "conv_bn_relu", verify=True, example_inputs=x)
    assert [item.path for item in report.replaced] == ["body.0"]
    assert [(item.path, item.reason) for item in report.kept] == [
        ("", "what its forward does cannot be told without running it")
    ]


def test_hooks_on_inner_activations_are_honoured(fused_calls: list[int]) -> None:
    """Before replace they keep a chain as it is, and it says so; after it, the original forward runs for them."""
    model, x = Net().eval(), torch.randn(2, 3, 6, 5)
    seen: list[Tensor] = []

    def hook(module: nn.Module, given: object, result: Tensor) -> None:
        seen.append(result)

    model.stem[1].register_forward_hook(hook)
    report = ptk.replace(model, "conv_bn_relu")
    assert ("stem.0", "a hook looks at one of them") in [(item.path, item.reason) for item in report.kept]
    model(x)
    assert (len(seen), len(fused_calls)) == (1, 6)
    handle = model.blocks[0].bn1.register_forward_hook(hook)
    model(x)
    assert (len(seen), len(fused_calls)) == (3, 6 + 4)
    handle.remove()
    model(x)
    assert (len(seen), len(fused_calls)) == (4, 6 + 4 + 6)


def test_a_child_called_from_elsewhere_is_itself() -> None:
    """A model that walks through a Sequential's children gets what each of them computes."""
    model, x = Net().eval(), torch.randn(2, 3, 6, 5)
    expected = [model.stem[0](x), model.stem[1](x.repeat(1, 3, 1, 1)[:, :8])]
    ptk.replace(model, "conv_bn_relu")
    assert torch.equal(model.stem[0](x), expected[0])
    assert torch.equal(model.stem[1](x.repeat(1, 3, 1, 1)[:, :8]), expected[1])


def test_fused_blocks_compile() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 6, 5)
    expected = model(x)
    ptk.replace(model, "conv_bn_relu")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    for other in (model, copy.deepcopy(model)):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(other, fullgraph=True, backend=backend)(x), expected)
        assert graphs.pop().count("torch.ops.ptkernels.conv_bn_relu") == 7


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("op", ["attention", "conv_bn_relu"])
def test_an_exchanged_forward_compiles_exports_and_traces(op: str) -> None:
    """That of the whole model, which is more than that of a part: export looks at where it is written."""
    torch.manual_seed(0)
    model, x = (Block(), torch.randn(2, 5, 8)) if op == "attention" else (Residual(3), torch.randn(2, 3, 6, 5))
    expected = model.eval()(x)
    ptk.replace(model, op)
    program = torch.export.export(model, (x,))
    traced = torch.jit.trace(model, x)
    torch._dynamo.reset()
    for other in (program.module(), traced, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(other(x), expected)
    assert any(str(node.target) == f"ptkernels.{op}.default" for node in program.graph.nodes)
    assert f"ptkernels::{op}" in str(traced.inlined_graph)
    assert F.scaled_dot_product_attention is not ptk.attention


def test_quantization_only_when_asked_for() -> None:
    torch.manual_seed(0)
    model, words = Tagger(), torch.randint(0, 20, (3, 7))
    head, expected = model.head, model.eval()(words)
    assert ptk.replace(model).replaced[-1].op == "packed_rnn"
    report = ptk.replace(model, ops="quantized_matmul")
    assert isinstance(model.head, ptk.nn.QuantizedLinear)
    error = (model(words) - expected).abs().max().item()
    assert 0 < error < 0.02 * expected.abs().max().item()
    report.undo()
    assert model.head is head


def test_patch_sdpa_nests_and_ends() -> None:
    original = F.scaled_dot_product_attention
    with ptk.patch_sdpa(), ptk.patch_sdpa():
        assert F.scaled_dot_product_attention is ptk.attention
    assert F.scaled_dot_product_attention is original
