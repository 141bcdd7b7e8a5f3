"""Decoder-only language models: GPT-2 and Llama are two settings of the same few parts.

A pre-norm transformer (Vaswani et al., 2017; Radford et al., 2019; Touvron et al., 2023): causal attention, with fewer
key heads than query heads where asked for, and a feed-forward block, each added to the residual stream. Training runs
:func:`ptkernels.attention`. Generation runs :func:`ptkernels.attention_with_kv_cache`, which rotates, appends and
attends in one call. Quantized layers (:meth:`DecoderLM.quantize_`) compute their activation and the residual sum
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.models.blocks import ACTIVATIONS, FeedForward, fuse_activations, project
from ptkernels.models.kv_cache import KVCache
from ptkernels.nn.quantized import quantize_
from ptkernels.ops.attention import attention
from ptkernels.ops.attention_kv_cache import attention_with_kv_cache
from ptkernels.ops.rotary_embedding import rotary_embedding


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and parts of a :class:`DecoderLM`.

    Args:
        vocab_size: number of tokens.
        hidden_size: features of a token.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``. Default: ``num_heads``.
        head_dim: features of a head. Default: ``hidden_size / num_heads``.
        intermediate_size: features between the two products of the feed-forward block. Default: ``4 * hidden_size``.
        max_positions: longest sequence.
        positions: ``"rotary"`` (queries and keys are rotated) or ``"learned"`` (a vector per position is added).
        norm: ``"rms"`` or ``"layer"``.
        activation: one of :data:`ptkernels.models.blocks.ACTIVATIONS`.
        bias: whether linear layers have one.
        tie_embeddings: score tokens with the embedding's own weight.
        dropout: probability of dropping an embedding, an attention weight, or an output of a block.
        window: most tokens a query sees, itself included. Default: all before it.
        rope_theta: base of the rotation's wavelengths.
        norm_eps: added to variances.

    Raises:
        ValueError: sizes that do not divide, or a part there is not.

    Example:
        >>> DecoderConfig(vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2).head_size
        16
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_positions: int = 2048
    positions: str = "rotary"
    norm: str = "rms"
    activation: str = "swiglu"
    bias: bool = False
    tie_embeddings: bool = False
    dropout: float = 0.0
    window: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, choices in (
            ("positions", ("rotary", "learned")),
            ("norm", ("rms", "layer")),
            ("activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"DecoderConfig: {name}: got {getattr(self, name)!r}, expected one of {expected}")
        if self.head_dim is None and self.hidden_size % self.num_heads != 0:
            raise ValueError(
                f"DecoderConfig: hidden_size: got {self.hidden_size}, expected a multiple of num_heads "
                f"({self.num_heads}), or head_dim"
            )
        if self.num_heads % self.kv_heads != 0:
            raise ValueError(
                f"DecoderConfig: num_kv_heads: got {self.num_kv_heads}, expected a divisor of {self.num_heads}"
            )
        if self.positions == "rotary" and self.head_size % 2 != 0:
            raise ValueError(f"DecoderConfig: head_dim: got {self.head_size}, expected an even number to rotate")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def inner_size(self) -> int:
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @classmethod
    def gpt2(cls, **changes: Any) -> DecoderConfig:
        """GPT-2 small (124 million parameters); ``changes`` replace fields."""
        sizes: dict[str, Any] = {"vocab_size": 50257, "hidden_size": 768, "num_layers": 12, "num_heads": 12}
        parts = {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": True}
        return cls(**{**sizes, "max_positions": 1024, "tie_embeddings": True, "dropout": 0.1, **parts, **changes})

    @classmethod
    def llama(cls, **changes: Any) -> DecoderConfig:
        """TinyLlama's sizes (1.1 billion parameters); ``changes`` replace fields."""
        sizes: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 2048, "num_layers": 22, "num_heads": 32}
        return cls(**{**sizes, "num_kv_heads": 4, "intermediate_size": 5632, **changes})


class Rotary(nn.Module):
    """Angles of rotary positions (Su et al., 2021), ``cos`` and ``sin`` ``[positions, head_dim / 2]``.

    They stay float32 in a model of narrower dtype: position 1000 times a frequency has more digits than bfloat16.

    Example:
        >>> Rotary(positions=16, head_dim=8).to(torch.bfloat16).cos.dtype
        torch.float32
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, positions: int, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.positions, self.head_dim, self.theta = positions, head_dim, theta
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self._fill()

    def _fill(self) -> None:
        like = self.cos
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        with torch.device(like.device):
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
            angles = torch.outer(torch.arange(self.positions, dtype=torch.float64), self.theta**-exponents)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill()
        return self

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, H, L, head_dim]`` both, rotated by their positions from 0 on."""
        return rotary_embedding(query, key, self.cos, self.sin)


class SelfAttention(nn.Module):
    """Causal attention among the tokens of a sequence, or of new tokens to those in a cache."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.num_heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.hidden_size, heads * config.head_size, config.bias)
        self.out = nn.Linear(config.num_heads * config.head_size, config.hidden_size, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor, rotary: Rotary | None, cache: KVCache | None) -> Tensor:
        config = self.config
        heads = self.qkv(x).unflatten(-1, (-1, config.head_size)).transpose(1, 2)
        query, key, value = heads.split([config.num_heads, config.kv_heads, config.kv_heads], 1)
        window = None if config.window is None else (config.window - 1, 0)
        if cache is None:
            if rotary is not None:
                query, key = rotary(query, key)
            dropout_p = self.dropout.p if self.training else 0.0
            attended = attention(query, key, value, None, dropout_p, True, enable_gqa=True, window=window)
        else:
            k_scale, v_scale = cache.scales(self.layer)
            attended = attention_with_kv_cache(
                query,
                cache.keys[self.layer],
                cache.values[self.layer],
                key,
                value,
                cache_seqlens=cache.lengths,
                rotary_cos=None if rotary is None else rotary.cos,
                rotary_sin=None if rotary is None else rotary.sin,
                window=window,
                k_scale=k_scale,
                v_scale=v_scale,
            )
        return project(self.out, attended.transpose(1, 2).flatten(2), residual, self.dropout)


def _norm(config: DecoderConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each over the normalised stream and added to it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = _norm(config)
        sizes = (config.hidden_size, config.inner_size)
        self.mlp = FeedForward(*sizes, config.activation, config.bias, config.dropout)

    def forward(self, x: Tensor, rotary: Rotary | None, cache: KVCache | None) -> Tensor:
        x = self.attention(self.attention_norm(x), x, rotary, cache)
        out: Tensor = self.mlp(self.mlp_norm(x), x)
        return out


class DecoderLM(nn.Module):
    """Scores of the next token after each token; :func:`ptkernels.models.generate` continues prompts with it.

    Args:
        config: sizes and parts, such as :meth:`DecoderConfig.gpt2` and :meth:`DecoderConfig.llama`.

    Shape:
        ``tokens`` int64 ``[B, L]`` to ``[B, L, vocab_size]``. With ``state`` the tokens continue what it holds, which
        grows in place; that is for inference. Time is ``O(L (L + hidden_size) hidden_size)`` per layer.

    Raises:
        ValueError: more tokens than ``max_positions``, or than the state has room for.

    Example:
        >>> import torch
        >>> from ptkernels.models import generate
        >>> config = DecoderConfig.llama(
        ...     vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96
        ... )
        >>> model = DecoderLM(config).eval()
        >>> tokens = torch.randint(100, (2, 10))
        >>> model(tokens).shape
        torch.Size([2, 10, 100])
        >>> model.quantize_("int8_dynamic")[:2]
        ['layers.0.attention.qkv', 'layers.0.attention.out']
        >>> generate(model, tokens, max_new_tokens=5, do_sample=True, top_p=0.9).shape
        torch.Size([2, 5])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size) if learned else None
        self.rotary = None if learned else Rotary(config.max_positions, config.head_size, config.rope_theta)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = _norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # What is added to the stream is scaled down, so that its variance does not grow with depth.
                depth = (2 * self.config.num_layers) ** 0.5 if name.endswith((".out", ".down")) else 1.0
                nn.init.normal_(module.weight, std=0.02 / depth)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, tokens: Tensor, state: KVCache | None = None) -> Tensor:
        """The normalised stream after the last layer, ``[B, L, hidden_size]``."""
        room = self.config.max_positions if state is None else state.capacity
        if tokens.dim() != 2 or tokens.size(1) > room:
            raise ValueError(f"DecoderLM: tokens: got shape {list(tokens.shape)}, expected [B, L] with L <= {room}")
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            position = torch.arange(tokens.size(1), device=tokens.device)
            x = x + self.position_embedding(position if state is None else state.lengths[:, None] + position)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, self.rotary, state)
        if state is not None:
            state.lengths = state.lengths + tokens.size(1)
        out: Tensor = self.norm(x)
        return out

    def forward(self, tokens: Tensor, state: KVCache | None = None) -> Tensor:
        scores: Tensor = self.lm_head(self.hidden(tokens, state))
        return scores

    def score(self, tokens: Tensor, state: KVCache) -> Tensor:
        """As :meth:`forward`, for :func:`ptkernels.models.generate`."""
        return self.forward(tokens, state)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of every token ``[B, L]`` but the first of a row, given those before it."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def new_state(self, batch_size: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for ``capacity`` tokens a row; ``dtype=torch.int8`` stores it in 8 bits.

        Raises:
            ValueError: ``capacity`` is more than ``max_positions``.
        """
        config = self.config
        if capacity > config.max_positions:
            raise ValueError(
                f"DecoderLM: capacity: got {capacity} tokens, expected at most max_positions ({config.max_positions})"
            )
        weight = self.embedding.weight
        dtype = weight.dtype if dtype is None else dtype
        sizes = (config.num_layers, batch_size, config.kv_heads, capacity, config.head_size)
        return KVCache(*sizes, dtype=dtype, device=weight.device)

    def step(self, tokens: Tensor, state: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Scores ``[B, vocab_size]`` after the last token of each row, of which row ``i`` has ``lengths[i]``."""
        before = state.lengths
        hidden = self.hidden(tokens, state)
        if lengths is None:
            last = hidden[:, -1]
        else:
            last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
            state.crop(before + lengths)
        scores: Tensor = self.lm_head(last)
        return scores

    def quantize_(
        self,
        scheme: str,
        filter: Callable[[str, nn.Linear], bool] = lambda name, layer: name != "lm_head",
        **options: Any,
    ) -> list[str]:
        """:func:`ptkernels.nn.quantize_` on this model, activations into the kernels; returns the layers' names.

        Args:
            scheme: as for :func:`ptkernels.quantize_weight`.
            filter: which layers. Default: all but the last, which scores tokens.
            **options: of :func:`ptkernels.nn.quantize_`.
        """
        names = quantize_(self, scheme, filter, **options)
        fuse_activations(self)
        return names

    @classmethod
    def from_transformers(cls, model: Any) -> DecoderLM:
        """A copy of a ``GPT2LMHeadModel`` or ``LlamaForCausalLM`` of Hugging Face transformers, in evaluation mode.

        Raises:
            ValueError: another kind of model, or one with an option that this one has not.
        """
        from ptkernels.models.pretrained import decoder_from_transformers

        return decoder_from_transformers(model)
