"""Training and layers that are split among processes: what test_distributed.py compares with one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ptkernels as ptk
from ptkernels.integrations import tensor_parallel
from ptkernels.models.decoder import DecoderConfig, DecoderLM
from ptkernels.models.sentence_encoder import SentenceEncoder, SentenceEncoderConfig
from ptkernels.models.t5 import T5, T5Config
from ptkernels.nn import QuantizedLinear

QUANTIZED = ("int8_dynamic", "int3_weight_only", "int4_weight_only")


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape: int) -> Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(1))


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


# Data parallel: every process has its part of the batch.


class Net(nn.Module):
    """A layer of every operator; the batch statistics are those of the whole batch only if they are synchronised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ptk.nn.ConvBNReLU1d(5, 8, 3, padding=1, activation="silu")
        self.encoder = ptk.nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
        self.lstm = ptk.nn.LSTM(8, 6, batch_first=True)
        self.head = ptk.nn.LoRALinear(QuantizedLinear.from_float(nn.Linear(6, 3), "int8_weight_only"), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.encoder(self.stem(x).transpose(1, 2)))[0])


def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net()
    nn.init.normal_(made.head.lora_b)
    return made


def trained(model: nn.Module, share: slice = slice(None)) -> None:
    """Two steps on a share of every batch of 8."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(example(8, 5, 6)[share] + step).square().mean().backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in model.state_dict().items()}


def own_share() -> slice:
    return slice(dist.get_rank(), None, dist.get_world_size())


def distributed_data_parallel() -> dict[str, Tensor]:
    model = ptk.nn.SyncBatchNorm.convert_sync_batchnorm(net())
    trained(DistributedDataParallel(model), own_share())
    return state(model)


def fully_sharded() -> dict[str, Tensor]:
    model = ptk.nn.SyncBatchNorm.convert_sync_batchnorm(net())
    for part in (model.encoder, model.lstm, model):
        fully_shard(part)
    trained(model, own_share())
    return state(model)


def fully_sharded_and_tensor_parallel() -> dict[str, Tensor]:
    """Groups of two processes share the batch; the two of a group share the heads."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = ptk.nn.SyncBatchNorm.convert_sync_batchnorm(net(), mesh["data"].get_group())
    split_encoder(model.encoder, mesh["tensor"])
    for part in (model.encoder, model):
        fully_shard(part, mesh=mesh["data"])
    groups, group = mesh["data"].size(), mesh["data"].get_local_rank()
    trained(model, slice(group, None, groups))
    found = state(model)
    parts = [found.pop(f"encoder.self_attn.{name}_proj_weight") for name in "qkv"]
    return found | {"encoder.self_attn.in_proj_weight": torch.cat(parts)}


# Tensor parallel: every process has its part of the layers.


def split_encoder(layer: nn.Module, mesh: DeviceMesh) -> None:
    plan = {"self_attn": tensor_parallel.HeadwiseParallel(), "linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)


class Attention(nn.Module):
    """Keys and values of their own, padding, biases, and the weights as well."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = ptk.nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 4:] = True
        memory = x.flip(1)
        return torch.cat(self.attention(x, memory, memory, key_padding_mask=padding), -1)


def split_attention(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"attention": tensor_parallel.HeadwiseParallel()})


def quantized_layers() -> nn.Module:
    sizes, activations = ((16, 64), (64, 128), (128, 12)), ("gelu", None, None)
    layers = [
        QuantizedLinear.from_float(nn.Linear(*size), scheme, 16 if scheme != QUANTIZED[0] else None, activation=act)
        for size, scheme, act in zip(sizes, QUANTIZED, activations, strict=True)
    ]
    return nn.Sequential(nn.Linear(16, 16), *layers)


def split_quantized(model: nn.Module, mesh: DeviceMesh) -> None:
    plan = {
        "1": tensor_parallel.QuantizedColwiseParallel(),
        "2": tensor_parallel.QuantizedRowwiseParallel(),
        "3": tensor_parallel.QuantizedRowwiseParallel(input_layout=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def split_quantized_by_group(model: nn.Module, mesh: DeviceMesh) -> None:
    group = mesh.get_group()
    model[1] = tensor_parallel.ColumnParallelQuantizedLinear(model[1], group)
    model[2] = tensor_parallel.RowParallelQuantizedLinear(model[2], group)


def split_linears(model: nn.Module, mesh: DeviceMesh, columns: tuple[str, ...], rows: tuple[str, ...]) -> None:
    """Layers of those names, wherever they are."""
    plan: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            last = name.rpartition(".")[2]
            if last in columns:
                plan[name] = ColwiseParallel(use_local_output=False)
            elif last in rows:
                plan[name] = RowwiseParallel()
    assert len(plan) >= 4
    parallelize_module(model, mesh, plan)


def decoder(kind: str) -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_layers": 2, "num_heads": 8, "intermediate_size": 48}
    changes = {"num_kv_heads": 4} if kind == "llama" else {"dropout": 0.0}
    return DecoderLM(getattr(DecoderConfig, kind)(**sizes, **changes))


def bert() -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_layers": 2, "num_heads": 8, "intermediate_size": 48}
    return SentenceEncoder(SentenceEncoderConfig(**sizes))


def t5() -> nn.Module:
    return T5(
        T5Config(
            vocab_size=20, hidden_size=32, num_layers=2, num_heads=8, head_dim=4, intermediate_size=48, dropout=0.0
        )
    )


SPLITS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, DeviceMesh], Any], Callable[[], Any]]] = {
    "encoder layer": (
        lambda: ptk.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True),
        split_encoder,
        lambda: (example(2, 6, 16),),
    ),
    "attention": (Attention, split_attention, lambda: (example(2, 6, 16),)),
    "quantized layers": (quantized_layers, split_quantized, lambda: (example(2, 3, 16),)),
    "quantized layers, by group": (quantized_layers, split_quantized_by_group, lambda: (example(2, 3, 16),)),
    "Llama": (
        partial(decoder, "llama"),
        partial(split_linears, columns=("qkv", "up"), rows=("out", "down")),
        lambda: (tokens(2, 7),),
    ),
    "GPT-2": (
        partial(decoder, "gpt2"),
        partial(split_linears, columns=("qkv", "up"), rows=("out", "down")),
        lambda: (tokens(2, 7),),
    ),
    "BERT": (
        bert,
        partial(
            split_linears,
            columns=("query", "key", "value", "intermediate"),
            rows=("attention_output", "output"),
        ),
        lambda: (tokens(2, 7), tokens(2, 7) > 4),
    ),
    "T5": (
        t5,
        partial(split_linears, columns=("query", "key", "value", "up", "table"), rows=("out", "down")),
        lambda: (tokens(2, 7), tokens(2, 5)),
    ),
}


def split(name: str) -> dict[str, Tensor]:
    """The output and the gradients of one model, split where there is a group."""
    make, divide, inputs = SPLITS[name]
    torch.manual_seed(0)
    model = make().train()
    if dist.is_initialized():
        divide(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    with implicit_replication():
        out = model(*inputs())
    out = full_tensor(out)
    out.sin().sum().backward()
    grads = {key: full(p.grad) for key, p in model.named_parameters() if p.grad is not None}
    for prefix in [key.removesuffix("q_proj_weight") for key in grads if key.endswith("q_proj_weight")]:
        grads[f"{prefix}in_proj_weight"] = torch.cat([grads.pop(f"{prefix}{one}_proj_weight") for one in "qkv"])
    grads = {key.replace("part.bias", "bias"): gradient for key, gradient in grads.items()}
    return {"output": out.detach(), **grads}


def full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


JOBS: dict[str, Callable[[], Any]] = {
    "DDP": distributed_data_parallel,
    "FSDP2": fully_sharded,
    "FSDP2 and tensor parallel": fully_sharded_and_tensor_parallel,
    **{name: partial(split, name) for name in SPLITS},
}
