"""BERT, T5, ViT and Swin: transformers' weights and results, the references in float64, training."""

from __future__ import annotations

import copy
import csv
from importlib import resources
from typing import Any

import pytest
import torch
from as_torch import assert_as_torch, assert_state_round_trip
from learning import learn
from real_images import digits
from torch import Tensor
from torch.nn import functional as F

import ptkernels as ptk
from ptkernels.models import (
    T5,
    Bert,
    BertClassifier,
    BertForMaskedLM,
    SentenceEncoderConfig,
    Swin,
    T5Config,
    ViT,
    generate,
)
from ptkernels.models.vision_transformer import SwinBlock

BERT = SentenceEncoderConfig(40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=32)
T5_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "head_dim": 6,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 3,
}
LENGTHS = torch.tensor([9, 4, 1])
MASK = torch.arange(9) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers")


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 40, shape)


def scattered(model: Any, amount: float = 0.2) -> Any:
    """Every parameter away from its initial value: biases that are 0 and norms that are 1 would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model.eval()


def t5(**changes: Any) -> T5:
    # Scores have no scale: with more, a softmax is all on one key, and float32 has no digits left.
    return scattered(T5(T5Config(**T5_SIZES, **changes)), 0.05)


def vit(**changes: Any) -> ViT:
    sizes = {"image_size": 12, "patch_size": 4, "num_classes": 10, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    return ViT(**{**sizes, **changes})


def swin() -> Swin:
    return Swin(num_classes=10, hidden_size=8, depths=(2, 2), num_heads=(2, 4), window=4, patch_size=2)


MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "Bert": (lambda: Bert(BERT), (tokens(3, 9), MASK)),
    "BertForMaskedLM": (lambda: BertForMaskedLM(Bert(BERT)), (tokens(3, 9), MASK.long())),
    "BertClassifier": (lambda: BertClassifier(Bert(BERT), 3), (tokens(3, 9), MASK)),
    "T5": (t5, (tokens(3, 9), tokens(3, 5), MASK)),
    "T5 gated": (lambda: t5(activation="geglu_tanh", tie_embeddings=False), (tokens(3, 9), tokens(3, 5))),
    "ViT": (vit, (torch.randn(2, 3, 12, 12),)),
    "Swin": (swin, (torch.randn(2, 3, 24, 16),)),
    "Swin, padded": (swin, (torch.randn(2, 3, 22, 14),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_as_torch(name: str) -> None:
    make, inputs = MODELS[name]
    model = scattered(make(), 0.05)
    assert_as_torch(model, *inputs)
    assert_state_round_trip(model, make(), *inputs)


# --- transformers' weights


@torch.no_grad()
def test_bert_is_transformers_bert(transformers: Any) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    theirs = scattered(transformers.BertModel(config))
    ours = Bert.from_transformers(theirs)
    ids, segment = tokens(3, 9), torch.arange(9).ge(4).long().expand(3, -1)
    expected = theirs(ids, attention_mask=MASK.long(), token_type_ids=segment).last_hidden_state
    torch.testing.assert_close(ours(ids, MASK, segment)[MASK], expected[MASK], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@torch.no_grad()
def test_t5_is_transformers_t5(transformers: Any, activation: str) -> None:
    config = transformers.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_heads=3,
        feed_forward_proj=activation,
        decoder_start_token_id=0,
    )
    theirs = scattered(transformers.T5ForConditionalGeneration(config))
    ours = T5.from_transformers(theirs)
    source, target = tokens(3, 40), tokens(3, 25)
    mask = torch.arange(40) < torch.tensor([40, 23, 2])[:, None]
    expected = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours(source, target, mask), expected, rtol=1e-4, atol=1e-4)

    options = {"max_new_tokens": 8, "eos_token_id": 1, "pad_token_id": 3}
    for beams in ({}, {"num_beams": 3, "length_penalty": 1.5}):
        extra = {"early_stopping": "never"} if beams else {}
        wanted = theirs.generate(source, attention_mask=mask.long(), do_sample=False, **beams, **extra, **options)
        state = ours.start(source, mask, capacity=9)
        start = torch.zeros(3, 1, dtype=torch.int64)
        assert torch.equal(generate(ours, start, state=state, **beams, **options), wanted[:, 1:])


@torch.no_grad()
def test_vit_is_transformers_vit(transformers: Any) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=12,
        patch_size=4,
        num_labels=10,
    )
    theirs, ours = scattered(transformers.ViTForImageClassification(config)), vit(mlp_size=32, norm_eps=1e-12).eval()
    saved, layers = theirs.state_dict(), {}
    layers["class_token"] = saved["vit.embeddings.cls_token"]
    layers["position_embedding"] = saved["vit.embeddings.position_embeddings"]
    for part in ("weight", "bias"):
        layers[f"patch_embedding.{part}"] = saved[f"vit.embeddings.patch_embeddings.projection.{part}"]
        layers[f"norm.{part}"], layers[f"head.{part}"] = saved[f"vit.layernorm.{part}"], saved[f"classifier.{part}"]
        for index in range(2):
            old, new = f"vit.layers.{index}", f"layers.{index}"
            projections = [saved[f"{old}.attention.{letter}_proj.{part}"] for letter in "qkv"]
            layers[f"{new}.self_attn.in_proj_{part}"] = torch.cat(projections)
            layers[f"{new}.self_attn.out_proj.{part}"] = saved[f"{old}.attention.o_proj.{part}"]
            layers[f"{new}.norm1.{part}"] = saved[f"{old}.layernorm_before.{part}"]
            layers[f"{new}.norm2.{part}"] = saved[f"{old}.layernorm_after.{part}"]
            layers[f"{new}.linear1.{part}"] = saved[f"{old}.mlp.fc1.{part}"]
            layers[f"{new}.linear2.{part}"] = saved[f"{old}.mlp.fc2.{part}"]
    ours.load_state_dict(layers)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_swin_is_transformers_swin(transformers: Any) -> None:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10
    )
    theirs, ours = scattered(transformers.SwinForImageClassification(config)), swin().eval()
    saved = {}
    for name, tensor in theirs.state_dict().items():
        saved[name.removeprefix("swin.").removeprefix("encoder.")] = tensor
    state = {
        "head.weight": saved["classifier.weight"],
        "head.bias": saved["classifier.bias"],
        "stages.1.0.reduction.weight": saved["layers.0.downsample.reduction.weight"],
    }
    for part in ("weight", "bias"):
        state[f"patch_embedding.{part}"] = saved[f"embeddings.patch_embeddings.projection.{part}"]
        state[f"embedding_norm.{part}"] = saved[f"embeddings.norm.{part}"]
        state[f"norm.{part}"] = saved[f"layernorm.{part}"]
        state[f"stages.1.0.norm.{part}"] = saved[f"layers.0.downsample.norm.{part}"]
    for stage in range(2):
        for index in range(2):
            old, new = f"layers.{stage}.blocks.{index}", f"stages.{stage}.{index + stage}"
            table = f"{old}.attention.relative_position_bias.relative_position_bias_table"
            state[f"{new}.attention.bias_table"] = saved[table]
            for part in ("weight", "bias"):
                projections = [saved[f"{old}.attention.{letter}_proj.{part}"] for letter in "qkv"]
                state[f"{new}.attention.qkv.{part}"] = torch.cat(projections)
                state[f"{new}.attention.out.{part}"] = saved[f"{old}.attention.o_proj.{part}"]
                state[f"{new}.norm1.{part}"] = saved[f"{old}.layernorm_before.{part}"]
                state[f"{new}.norm2.{part}"] = saved[f"{old}.layernorm_after.{part}"]
                state[f"{new}.mlp.up.{part}"] = saved[f"{old}.mlp.fc1.{part}"]
                state[f"{new}.mlp.down.{part}"] = saved[f"{old}.mlp.fc2.{part}"]
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


# --- what attention in windows must hold


@torch.no_grad()
def test_shifted_windows_do_not_join_opposite_edges() -> None:
    """A change of one patch reaches its own shifted window and nothing else."""
    block = scattered(SwinBlock(8, 2, window=4, shift=2))
    x = torch.randn(1, 12, 12, 8)
    changed = x.clone()
    changed[0, 0, 5] = torch.randn(8)
    reached = ((block(x) - block(changed)).abs().sum(-1) > 1e-6)[0]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[0:2, 2:6] = True
    assert torch.equal(reached, expected)


# --- training


def test_masked_language_model_learns_sentences() -> None:
    """15% of the bytes of English and Vietnamese sentences are hidden, and guessed better and better."""
    text = resources.files("ptkernels.cli.bench").joinpath("data/sentences.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))[:16]
    sentences = [torch.tensor(list(row[name].encode())[:24]) for row in rows for name in ("english", "vietnamese")]
    ids = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True)
    mask = ids != 0
    hidden = mask & (torch.rand(ids.shape) < 0.15)
    config = SentenceEncoderConfig(
        257, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=64, max_positions=24, dropout=0.1
    )
    model = BertForMaskedLM(Bert(config))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = learn(
        optimizer, lambda: F.cross_entropy(model(ids.masked_fill(hidden, 256), mask)[hidden], ids[hidden]), 20
    )
    assert losses[-1] < 0.7 * losses[0]


def test_encoder_decoder_learns_to_reverse() -> None:
    model = T5(T5Config(vocab_size=8, hidden_size=32, head_dim=8, intermediate_size=64, num_layers=1, num_heads=4))
    source = torch.randint(2, 8, (32, 4))
    answer = source.flip(1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = learn(optimizer, lambda: model.loss(source, answer), 60)
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    start = torch.zeros(32, 1, dtype=torch.int64)
    found = generate(model, start, 4, state=model.start(source, capacity=5))
    assert (found == answer).float().mean() > 0.5
    for beams in (1, 3):
        state = model.start(source[:2], capacity=5)
        assert torch.equal(generate(model, start[:2], 4, state=state, num_beams=beams)[:, 0], found[:2, 0])


@torch.no_grad()
def test_answers_in_pieces_are_the_whole() -> None:
    model = t5()
    source, target = tokens(3, 9), tokens(3, 7)
    state = model.start(source, MASK, capacity=7)
    pieces = torch.cat([model.score(piece, state) for piece in target.split([3, 1, 3], 1)], 1)
    torch.testing.assert_close(pieces, model(source, target, MASK), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="KVCache: append: got 8 tokens in a row, expected at most 7"):
        model.score(target[:, :1], state)
    with pytest.raises(ValueError, match=r"state: got None, expected that of T5\.start"):
        generate(model, target[:, :1], 3)


@torch.no_grad()
def test_speculative_answers_are_the_greedy_ones() -> None:
    model, draft = t5(), t5(activation="geglu_tanh")
    source, start = tokens(3, 9), torch.zeros(3, 1, dtype=torch.int64)
    expected = generate(model, start, 7, state=model.start(source, MASK, capacity=8))

    class WithSource:
        """The draft too must know the source."""

        step, score = draft.step, draft.score

        def new_state(self, batch_size: int, capacity: int) -> Any:
            return draft.start(source, MASK, capacity=capacity)

    state = model.start(source, MASK, capacity=20)
    assert torch.equal(generate(model, start, 7, state=state, draft=WithSource(), num_draft_tokens=3), expected)


@pytest.mark.parametrize("make", [vit, swin])
def test_vision_transformers_learn_digits(make: Any) -> None:
    images, classes = digits(64, 12)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = learn(optimizer, lambda: F.cross_entropy(model(images), classes), 20)
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
def test_attention_weights_for_a_picture() -> None:
    """What the class token looks at, in every head of the last layer: asked for with a hook, summing to 1."""
    model, seen = vit().eval(), []
    attention = model.layers[-1].self_attn
    attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(2, 3, 12, 12)
    model(images)
    _, weights = attention(seen[0], seen[0], seen[0], average_attn_weights=False)
    assert weights.shape == (2, 2, 10, 10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 10))


@pytest.mark.parametrize("name", ["T5", "Swin", "BertForMaskedLM"])
@torch.no_grad()
def test_quantized(name: str) -> None:
    make, inputs = MODELS[name]
    model = scattered(make())
    expected = model(*inputs)
    smaller = copy.deepcopy(model)
    names = ptk.nn.quantize_(smaller, "int8_weight_only")
    assert len(names) >= 8
    error = (smaller(*inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vit(patch_size=5), r"patch_size: got 5, expected a divisor of image_size \(12\)"),
        (lambda: Swin(depths=(2,)), "num_heads: got 4 stages, expected 1"),
        (lambda: Bert(BERT)(tokens(1, 33)), r"tokens: got shape \[1, 33\], expected \[B, L\] with L <= 32"),
        (lambda: t5(activation="step"), "activation: got 'step', expected one of"),
    ],
)
def test_errors_name_the_argument(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
