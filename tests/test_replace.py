"""replace(): in place, told, verified, and undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptkernels as ptk


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

    def wrong(*args: object, **options: object) -> tuple[Tensor, Tensor]:
        out, lse = right(*args, **options)  # type: ignore[call-overload]
        return out * 1.01, lse

    monkeypatch.setattr(module, "attention", wrong)
    with pytest.raises(RuntimeError, match=r"output 0: got error .* the model was restored"):
        ptk.replace(model, verify=True, example_inputs=torch.randn(2, 5, 8))
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


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


class Net(nn.Module):
    """A convolution that two read, an activation that runs twice, and a chain that is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.relu(self.bn1(self.conv1(x)))
        z = self.conv2(y)
        return self.relu(self.bn2(z) + x) + z


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(3, 4, 3), nn.LeakyReLU(0.2), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_and_what_follows_them(training: bool) -> None:
    torch.manual_seed(0)
    model, x = Net().train(training), torch.randn(2, 3, 6, 5)
    plain = copy.deepcopy(model)
    report = ptk.replace(model, "conv_bn_relu", verify=True, example_inputs=x)
    assert [item.path for item in report.replaced] == ["stem.0", "stem.1", "stem.2", "conv1", "bn1"]
    assert list(model.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))
    for (name, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))
    report.undo()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_untraceable_models_are_read_by_their_sequentials() -> None:
    torch.manual_seed(0)
    model, x = Untraceable(), torch.randn(2, 3, 6)
    report = ptk.replace(model, "conv_bn_relu", verify=True, example_inputs=x)
    assert [item.path for item in report.replaced] == ["body.0", "body.1"]


def test_hooked_convolutions_are_left_and_said() -> None:
    model = Net()
    seen: list[Tensor] = []
    model.stem[2].register_forward_hook(lambda *given: seen.append(given[2]))
    report = ptk.replace(model, "conv_bn_relu")
    assert ("stem.0", "a hook looks at one of them") in [(item.path, item.reason) for item in report.kept]
    model(torch.randn(2, 3, 6, 5))
    assert len(seen) == 1


def test_quantization_only_when_asked_for() -> None:
    torch.manual_seed(0)
    model, words = Tagger(), torch.randint(0, 20, (3, 7))
    head, expected = model.head, model.eval()(words)
    assert ptk.replace(model).replaced[-1].op == "packed_rnn"
    report = ptk.replace(model, ops="quantized_matmul")
    assert isinstance(model.head, ptk.nn.QuantizedLinear)
    error = float((model(words) - expected).abs().max())
    assert 0 < error < 0.02 * float(expected.abs().max())
    report.undo()
    assert model.head is head


def test_patch_sdpa_nests_and_ends() -> None:
    original = F.scaled_dot_product_attention
    with ptk.patch_sdpa(), ptk.patch_sdpa():
        assert F.scaled_dot_product_attention is ptk.attention
    assert F.scaled_dot_product_attention is original
