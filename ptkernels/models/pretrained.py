"""Weights of Hugging Face transformers in our models: which configuration, and which name becomes which.

Only what the given object holds is read, ``config`` and ``state_dict()``: transformers itself is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels.models.decoder import DecoderConfig, DecoderLM


def _refuse(model: Any, what: str, got: Any, expected: str) -> ValueError:
    return ValueError(f"from_transformers: {type(model).__name__}: {what}: got {got!r}, expected {expected}")


def _require(model: Any, **expected: Any) -> None:
    """Options of the configuration that change the arithmetic must be what ours does."""
    for name, value in expected.items():
        got = getattr(model.config, name, value)
        if got != value:
            raise _refuse(model, name, got, repr(value))


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
            weights = [saved[f"model.layers.{layer}.{part}.weight"] for part in parts]
            state[f"layers.{layer}.{ours}.weight"] = torch.cat(weights)
    return config, state
