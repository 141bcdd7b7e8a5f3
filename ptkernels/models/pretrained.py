"""Weights of Hugging Face transformers in our models: which configuration, and which name becomes which.

Only what the given object holds is read, ``config`` and ``state_dict()``: transformers itself is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels.models.bert import Bert
from ptkernels.models.decoder import DecoderConfig, DecoderLM
from ptkernels.models.sentence_encoder import ENCODER_LAYER_NAMES, SentenceEncoderConfig
from ptkernels.models.t5 import T5, T5Config


def _refuse(model: Any, what: str, got: Any, expected: str) -> ValueError:
    return ValueError(f"from_transformers: {type(model).__name__}: {what}: got {got!r}, expected {expected}")


def _require(model: Any, **expected: Any) -> None:
    """Options of the configuration that change the arithmetic must be what ours does."""
    for name, value in expected.items():
        got = getattr(model.config, name, value)
        if got != value:
            raise _refuse(model, name, got, repr(value))


def _joined(saved: dict[str, Tensor], names: tuple[str, ...], part: str) -> Tensor:
    return torch.cat([saved[f"{name}.{part}"] for name in names])


def decoder_from_transformers(model: Any) -> DecoderLM:
    """See :meth:`DecoderLM.from_transformers`."""
    kinds = {"gpt2": _gpt2, "llama": _llama}
    kind = model.config.model_type
    if kind not in kinds:
        raise _refuse(model, "model_type", kind, " or ".join(kinds))
    config, state = kinds[kind](model, model.state_dict())
    ours = DecoderLM(config)
    ours.load_state_dict(state)
    return ours.to(next(model.parameters()).dtype).eval()


_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_GPT2_LAYER = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def _gpt2(model: Any, saved: dict[str, Tensor]) -> tuple[DecoderConfig, dict[str, Tensor]]:
    theirs = model.config
    _require(model, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    if theirs.activation_function not in _GPT2_ACTIVATIONS:
        raise _refuse(model, "activation_function", theirs.activation_function, " or ".join(_GPT2_ACTIVATIONS))
    config = DecoderConfig.gpt2(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.n_embd,
        num_layers=theirs.n_layer,
        num_heads=theirs.n_head,
        intermediate_size=theirs.n_inner,
        max_positions=theirs.n_positions,
        activation=_GPT2_ACTIVATIONS[theirs.activation_function],
        dropout=theirs.resid_pdrop,
        norm_eps=theirs.layer_norm_epsilon,
        tie_embeddings=theirs.tie_word_embeddings,
    )
    state = {
        "embedding.weight": saved["transformer.wte.weight"],
        "position_embedding.weight": saved["transformer.wpe.weight"],
        "norm.weight": saved["transformer.ln_f.weight"],
        "norm.bias": saved["transformer.ln_f.bias"],
        "lm_head.weight": saved["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        for name, ours in _GPT2_LAYER.items():
            weight, bias = (saved[f"transformer.h.{layer}.{name}.{part}"] for part in ("weight", "bias"))
            # Their Conv1D stores a matrix as [in, out].
            state[f"layers.{layer}.{ours}.weight"] = weight.T if weight.dim() == 2 else weight
            state[f"layers.{layer}.{ours}.bias"] = bias
    return config, state


_LLAMA_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.down_proj": "mlp.down",
}
# What is one product here is several there, in this order.
_LLAMA_JOINED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
}


def _llama(model: Any, saved: dict[str, Tensor]) -> tuple[DecoderConfig, dict[str, Tensor]]:
    theirs = model.config
    _require(model, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": theirs.rope_theta}
    if rope.get("rope_type", "default") != "default":
        raise _refuse(model, "rope_type", rope["rope_type"], "'default'")
    config = DecoderConfig.llama(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None),
        intermediate_size=theirs.intermediate_size,
        max_positions=theirs.max_position_embeddings,
        rope_theta=rope["rope_theta"],
        norm_eps=theirs.rms_norm_eps,
        tie_embeddings=theirs.tie_word_embeddings,
    )
    state = {
        "embedding.weight": saved["model.embed_tokens.weight"],
        "norm.weight": saved["model.norm.weight"],
        "lm_head.weight": saved["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        for name, ours in _LLAMA_LAYER.items():
            state[f"layers.{layer}.{ours}.weight"] = saved[f"model.layers.{layer}.{name}.weight"]
        for ours, parts in _LLAMA_JOINED.items():
            names = tuple(f"model.layers.{layer}.{part}" for part in parts)
            state[f"layers.{layer}.{ours}.weight"] = _joined(saved, names, "weight")
    return config, state


def bert_from_transformers(model: Any) -> Bert:
    """See :meth:`ptkernels.models.Bert.from_transformers`."""
    theirs, saved = model.config, model.state_dict()
    _require(model, model_type="bert", hidden_act="gelu", position_embedding_type="absolute")
    config = SentenceEncoderConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        intermediate_size=theirs.intermediate_size,
        max_positions=theirs.max_position_embeddings,
        layer_norm_eps=theirs.layer_norm_eps,
        dropout=theirs.hidden_dropout_prob,
    )
    state = {}
    for ours, name in (
        ("word_embeddings", "word_embeddings"),
        ("position_embeddings", "position_embeddings"),
        ("segment_embeddings", "token_type_embeddings"),
    ):
        state[f"{ours}.weight"] = saved[f"embeddings.{name}.weight"]
    for part in ("weight", "bias"):
        state[f"embedding_norm.{part}"] = saved[f"embeddings.LayerNorm.{part}"]
        for layer in range(config.num_layers):
            for name, ours in ENCODER_LAYER_NAMES.items():
                state[f"layers.{layer}.{ours}.{part}"] = saved[f"encoder.layer.{layer}.{name}.{part}"]
    ours_bert = Bert(config, theirs.type_vocab_size)
    ours_bert.load_state_dict(state)
    return ours_bert.to(model.dtype).eval()


_T5_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}


def _t5_layer(saved: dict[str, Tensor], theirs: str, ours: str, decoder: bool) -> dict[str, Tensor]:
    blocks = [("self", "SelfAttention"), *([("cross", "EncDecAttention")] if decoder else [])]
    state = {}
    for index, (block, name) in enumerate(blocks):
        state[f"{ours}.{block}_norm.weight"] = saved[f"{theirs}.layer.{index}.layer_norm.weight"]
        for short, long in _T5_ATTENTION.items():
            weight = saved[f"{theirs}.layer.{index}.{name}.{short}.weight"]
            state[f"{ours}.{block}_attention.{long}.weight"] = weight
    last = f"{theirs}.layer.{len(blocks)}"
    inner = f"{last}.DenseReluDense"
    ups = (f"{inner}.wi_0", f"{inner}.wi_1") if f"{inner}.wi_0.weight" in saved else (f"{inner}.wi",)
    state[f"{ours}.mlp_norm.weight"] = saved[f"{last}.layer_norm.weight"]
    state[f"{ours}.mlp.up.weight"] = _joined(saved, ups, "weight")
    state[f"{ours}.mlp.down.weight"] = saved[f"{inner}.wo.weight"]
    return state


def t5_from_transformers(model: Any) -> T5:
    """See :meth:`ptkernels.models.T5.from_transformers`."""
    theirs, saved = model.config, model.state_dict()
    _require(model, model_type="t5", num_decoder_layers=theirs.num_layers)
    activations = {"relu": "relu", "gated-gelu": "geglu_tanh"}
    if theirs.feed_forward_proj not in activations:
        raise _refuse(model, "feed_forward_proj", theirs.feed_forward_proj, " or ".join(activations))
    config = T5Config(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.d_model,
        head_dim=theirs.d_kv,
        intermediate_size=theirs.d_ff,
        num_layers=theirs.num_layers,
        num_heads=theirs.num_heads,
        num_buckets=theirs.relative_attention_num_buckets,
        max_distance=theirs.relative_attention_max_distance,
        activation=activations[theirs.feed_forward_proj],
        dropout=theirs.dropout_rate,
        norm_eps=theirs.layer_norm_epsilon,
        tie_embeddings=getattr(theirs, "scale_decoder_outputs", theirs.tie_word_embeddings),
    )
    state = {"embedding.weight": saved["shared.weight"], "lm_head.weight": saved["lm_head.weight"]}
    for side in ("encoder", "decoder"):
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        state[f"{side}_bias.table.weight"] = saved[table]
        state[f"{side}_norm.weight"] = saved[f"{side}.final_layer_norm.weight"]
        for layer in range(config.num_layers):
            state |= _t5_layer(saved, f"{side}.block.{layer}", f"{side}.{layer}", side == "decoder")
    ours = T5(config)
    ours.load_state_dict(state)
    return ours.to(model.dtype).eval()
