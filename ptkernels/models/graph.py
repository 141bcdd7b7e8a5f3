"""Networks on graphs whose recurrent parts are ours. A graph is its edges, int64 ``[2, E]``: from, to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptkernels.nn.rnn import LSTM, GRUCell


class GraphConv(nn.Module):
    """A graph convolution, ``D^-1/2 (A + I) D^-1/2 X W + b`` (Kipf and Welling, 2016).

    Shape:
        ``x [N, in_features]``, ``edge_index`` int64 ``[2, E]``; to ``[N, out_features]``. Time is ``O(N + E)`` times
        the features.

    Example:
        >>> x, edges = torch.randn(3, 4), torch.tensor([[0, 1], [1, 2]])
        >>> GraphConv(4, 8)(x, edges).shape
        torch.Size([3, 8])
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        degree = torch.ones(len(x), dtype=x.dtype, device=x.device).index_add(0, target, x.new_ones(len(target)))
        scale = degree.rsqrt()
        x = self.linear(x)
        messages = x[source] * (scale[source] * scale[target])[:, None]
        out: Tensor = (x * scale.square()[:, None]).index_add(0, target, messages) + self.bias
        return out


class DynamicGraphLSTM(nn.Module):
    """The next features of every node from a sequence of graphs: a graph convolution each, an LSTM over time.

    Args:
        node_features: features of a node, in and out.
        hidden_dim: features of the convolution, and units.
        num_layers: layers of the LSTM.

    Shape:
        A sequence of ``(x [N, node_features], edge_index [2, E])`` over the same nodes; to ``[N, node_features]``.

    Example:
        >>> edges = torch.tensor([[0, 1], [1, 2]])
        >>> DynamicGraphLSTM(4, 8)([(torch.randn(3, 4), edges) for _ in range(5)]).shape
        torch.Size([3, 4])
    """

    def __init__(self, node_features: int, hidden_dim: int, num_layers: int = 2) -> None:
        super().__init__()
        self.spatial_conv = GraphConv(node_features, hidden_dim)
        self.lstm = LSTM(hidden_dim, hidden_dim, num_layers)
        self.output_layer = nn.Linear(hidden_dim, node_features)

    def forward(self, graphs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        steps = torch.stack([torch.relu(self.spatial_conv(x, edge_index)) for x, edge_index in graphs])
        _, (hidden, _) = self.lstm(steps)
        out: Tensor = self.output_layer(hidden[-1])
        return out


class GatedGraphConv(nn.Module):
    """Rounds of messages that a GRU cell takes into every node's state (Li et al., 2015).

    Args:
        channels: features of a node; inputs with fewer are padded with zeros.
        num_layers: rounds, each with a matrix of its own.

    Shape:
        ``x [N, <= channels]``, ``edge_index`` int64 ``[2, E]``, ``edge_weight [E]``; to ``[N, channels]``.

    Example:
        >>> x, edges = torch.randn(3, 4), torch.tensor([[0, 1], [1, 2]])
        >>> GatedGraphConv(8, num_layers=2)(x, edges).shape
        torch.Size([3, 8])
    """

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_layers, channels, channels).uniform_(-1, 1) * channels**-0.5)
        self.gru = GRUCell(channels, channels)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        channels = self.weight.size(1)
        if x.dim() != 2 or x.size(1) > channels:
            raise ValueError(f"GatedGraphConv: x: got shape {list(x.shape)}, expected [N, F] with F <= {channels}")
        source, target = edge_index
        x = nn.functional.pad(x, (0, channels - x.size(1)))
        for weight in self.weight:
            messages = (x @ weight)[source]
            messages = messages if edge_weight is None else messages * edge_weight[:, None]
            x = self.gru(torch.zeros_like(x).index_add(0, target, messages), x)
        return x
