"""An encoder-decoder transformer (T5; Raffel et al., 2019, https://arxiv.org/abs/1910.10683).

Positions enter as a learned bias of the scores, by distance, one table for all layers of a side. Attention takes it as
one number per head and distance: no matrix of biases is made, nor is one differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.models.blocks import FeedForward, project
from ptkernels.models.kv_cache import KVCache
from ptkernels.ops.attention import attention
from ptkernels.ops.attention.relative import t5_buckets


@dataclass(frozen=True)
class T5Config:
    """Sizes of a :class:`T5`; the defaults are those of t5-small.

    Args:
        vocab_size: number of tokens.
        hidden_size: features of a token.
        head_dim: features of a head; ``num_heads * head_dim`` may differ from ``hidden_size``.
        intermediate_size: features inside the feed-forward blocks.
        num_layers: layers of each side.
        num_heads: attention heads.
        num_buckets: entries of the table of biases per head.
        max_distance: from here on all distances share a bucket.
        activation: ``"relu"``, or ``"geglu_tanh"`` as in version 1.1.
        dropout: probability of dropping a feature.
        norm_eps: added to variances.
        tie_embeddings: score tokens with the embedding's weight (scaled), as version 1.0 does.

    Example:
        >>> T5Config().hidden_size
        512
    """

    vocab_size: int = 32128
    hidden_size: int = 512
    head_dim: int = 64
    intermediate_size: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    num_buckets: int = 32
    max_distance: int = 128
    activation: str = "relu"
    dropout: float = 0.1
    norm_eps: float = 1e-6
    tie_embeddings: bool = True


class RelativeBias(nn.Module):
    """A bias per head and bucket of distances: exact ones near by, then logarithmic up to ``max_distance``.

    Args:
        num_buckets: entries per head; half of them are for each direction where both are seen.
        max_distance: from here on all distances share a bucket.
        num_heads: attention heads.
        bidirectional: whether queries see keys behind them.

    Shape:
        ``L`` queries and ``S`` keys to ``[heads, L + S - 1]``, attention's ``relative_bias``; with the
        positions ``[B]`` of every row's first query, to ``[B, heads, L + S - 1]``.

    Example:
        >>> bias = RelativeBias(32, 128, num_heads=2, bidirectional=False)
        >>> bias(3, 5).shape, bias(1, 5, torch.tensor([4, 2, 0])).shape
        (torch.Size([2, 7]), torch.Size([3, 2, 5]))
    """

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(num_buckets, num_heads)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def forward(self, query_length: int, key_length: int, first: Tensor | None = None) -> Tensor:
        offset = torch.arange(1 - query_length, key_length, device=self.table.weight.device)
        offset = offset if first is None else offset - first[:, None]
        buckets = t5_buckets(offset, self.table.num_embeddings, self.bidirectional, self.max_distance)
        bias: Tensor = self.table(buckets)
        return torch.movedim(bias, -1, -2)


class T5Attention(nn.Module):
    """Attention without biases and without a scale: initialisation keeps the scores small instead."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[B, H, S, head_dim]``."""
        return self.heads(self.key(x)), self.heads(self.value(x))

    def forward(self, x: Tensor, residual: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        dropout_p = self.dropout.p if self.training else 0.0
        out = attention(self.heads(self.query(x)), keys, values, dropout_p=dropout_p, scale=1.0, **options)
        return project(self.out, out.transpose(1, 2).flatten(2), residual, self.dropout)


class T5Layer(nn.Module):
    """Self-attention, on the decoder's side attention to the source, feed-forward; each over the normalised stream."""

    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()
        self.self_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attention = T5Attention(config)
        self.cross_norm = nn.RMSNorm(config.hidden_size, config.norm_eps) if decoder else None
        self.cross_attention = T5Attention(config) if decoder else None
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        sizes = (config.hidden_size, config.intermediate_size)
        self.mlp = FeedForward(*sizes, config.activation, bias=False, dropout=config.dropout)

    def forward(
        self,
        x: Tensor,
        bias: dict[str, Any],
        source: tuple[tuple[Tensor, Tensor], Tensor | None] | None = None,
        cache: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        """``bias`` are attention's options; ``source`` its keys and values and mask; ``cache`` comes with the layer."""
        normed = self.self_norm(x)
        memory = self.self_attention.memory(normed)
        if cache is not None:
            memory = cache[0].append(cache[1], *memory)
        x = self.self_attention(normed, x, *memory, **bias)
        if self.cross_attention is not None and self.cross_norm is not None and source is not None:
            x = self.cross_attention(self.cross_norm(x), x, *source[0], attn_mask=source[1])
        out: Tensor = self.mlp(self.mlp_norm(x), x)
        return out


class Source(NamedTuple):
    """What decoding needs of the encoded source: every layer's keys and values, and where there is padding."""

    memory: list[tuple[Tensor, Tensor]]
    mask: Tensor | None


class T5State:
    """An encoded source, and the keys and values of the answer so far."""

    def __init__(self, source: Source, cache: KVCache) -> None:
        self.source, self.cache = source, cache

    def reorder(self, index: Tensor) -> None:
        """See :meth:`KVCache.reorder`."""
        memory, mask = self.source
        rows = [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in memory]
        self.source = Source(rows, None if mask is None else mask.index_select(0, index))
        self.cache.reorder(index)

    def crop(self, lengths: Tensor) -> None:
        """See :meth:`KVCache.crop`."""
        self.cache.crop(lengths)


class T5(nn.Module):
    """Scores of an answer's next tokens, given a source; :func:`ptkernels.models.generate` writes answers with it.

    Args:
        config: the sizes.

    Shape:
        ``source`` int64 ``[B, S]``, ``target`` int64 ``[B, L]``, which starts with a start token (0), ``source_mask``
        ``[B, S]``, bool or 0 and 1, true at real tokens; to ``[B, L, vocab_size]``.

    Example:
        >>> from ptkernels.models import generate
        >>> model = T5(T5Config(vocab_size=50, hidden_size=16, head_dim=8, intermediate_size=32, num_layers=1)).eval()
        >>> source = torch.randint(2, 50, (2, 7))
        >>> model(source, torch.randint(2, 50, (2, 4))).shape
        torch.Size([2, 4, 50])
        >>> state = model.start(source, capacity=10)
        >>> generate(model, torch.zeros(2, 1, dtype=torch.int64), 5, state=state, num_beams=2).shape
        torch.Size([2, 5])
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        bias = (config.num_buckets, config.max_distance, config.num_heads)
        self.encoder_bias, self.decoder_bias = RelativeBias(*bias, True), RelativeBias(*bias, False)
        self.encoder = nn.ModuleList(T5Layer(config, decoder=False) for _ in range(config.num_layers))
        self.decoder = nn.ModuleList(T5Layer(config, decoder=True) for _ in range(config.num_layers))
        self.encoder_norm, self.decoder_norm = (nn.RMSNorm(config.hidden_size, config.norm_eps) for _ in range(2))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # Queries are small by 1 / sqrt(head_dim): the scale that attention does not apply.
                scale = self.config.head_dim**-0.5 if name.endswith("query") else 1.0
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
        for bias in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(bias.table.weight, std=self.config.hidden_size**-0.5)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Source:
        """Every decoder layer's keys and values of the source."""
        mask = None if source_mask is None else source_mask.bool()[:, None, None, :]
        options = {"relative_bias": self.encoder_bias(source.size(1), source.size(1)), "attn_mask": mask}
        x = self.dropout(self.embedding(source))
        for layer in self.encoder:
            x = layer(x, options)
        x = self.dropout(self.encoder_norm(x))
        decoder: Any = self.decoder
        return Source([layer.cross_attention.memory(x) for layer in decoder], mask)

    def _decode(self, target: Tensor, source: Source, cache: KVCache | None = None) -> Tensor:
        length = target.size(1)
        if cache is None:
            options: dict[str, Any] = {"relative_bias": self.decoder_bias(length, length), "is_causal": True}
        else:
            # Rows may stand at different positions: each has a bias and a mask of its own.
            positions = cache.lengths[:, None] + torch.arange(length, device=target.device)
            keys = torch.arange(int(positions.max()) + 1, device=target.device)
            options = {"relative_bias": self.decoder_bias(length, len(keys), cache.lengths)}
            options["attn_mask"] = (keys <= positions[..., None])[:, None]
        x = self.dropout(self.embedding(target))
        for index, (layer, memory) in enumerate(zip(self.decoder, source.memory, strict=True)):
            x = layer(x, options, (memory, source.mask), None if cache is None else (cache, index))
        if cache is not None:
            cache.lengths = cache.lengths + target.size(1)
        out: Tensor = self.dropout(self.decoder_norm(x))
        return out

    def _scores(self, hidden: Tensor) -> Tensor:
        scale = self.config.hidden_size**-0.5 if self.config.tie_embeddings else 1.0
        return self.lm_head(hidden * scale)  # type: ignore[no-any-return]

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        return self._scores(self._decode(target, self.encode(source, source_mask)))

    def loss(self, source: Tensor, answer: Tensor, source_mask: Tensor | None = None, start_token: int = 0) -> Tensor:
        """Mean cross entropy of the tokens of an answer ``[B, L]``, each given those before it."""
        target = F.pad(answer[:, :-1], (1, 0), value=start_token)
        return F.cross_entropy(self(source, target, source_mask).flatten(0, 1), answer.flatten())

    def start(self, source: Tensor, source_mask: Tensor | None = None, *, capacity: int) -> T5State:
        """The state to write answers of up to ``capacity`` tokens from, the start token included."""
        config, weight = self.config, self.embedding.weight
        sizes = (config.num_layers, len(source), config.num_heads, capacity, config.head_dim)
        return T5State(self.encode(source, source_mask), KVCache(*sizes, weight.dtype, weight.device))

    def new_state(self, batch_size: int, capacity: int) -> T5State:
        """An answer needs a source: see :meth:`start`."""
        raise ValueError("generate: state: got None, expected that of T5.start(source, capacity=...)")

    def score(self, tokens: Tensor, state: T5State) -> Tensor:
        """Scores ``[B, n, vocab_size]`` after every token that the answer goes on with."""
        return self._scores(self._decode(tokens, state.source, state.cache))

    def step(self, tokens: Tensor, state: T5State, lengths: Tensor | None = None) -> Tensor:
        """Scores ``[B, vocab_size]`` after the last token of each row, of which row ``i`` has ``lengths[i]``."""
        before = state.cache.lengths
        hidden = self._decode(tokens, state.source, state.cache)
        if lengths is None:
            return self._scores(hidden[:, -1])
        state.crop(before + lengths)
        return self._scores(hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1])

    @classmethod
    def from_transformers(cls, model: Any) -> T5:
        """A copy of a ``T5ForConditionalGeneration`` of Hugging Face transformers, in evaluation mode.

        Raises:
            ValueError: another kind of model, or one with an option that this one has not.
        """
        from ptkernels.models.pretrained import t5_from_transformers

        return t5_from_transformers(model)
