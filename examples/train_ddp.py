"""Train a small model of all four operators with DistributedDataParallel, on one machine or many.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --rdzv-endpoint host:29500 examples/train_ddp.py   (and rank 1)

Every process trains on its own part of each batch; gradients are averaged, so the losses are those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: imported later it keeps the first one for ever
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ptkernels as ptk


class Classifier(nn.Module):
    """Sound into classes: convolutions over time, self-attention, a GRU, and a quantized layer with a LoRA to train."""

    def __init__(self, features: int, units: int, classes: int) -> None:
        super().__init__()
        # Normalised by running statistics: batch statistics would depend on how the batch is split.
        self.stem = ptk.nn.ConvBNReLU1d(features, units, 3, padding=1)
        self.stem.bn.eval()
        self.encoder = ptk.nn.TransformerEncoderLayer(units, 4, 2 * units, dropout=0.0, batch_first=True)
        self.gru = ptk.nn.GRU(units, units, batch_first=True)
        frozen = ptk.nn.QuantizedLinear.from_float(nn.Linear(units, classes), "int8_weight_only")
        self.head = ptk.nn.LoRALinear(frozen, rank=4)

    def forward(self, sound: Tensor) -> Tensor:
        tokens = self.encoder(self.stem(sound).transpose(1, 2))
        _, last = self.gru(tokens)
        scores: Tensor = self.head(last[0])
        return scores


def train(steps: int, batch: int, device: torch.device) -> list[float]:
    """The loss of each step, over all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(Classifier(8, 16, 4).to(device))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.01)
    losses = []
    for step in range(steps):
        # Every process draws the whole batch and takes its part: what a sampler does for stored data.
        generator = torch.Generator().manual_seed(step)
        classes = torch.randint(0, 4, (batch,), generator=generator)
        sound = torch.randn(batch, 8, 12, generator=generator) + classes[:, None, None]
        mine = slice(rank, None, world)
        loss = nn.functional.cross_entropy(model(sound[mine].to(device)), classes[mine].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="of all processes together")
    parser.add_argument("--json", type=Path, help="where the first process writes the losses")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if arguments.batch % world:
        raise SystemExit(f"--batch: got {arguments.batch}, expected a multiple of the {world} processes")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    losses = train(arguments.steps, arguments.batch, device)
    if rank == 0:
        print(f"{world} processes: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(losses))
    dist.barrier()  # a process that leaves early closes connections under those that have not finished
    # Ends the threads of gloo too, as nothing holds the group any longer: one that lets go of a tensor while the
    # interpreter ends would abort the process.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
