"""Learning without labels around an encoder of your own: CPC, SimCLR, MoCo, BYOL, MAE; and learning from a teacher.

The encoder is any module that gives ``[N, dim]``. Teachers and momentum encoders are deep copies, moved in place: our
operators read weights as they are at every call, so that every move counts at the next one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.models.vision_transformer import ViT
from ptkernels.nn.attention import TransformerEncoderLayer
from ptkernels.nn.rnn import GRU


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the parameters of ``average`` towards those of ``model`` in place: ``decay`` of itself stays.

    Buffers, such as running statistics and the integers that count batches, are copied.

    Example:
        >>> model, average = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> expected = 0.9 * average.weight + 0.1 * model.weight
        >>> update_average(average, model, decay=0.9)
        >>> torch.testing.assert_close(average.weight, expected)
    """
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs.to(mine.dtype), 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


def _average_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def _projector(dim: int, hidden_dim: int, out_dim: int, norm: bool = False) -> nn.Sequential:
    middle: list[nn.Module] = [nn.BatchNorm1d(hidden_dim)] if norm else []
    return nn.Sequential(nn.Linear(dim, hidden_dim), *middle, nn.ReLU(), nn.Linear(hidden_dim, out_dim))


def info_nce(queries: Tensor, keys: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross entropy of finding ``keys[i]`` among all by its cosine with ``queries[i]`` (van den Oord et al., 2018).

    Args:
        queries: ``[N, dim]``.
        keys: ``[M, dim]``, ``M >= N``; those beyond ``N`` are wrong for everyone.
        temperature: divides the cosines.

    Example:
        >>> info_nce(torch.eye(3), torch.eye(3), temperature=0.01)
        tensor(0.)
    """
    cosines = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(queries), device=queries.device))


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss: each of ``2 N`` views must find its other view among all but itself (Chen et al., 2020).

    Args:
        first, second: two views of the same ``N`` examples, ``[N, dim]``.
        temperature: divides the cosines.

    Example:
        >>> nt_xent(torch.eye(4), torch.eye(4), temperature=0.01)
        tensor(0.)
    """
    views = F.normalize(torch.cat([first, second]), dim=1)
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    cosines = (views @ views.T / temperature).masked_fill(itself, -torch.inf)
    other = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(cosines, other)


class SimCLR(nn.Module):
    """Two views of an example are to be close, all else far (Chen et al., 2020, https://arxiv.org/abs/2002.05709).

    Args:
        encoder: gives ``[N, dim]``.
        dim: its features.
        hidden_dim, projection_dim: of the two layers in which views are compared.

    Example:
        >>> model = SimCLR(nn.Linear(5, 8), dim=8, hidden_dim=8, projection_dim=4)
        >>> model.loss(torch.randn(3, 5), torch.randn(3, 5)).dim()
        0
    """

    def __init__(self, encoder: nn.Module, dim: int, hidden_dim: int = 512, projection_dim: int = 128) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, _projector(dim, hidden_dim, projection_dim)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.projector(self.encoder(first)), self.projector(self.encoder(second))

    def loss(self, first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
        """:func:`nt_xent` of the two views' projections."""
        one, other = self(first, second)
        return nt_xent(one, other, temperature)


class MoCo(nn.Module):
    """Keys come from a slow copy of the encoder, and a queue of earlier ones is what they must stand out from.

    He et al., 2019 (https://arxiv.org/abs/1911.05722).

    Args:
        encoder: gives ``[N, dim]``.
        dim: its features.
        queue_size: earlier keys kept, a multiple of the batch.
        momentum: how much of the slow copy stays at every step.
        temperature: divides the cosines.

    Example:
        >>> model = MoCo(nn.Linear(5, 8), dim=8, queue_size=6)
        >>> model.loss(torch.randn(3, 5), torch.randn(3, 5)).dim()
        0
    """

    queue: Tensor
    position: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.encoder, self.key_encoder = encoder, _average_of(encoder)
        self.momentum, self.temperature = momentum, temperature
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def loss(self, query_view: Tensor, key_view: Tensor) -> Tensor:
        """:func:`info_nce` of one view against the other's keys and the queue, which then takes the keys in."""
        with torch.no_grad():
            update_average(self.key_encoder, self.encoder, self.momentum)
            keys = F.normalize(self.key_encoder(key_view), dim=1)
        size, start = len(self.queue), int(self.position)
        if size % len(keys) != 0:
            raise ValueError(f"MoCo: key_view: got a batch of {len(keys)}, expected a divisor of queue_size ({size})")
        loss = info_nce(self.encoder(query_view), torch.cat([keys, self.queue.clone()]), self.temperature)
        self.queue[start : start + len(keys)] = keys
        self.position.fill_((start + len(keys)) % size)
        return loss


class BYOL(nn.Module):
    """One view predicts what a slow copy makes of the other; nothing is pushed apart (Grill et al., 2020).

    Args:
        encoder: gives ``[N, dim]``.
        dim: its features.
        hidden_dim, projection_dim: of projector and predictor.
        momentum: how much of the slow copy stays at every :meth:`update`.

    Example:
        >>> model = BYOL(nn.Linear(5, 8), dim=8, hidden_dim=8, projection_dim=4)
        >>> model.loss(torch.randn(3, 5), torch.randn(3, 5)).dim()
        0
        >>> model.update()
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.online = nn.Sequential(encoder, _projector(dim, hidden_dim, projection_dim, norm=True))
        self.predictor = _projector(projection_dim, hidden_dim, projection_dim, norm=True)
        self.target = _average_of(self.online)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        """Squared distance of unit vectors, prediction to target, both ways round, mean over the batch."""
        total = torch.zeros((), device=first.device)
        for view, other in ((first, second), (second, first)):
            prediction = self.predictor(self.online(view))
            with torch.no_grad():
                target = self.target(other)
            total = total + (2 - 2 * F.cosine_similarity(prediction, target)).mean()
        return total

    def update(self) -> None:
        """Move the slow copy; call it after the optimizer's step."""
        update_average(self.target, self.online, self.momentum)


class MaskedAutoencoder(nn.Module):
    """A ViT that sees a few patches, and a smaller transformer that paints the others (He et al., 2021).

    Args:
        encoder: sees the patches that are left.
        in_channels: channels of the image.
        decoder_dim: features of the smaller transformer.
        decoder_layers: its layers.
        decoder_heads: its heads.
        mask_ratio: share of the patches that are hidden.

    Shape:
        Images ``[N, C, H, W]``, as the encoder takes them, to patches ``[N, P, C * patch ** 2]``, painted and real, and
        the mask ``[N, P]``, true where a patch was hidden.

    Example:
        >>> vit = ViT(image_size=8, patch_size=2, num_classes=1, hidden_size=16, num_layers=1, num_heads=2)
        >>> painted, real, mask = MaskedAutoencoder(vit, decoder_dim=8, decoder_heads=2)(torch.randn(2, 3, 8, 8))
        >>> painted.shape, int(mask.sum())
        (torch.Size([2, 16, 12]), 24)
    """

    def __init__(
        self,
        encoder: ViT,
        in_channels: int = 3,
        decoder_dim: int = 128,
        decoder_layers: int = 1,
        decoder_heads: int = 4,
        mask_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        hidden, pixels = encoder.head.in_features, in_channels * encoder.patch_size**2
        self.encoder, self.mask_ratio = encoder, mask_ratio
        self.narrow = nn.Linear(hidden, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.position_embedding = nn.Parameter(torch.randn(1, encoder.num_patches, decoder_dim) * 0.02)
        options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layers = (
            TransformerEncoderLayer(decoder_dim, decoder_heads, 4 * decoder_dim, **options)
            for _ in range(decoder_layers)
        )
        self.decoder = nn.Sequential(*layers, nn.LayerNorm(decoder_dim), nn.Linear(decoder_dim, pixels))

    def patches(self, images: Tensor) -> Tensor:
        """The pixels of every patch, ``[N, P, C * patch ** 2]``."""
        return F.unfold(images, self.encoder.patch_size, stride=self.encoder.patch_size).transpose(1, 2)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        embedded = self.encoder.embed(images)
        batch, count = embedded.shape[:2]
        order = torch.rand(batch, count, generator=generator, device=images.device).argsort(1)
        seen = order[:, : max(1, count - int(count * self.mask_ratio))]
        visible = embedded.gather(1, seen[..., None].expand(-1, -1, embedded.size(2)))
        known = self.narrow(self.encoder.encode(visible)[:, 1:])
        tokens = self.mask_token.to(known.dtype).expand(batch, count, -1)
        tokens = tokens.scatter(1, seen[..., None].expand_as(known), known)
        mask = torch.ones(batch, count, dtype=torch.bool, device=images.device).scatter(1, seen, False)
        return self.decoder(tokens + self.position_embedding), self.patches(images), mask

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared error of the hidden patches."""
        painted, real, mask = self(images)
        return F.mse_loss(painted[mask], real[mask])


class CPC(nn.Module):
    """The next steps of a sequence predicted from what a GRU makes of those before (van den Oord et al., 2018).

    Args:
        encoder: takes one step, gives ``[N, dim]``.
        dim: its features.
        context_size: units of the GRU.
        prediction_steps: steps to predict, each with a linear layer of its own.

    Shape:
        ``[B, T, ...]`` to predictions and encoded steps, both ``[B, prediction_steps, dim]``.

    Raises:
        ValueError: the sequence has no step before those to predict.

    Example:
        >>> model = CPC(nn.Linear(5, 8), dim=8, context_size=16, prediction_steps=3)
        >>> predicted, encoded = model(torch.randn(2, 10, 5))
        >>> predicted.shape == encoded.shape == (2, 3, 8)
        True
    """

    def __init__(self, encoder: nn.Module, dim: int, context_size: int = 128, prediction_steps: int = 12) -> None:
        super().__init__()
        self.encoder, self.steps = encoder, prediction_steps
        self.context_network = GRU(dim, context_size, batch_first=True)
        self.predictors = nn.ModuleList(nn.Linear(context_size, dim) for _ in range(prediction_steps))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.size(1) <= self.steps:
            raise ValueError(f"CPC: x: got {x.size(1)} steps, expected more than prediction_steps ({self.steps})")
        encoded = self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        _, hidden = self.context_network(encoded[:, : -self.steps])
        return torch.stack([predict(hidden[-1]) for predict in self.predictors], 1), encoded[:, -self.steps :]

    def loss(self, x: Tensor, temperature: float = 0.1) -> Tensor:
        """Every prediction must find its own step among those of the batch: mean of :func:`info_nce`."""
        predicted, encoded = self(x)
        steps = zip(predicted.unbind(1), encoded.unbind(1), strict=True)
        return torch.stack([info_nce(a, b, temperature) for a, b in steps]).mean()


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, alpha: float = 0.7
) -> Tensor:
    """What a student learns of a teacher's softened scores and of the labels (Hinton et al., 2015).

    ``alpha * temperature ** 2 * KL(teacher / temperature || student / temperature) + (1 - alpha) * cross entropy``.

    Args:
        student: scores ``[N, classes]``.
        teacher: scores ``[N, classes]``; no gradient goes there.
        labels: int64 ``[N]``.
        temperature: divides both scores.
        alpha: share of the teacher.

    Example:
        >>> scores = torch.randn(4, 3)
        >>> abs(float(distillation_loss(scores, scores, torch.zeros(4, dtype=torch.int64), alpha=1.0))) < 1e-5
        True
    """
    learned, taught = ((scores / temperature).log_softmax(1) for scores in (student, teacher.detach()))
    distance = F.kl_div(learned, taught, reduction="batchmean", log_target=True) * temperature**2
    return alpha * distance + (1 - alpha) * F.cross_entropy(student, labels)
