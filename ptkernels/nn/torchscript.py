"""What ``torch.jit.script`` compiles in place of our modules: TorchScript knows no more of Python than a few types.

Each class here has the parameters, buffers and names of one of :mod:`ptkernels.nn` and calls the operators themselves,
without the fallbacks around them. They are for evaluation: dropout and batch statistics stay with the modules, and so
do sequences in other forms than padded ones and the states of every token.
"""

# Annotations are read as types here, so they are no strings.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.graph_module import _exec_with_source

from ptkernels.ops.packed_rnn.torchscript import padded_layer


class _Evaluated(nn.Module):
    """Takes over what a module holds, in its evaluation mode for good: torch.jit.script puts it into the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if module.training:
            kind = type(module).__name__
            raise RuntimeError(f"torch.jit.script: {kind}: got a module in training mode, expected model.eval()")
        # Copies: torch.jit.script exchanges children in place, and the module is to stay what it is.
        self._parameters = dict(module._parameters)
        self._buffers = dict(module._buffers)
        self._modules = dict(module._modules)
        super().train(False)

    def train(self, mode: bool = True) -> "_Evaluated":
        if mode:
            raise RuntimeError("what torch.jit.script has compiled evaluates only: train the model, then script a copy")
        return super().train(False)


class ConvBNReLU(_Evaluated):
    """Of one, two or three dimensions."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        conv, bn = module.conv, module.bn
        space = len(conv.kernel_size)
        padding = [0] * space if isinstance(conv.padding, str) else list(conv.padding)
        # In the order of F.pad; the operator pads with zeros, by as much on both sides, itself.
        around = list(conv._reversed_padding_repeated_twice)
        is_inside = conv.padding_mode == "zeros" and (padding == around[::-2] or not any(around))
        self.around: list[int] = [0] if is_inside else around
        self.padding_mode: str = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        self.padding: list[int] = padding if is_inside else [0] * space
        self.stride, self.dilation, self.groups = list(conv.stride), list(conv.dilation), int(conv.groups)
        self.eps: float = getattr(bn, "eps", 0.0)
        self.batch_statistics: bool = isinstance(bn, nn.modules.batchnorm._BatchNorm) and bn.running_mean is None
        self.activation: str = module.activation
        self.negative_slope: float = getattr(module.act, "negative_slope", module.negative_slope)
        self.transposed: bool = isinstance(conv, nn.modules.conv._ConvTransposeNd)
        self.output_padding: list[int] | None = list(conv.output_padding) if self.transposed else None
        per_channel = -1 if isinstance(bn, nn.modules.instancenorm._InstanceNorm) else 0
        self.num_groups: int = getattr(bn, "num_groups", per_channel)
        self.pre_activation: str = module.pre_activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if len(self.around) > 1:
            x = F.pad(x, self.around, self.padding_mode)
        if hasattr(self.bn, "running_mean"):
            norm = (self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var)
        elif hasattr(self.bn, "weight") and hasattr(self.bn, "bias"):
            norm = (self.bn.weight, self.bn.bias, None, None)
        else:
            norm = (None, None, None, None)
        return torch.ops.ptkernels.conv_bn_relu(
            x, self.conv.weight, self.conv.bias, norm[0], norm[1], norm[2], norm[3], residual, self.batch_statistics,
            self.eps, self.stride, self.padding, self.dilation, self.groups, self.activation, self.negative_slope,
            False, self.transposed, self.output_padding, self.num_groups, self.pre_activation,
        )[0]  # fmt: skip


class QuantizedLinear(_Evaluated):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        spec = module.weight.spec
        if module.bias is None:
            self.register_parameter("bias", None)
        self.code_format: str = spec.code.name
        self.quantizes_input: bool = spec.quantizes_input
        self.group_size: int = module.group_size
        self.activation: str = module.activation or "none"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        if residual is not None:
            residual = residual.reshape(rows.size(0), -1)
        out = torch.ops.ptkernels.quantized_linear(
            rows, self.codes, self.scales, self.zeros, self.bias, residual, self.code_format, self.group_size,
            self.quantizes_input, self.input_scale, self.activation, None, None,
        )  # fmt: skip
        return out.view(list(x.shape)[:-1] + [out.size(-1)])  # noqa: RUF005 - TorchScript has no *


class LoRALinear(_Evaluated):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.scale: float = module.scale

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)
        if hasattr(self.base, "codes"):
            return self.base(x, update)
        else:  # noqa: RET505 - TorchScript drops the branch that does not compile only where it is one
            return self.base(x) + update


class QuantizedEmbedding(_Evaluated):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.code_format: str = module.weight.spec.code.name
        self.group_size: int = module.group_size
        self.embedding_dim: int = module.embedding_dim
        self.dtype: torch.dtype = module.dtype

    def forward(self, input: Tensor) -> Tensor:
        rows = torch.ops.ptkernels.quantized_embedding(
            input.reshape(-1).long(), self.codes, self.scales, self.zeros, self.code_format, self.group_size,
            self.embedding_dim, self.dtype,
        )  # fmt: skip
        return rows.view(list(input.shape) + [self.embedding_dim])  # noqa: RUF005


class BatchNorm(_Evaluated):
    """Of ``SyncBatchNorm``, which in evaluation asks no other process."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.eps: float = module.eps
        self.batch_statistics: bool = module.running_mean is None

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.batch_statistics, 0.0, self.eps
        )


def refuse(module: nn.Module) -> nn.Module:
    """For modules whose number of states TorchScript cannot tell."""
    raise NotImplementedError(f"torch.jit.script: got {type(module).__name__}, expected no such module: trace it")


def _stack(
    input: Tensor,
    state: list[Tensor],
    lengths: Tensor | None,
    params: list[Tensor],
    num_layers: int,
    mode: str,
    directions: int,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers, over a padded batch or over one sequence."""
    is_alone = input.dim() == 2
    data = input
    if is_alone:
        data = data.unsqueeze(0 if batch_first else 1)
        state = [tensor.unsqueeze(1) for tensor in state]
    sizes = lengths
    if sizes is not None:
        sizes = sizes.to(torch.int64).cpu()
    layout = "batch_first" if batch_first else "time_first"
    each = len(params) // num_layers
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for layer in range(num_layers):
        own = [tensor[layer * directions : (layer + 1) * directions] for tensor in state]
        weights = params[layer * each : (layer + 1) * each]
        data, h, c = padded_layer(data, sizes, own, weights, layout, mode, directions == 2)
        h_n.append(h)
        c_n.append(c)
    output, h, c = data, torch.cat(h_n), torch.cat(c_n)
    if is_alone:
        output, h = output.squeeze(0 if batch_first else 1), h.squeeze(1)
        c = c.squeeze(1) if mode == "lstm" else c
    return output, h, c


class _Weights(_Evaluated):
    """Weights as the operator takes them."""

    def __init__(self, module: Any, names: list[str]) -> None:
        super().__init__(module)
        if list(self._parameters) != names:
            kind = type(module).__name__
            raise NotImplementedError(
                f"torch.jit.script: {kind}: got weights that are computed, expected none: trace it"
            )
        # TorchScript finds attributes by the names in the source, so there is one with the names of this module.
        source = f"def _params(self) -> list[Tensor]:\n    return [{', '.join(f'self.{name}' for name in names)}]\n"
        found: dict[str, Any] = {"Tensor": Tensor}
        _exec_with_source(source, found)
        self.__class__ = type(type(self).__name__, (type(self),), {"_params": found["_params"]})


class _Recurrent(_Weights):
    def __init__(self, module: Any) -> None:
        super().__init__(module, [name for names in module._all_weights for name in names])
        self.num_layers: int = module.num_layers
        self.directions: int = 2 if module.bidirectional else 1
        self.batch_first: bool = module.batch_first
        self.mode: str = {"LSTM": "lstm", "GRU": "gru"}.get(module.mode, module.mode[4:].lower())


class LSTM(_Recurrent):
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state: list[Tensor] = []
        if hx is not None:
            state = [hx[0], hx[1]]
        output, h, c = _stack(
            input, state, lengths, self._params(), self.num_layers, self.mode, self.directions, self.batch_first
        )
        return output, (h, c)


class RNN(_Recurrent):
    """GRU and RNN."""

    def forward(self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state: list[Tensor] = []
        if hx is not None:
            state = [hx]
        output, h, _ = _stack(
            input, state, lengths, self._params(), self.num_layers, self.mode, self.directions, self.batch_first
        )
        return output, h


class _Cell(_Weights):
    def __init__(self, module: Any) -> None:
        super().__init__(module, ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ())])
        self.mode: str = {"LSTMCell": "lstm", "GRUCell": "gru"}.get(type(module).__name__, "tanh")
        if self.mode == "tanh":
            self.mode = module.nonlinearity


def _step(input: Tensor, state: list[Tensor], params: list[Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """One step: the batch of the cell is that of one token each."""
    is_alone = input.dim() == 1
    data = input.unsqueeze(0) if is_alone else input
    if is_alone:
        state = [tensor.unsqueeze(0) for tensor in state]
    own = [tensor.unsqueeze(0) for tensor in state]
    _, h, c = padded_layer(data.unsqueeze(0), None, own, params, "time_first", mode, False)
    h = h.squeeze(0)
    c = c.squeeze(0) if mode == "lstm" else h
    return (h.squeeze(0), c.squeeze(0)) if is_alone else (h, c)


class LSTMCell(_Cell):
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        state: list[Tensor] = []
        if hx is not None:
            state = [hx[0], hx[1]]
        return _step(input, state, self._params(), self.mode)


class RNNCell(_Cell):
    """GRUCell and RNNCell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        state: list[Tensor] = []
        if hx is not None:
            state = [hx]
        return _step(input, state, self._params(), self.mode)[0]


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)


class MultiheadAttention(_Evaluated):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        if module.bias_k is not None or module.add_zero_attn:
            raise NotImplementedError(
                "torch.jit.script: MultiheadAttention: got add_bias_kv or add_zero_attn, expected neither; trace it"
            )
        self.num_heads: int = module.num_heads
        self.batch_first: bool = module.batch_first

    def _heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, [self.num_heads, -1])
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        is_alone = query.dim() == 2
        if is_alone:
            at = 0 if self.batch_first else 1
            query, key, value = query.unsqueeze(at), key.unsqueeze(at), value.unsqueeze(at)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        if self.in_proj_weight is not None:
            w = self.in_proj_weight.chunk(3)
        else:
            w = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_bias is not None:
            b = self.in_proj_bias.chunk(3)
            q, k, v = F.linear(query, w[0], b[0]), F.linear(key, w[1], b[1]), F.linear(value, w[2], b[2])
        else:
            q, k, v = F.linear(query, w[0]), F.linear(key, w[1]), F.linear(value, w[2])
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        mask: Tensor | None = None
        if attn_mask is not None and not is_causal:
            mask = _additive(attn_mask, q)
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, [q.size(0), self.num_heads])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None]
            mask = padding if mask is None else mask + padding
        out, lse = torch.ops.ptkernels.attention(q, k, v, mask, is_causal)
        tokens = out.permute(0, 2, 1, 3) if self.batch_first else out.permute(2, 0, 1, 3)
        result = F.linear(tokens.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        weights: Tensor | None = None
        if need_weights:
            scores = q.to(lse.dtype) @ k.to(lse.dtype).transpose(-2, -1) * q.size(-1) ** -0.5
            if mask is not None:
                scores = scores + mask
            if is_causal:
                hidden = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(hidden, float("-inf"))
            # Rows without a key have a log-sum-exp of -inf, and no weights.
            w_all = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0).to(q.dtype)
            w_all = w_all.mean(1) if average_attn_weights else w_all
            weights = w_all.squeeze(0) if is_alone else w_all
        return (result.squeeze(0 if self.batch_first else 1) if is_alone else result), weights
