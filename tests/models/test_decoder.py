"""DecoderLM: transformers' weights and results, training, and every way to generate."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from learning import learn
from torch import Tensor

import ptkernels as ptk
from ptkernels.models import DecoderConfig, DecoderLM, KVCache, generate, probabilities

VOCAB = 37
LLAMA = DecoderConfig.llama(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    max_positions=64,
)
GPT2 = DecoderConfig.gpt2(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, max_positions=64, dropout=0.0)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
PROMPTS = [torch.tensor(row) for row in ([3, 1, 4, 1, 5, 9], [2], [6, 5, 3])]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def decoder(kind: str, scale: float = 8.0, **changes: Any) -> DecoderLM:
    """Weights large enough that scores differ clearly, so that no choice hangs on rounding."""
    model = DecoderLM(DecoderConfig(**{**CONFIGS[kind].__dict__, **changes})).eval()
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.attention.qkv.weight, layer.mlp.up.weight, layer.mlp.down.weight):
                weight.mul_(scale)
        model.embedding.weight.mul_(scale)
        if not model.config.tie_embeddings:
            model.lm_head.weight.mul_(scale)
    return model


def alone(model: DecoderLM, prompt: Tensor, count: int) -> list[int]:
    """Greedy without a cache, by hand."""
    tokens = prompt.tolist()
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# --- transformers' models


def hugging_face(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
        rope_theta=5000.0,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_transformers_weights_give_transformers_results(kind: str) -> None:
    theirs = hugging_face(kind)
    ours = DecoderLM.from_transformers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    tokens = torch.randint(VOCAB, (2, 11))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)

    options = {"max_new_tokens": 9, "eos_token_id": 7, "pad_token_id": 1}
    mask = torch.ones_like(tokens)
    for beams in ({}, {"num_beams": 4, "length_penalty": 0.6}):
        extra = {"early_stopping": "never"} if beams else {}
        expected = theirs.generate(tokens, attention_mask=mask, do_sample=False, **beams, **extra, **options)[:, 11:]
        assert torch.equal(generate(ours, tokens, **beams, **options), expected)


def test_other_transformers_models_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="BertModel: model_type: got 'bert', expected gpt2 or llama"):
        DecoderLM.from_transformers(transformers.BertModel(config))


# --- training


@pytest.mark.parametrize("kind", CONFIGS)
def test_trains(kind: str) -> None:
    """Arithmetic progressions modulo the vocabulary; and a model loaded from the state goes on the same."""
    model = DecoderLM(CONFIGS[kind])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    tokens = (torch.arange(8)[:, None] * 4 + torch.arange(12) * (1 + torch.arange(8)[:, None] % 3)) % VOCAB
    losses = learn(optimizer, lambda: model.loss(tokens), 25, clip=1.0)
    assert losses[-1] < 0.5 * losses[0]
    again = DecoderLM(CONFIGS[kind])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))
    assert (again.lm_head.weight is again.embedding.weight) == CONFIGS[kind].tie_embeddings


@pytest.mark.parametrize("kind", CONFIGS)
def test_same_as_the_reference(kind: str) -> None:
    """Loss and every gradient, against the same model on the references in float64."""
    model = decoder(kind, dropout=0.0).train()
    tokens = torch.randint(VOCAB, (3, 17))
    exact = copy.deepcopy(model).double()
    with ptk.backend("reference"):
        expected = exact.loss(tokens)
        expected.backward()
    loss = model.loss(tokens)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert (ours.grad - theirs.grad).abs().max() <= 2e-5 * scale, name


def test_trains_under_dropout_and_checkpointing() -> None:
    """A layer computed again in the backward draws the same dropout: the same gradients."""
    model = decoder("gpt2", dropout=0.3).train()
    tokens = torch.randint(VOCAB, (2, 9))
    gradients = []
    for again in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        x = model.dropout(model.embedding(tokens))
        for layer in model.layers:
            x = (
                torch.utils.checkpoint.checkpoint(layer, x, None, None, use_reentrant=False)
                if again
                else layer(x, None, None)
            )
        model.norm(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.layers.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    model = decoder("llama", scale=3.0)
    tokens = torch.randint(VOCAB, (2, 16))
    expected = model(tokens).log_softmax(-1)
    rough = copy.deepcopy(model).to(dtype)
    assert rough.rotary.cos.dtype == torch.float32
    actual = rough(tokens)
    assert actual.dtype == dtype
    assert (actual.float().log_softmax(-1) - expected).abs().mean() < 0.02
    state = rough.new_state(2, 16)
    torch.testing.assert_close(rough(tokens, state), actual, rtol=0.1, atol=0.1)


# --- decoding


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_pieces_through_the_cache_are_the_whole(kind: str, window: int | None) -> None:
    model = decoder(kind, window=window)
    tokens = torch.randint(VOCAB, (2, 20))
    state = model.new_state(2, 20)
    pieces = [model(piece, state) for piece in tokens.split([7, 1, 1, 4, 7], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_greedy_of_unequal_prompts(kind: str) -> None:
    model = decoder(kind)
    expected = [alone(model, prompt, 8) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 8).tolist() == expected
    end = expected[0][3]
    found = generate(model, PROMPTS, 8, eos_token_id=end, pad_token_id=0)
    for row, wanted in zip(found.tolist(), expected, strict=True):
        kept = wanted[: wanted.index(end) + 1] if end in wanted else wanted
        assert row == (kept + [0] * 8)[: found.size(1)]


@torch.no_grad()
def test_beam_search_finds_the_best_sequence() -> None:
    """With as many beams as there are sequences nothing is pruned: brute force must agree."""
    model = decoder("llama", scale=4.0, vocab_size=4)
    prompts, end = torch.tensor([[1, 2, 3], [3, 3, 0]]), 2
    for penalty in (0.0, 1.0, 2.0):
        found = generate(model, prompts, 3, num_beams=64, eos_token_id=end, length_penalty=penalty, pad_token_id=2)
        for prompt, row in zip(prompts, found, strict=True):
            best = max(
                (
                    sequence
                    for n in (1, 2, 3)
                    for sequence in itertools.product(range(4), repeat=n)
                    if end not in sequence[:-1] and (n == 3 or sequence[-1] == end)
                ),
                key=lambda sequence: log_probability(model, prompt, sequence) / len(sequence) ** penalty,
            )
            assert tuple(row.tolist()) == (*best, *[end] * (found.size(1) - len(best)))


def log_probability(model: DecoderLM, prompt: Tensor, sequence: tuple[int, ...]) -> float:
    scores = model(torch.cat([prompt, torch.tensor(sequence)])[None])[0].log_softmax(-1)
    return sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(sequence))


@torch.no_grad()
def test_beams_of_unequal_prompts_are_those_of_each_alone() -> None:
    model = decoder("gpt2")
    together = generate(model, PROMPTS, 6, num_beams=3)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert torch.equal(generate(model, prompt[None], 6, num_beams=3)[0], row)


@pytest.mark.parametrize("proposed", [1, 4])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_speculative_tokens_are_the_greedy_ones(kind: str, proposed: int) -> None:
    """Whatever the draft proposes: another model's tokens, or the model's own, all of which stand."""
    model, other = decoder(kind), decoder("llama", num_layers=1)
    expected = generate(model, PROMPTS, 11)
    for draft in (other, model):
        assert torch.equal(generate(model, PROMPTS, 11, draft=draft, num_draft_tokens=proposed), expected)
    end = int(expected[0, 4])
    options = {"eos_token_id": end, "pad_token_id": 0}
    found = generate(model, PROMPTS, 11, draft=other, num_draft_tokens=proposed, **options)
    assert torch.equal(found, generate(model, PROMPTS, 11, **options))


@torch.no_grad()
def test_speculative_samples_have_the_models_distribution() -> None:
    """Frequencies of pairs of tokens, drawn 4,000 at a time, against the product of the model's probabilities."""
    model, draft = decoder("llama", scale=4.0, vocab_size=4), decoder("gpt2", scale=4.0, vocab_size=4)
    prompt, count = torch.tensor([1, 3, 0]), 4000
    warp = {"temperature": 0.8, "top_p": 0.9}
    first = probabilities(model(prompt[None])[0, -1], **warp)
    following = torch.stack(
        [probabilities(model(torch.cat([prompt, torch.tensor([t])])[None])[0, -1], **warp) for t in range(4)]
    )
    expected = (first[:, None] * following).flatten()
    generator = torch.Generator().manual_seed(5)
    for extra in ({}, {"draft": draft, "num_draft_tokens": 2}):
        drawn = generate(model, prompt.expand(count, -1), 2, do_sample=True, generator=generator, **warp, **extra)
        found = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16) / count
        assert bool((found[expected == 0] == 0).all())
        # Five standard deviations of a frequency.
        assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all())


@torch.no_grad()
def test_warping_is_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(5, 40) * 3
    for temperature, top_k, top_p in itertools.product((0.7, 1.3), (None, 1, 6, 60), (None, 0.05, 0.5, 0.95)):
        warpers: list[Callable[..., Tensor]] = [transformers.TemperatureLogitsWarper(temperature)]
        if top_k is not None:
            warpers.append(transformers.TopKLogitsWarper(top_k))
        if top_p is not None:
            warpers.append(transformers.TopPLogitsWarper(top_p))
        expected = logits
        for warper in warpers:
            expected = warper(torch.zeros(5, 1, dtype=torch.int64), expected)
        actual = probabilities(logits, temperature, top_k, top_p)
        torch.testing.assert_close(actual, expected.softmax(-1))
        assert torch.equal(actual == 0, expected == -torch.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"num_beams": 2, "do_sample": True}, "num_beams: got 2 with do_sample"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, r"tokens: got shape \[2, 0\]"),
        ({"tokens": [torch.zeros(0, dtype=torch.int64)]}, "tokens: got no rows, or an empty one"),
        ({"max_new_tokens": 100}, "capacity: got 101 tokens, expected at most max_positions"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(decoder("gpt2"), **{"tokens": torch.zeros(2, 1, dtype=torch.int64), "max_new_tokens": 3, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm: got 'batch', expected one of rms, layer"),
        ({"num_heads": 3}, "hidden_size: got 32, expected a multiple of num_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3, expected a divisor of 4"),
        ({"head_dim": 7}, "head_dim: got 7, expected an even number"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**LLAMA.__dict__, **change})


# --- quantized


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic", "int4_weight_only"])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_quantized(kind: str, scheme: str) -> None:
    """As close as the codes are: the same numbers as a float model that has the decoded weights."""
    model = decoder(kind, scale=3.0)
    decoded, tokens = copy.deepcopy(model), torch.randint(VOCAB, (2, 12))
    names = model.quantize_(scheme, group_size=32)
    assert len(names) == 8
    assert model.layers[0].mlp.up.activation == model.config.activation
    for name in names:
        decoded.get_submodule(name).weight.copy_(model.get_submodule(name).weight.dequantize())
    expected, actual = decoded(tokens), model(tokens)
    tolerance = 1e-4 if "weight_only" in scheme else 0.03 * float(expected.std())
    assert (actual - expected).abs().max() <= 5 * tolerance
    state = model.new_state(2, 12)
    pieces = [model(piece, state) for piece in tokens.split(4, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), actual, rtol=1e-3, atol=1e-3)
    again = DecoderLM(model.config).eval()
    again.quantize_(scheme, group_size=32)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens), actual)


@torch.no_grad()
def test_cache_of_eight_bits() -> None:
    model = decoder("llama", scale=3.0)
    tokens = torch.randint(VOCAB, (2, 20))
    expected = model(tokens)
    state = model.new_state(2, 20, torch.int8)
    assert state.keys[0].dtype == torch.int8
    actual = torch.cat([model(piece, state) for piece in tokens.split(5, 1)], 1)
    assert (actual - expected).abs().max() < 0.05 * expected.std()
    state.reorder(torch.tensor([1, 1, 0]))
    assert state.key_scales[0].shape == (3, 2, 20)


def test_cache_forgets() -> None:
    cache = KVCache(1, 2, 1, 8, 4)
    cache.lengths = torch.tensor([5, 3])
    cache.crop(torch.tensor([4, 7]))
    assert cache.lengths.tolist() == [4, 3]


def test_compiles_whole() -> None:
    model = decoder("llama")
    tokens = torch.randint(VOCAB, (2, 8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


@torch.no_grad()
def test_decoding_compiles_once_and_moves_its_cache() -> None:
    model = decoder("llama")
    tokens = torch.randint(VOCAB, (2, 8))
    plain, moved = model.new_state(2, 16), model.new_state(2, 16)
    compiled = torch.compile(model.step, backend="aot_eager", fullgraph=True)
    model.step(tokens, plain)
    model.step(tokens, moved)
    torch._dynamo.utils.counters.clear()
    for token in tokens[:, :4].split(1, 1):
        torch.testing.assert_close(compiled(token, moved), model.step(token, plain))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(moved.lengths, plain.lengths)
    torch.testing.assert_close(moved.keys, plain.keys)
