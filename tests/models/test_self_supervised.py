"""Learning without labels around our blocks: deep copies, moving averages, hooks, and losses against their formulas."""

from __future__ import annotations

import copy
from typing import Any

import learning
import pytest
import torch
from as_torch import assert_as_torch
from real_images import digits
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.models import (
    BYOL,
    CPC,
    ConvNet,
    MaskedAutoencoder,
    MoCo,
    ResNet,
    SimCLR,
    ViT,
    distillation_loss,
    info_nce,
    nt_xent,
    update_average,
)
from ptkernels.models.resnet import BasicBlock


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def encoder(dim: int = 16) -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=dim, width=4)


def views(count: int = 16) -> tuple[Tensor, Tensor]:
    """Two views of digits: shifted, dimmed, with noise."""
    images, _ = digits(count, 16)
    generator = torch.Generator().manual_seed(0)
    return images.roll(1, 3) + 0.1 * torch.randn(images.shape, generator=generator), 0.8 * images.roll(1, 2)


def learn(model: nn.Module, loss: Any, steps: int, after: Any = lambda: None) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    return learning.learn(optimizer, loss, steps, after=after)


def test_contrastive_losses_are_their_formulas() -> None:
    first, second = torch.randn(2, 5, 8).double()
    together = F.normalize(torch.cat([first, second]), dim=1)
    cosines = together @ together.T / 0.5
    expected = 0.0
    for row in range(10):
        others = [column for column in range(10) if column != row]
        expected -= cosines[row, (row + 5) % 10] - cosines[row, others].logsumexp(0)
    torch.testing.assert_close(nt_xent(first, second), expected / 10)
    scores = torch.stack([F.cosine_similarity(query[None], second) for query in first]) / 0.1
    torch.testing.assert_close(info_nce(first, second), F.cross_entropy(scores, torch.arange(5)))


def test_simclr_learns() -> None:
    model = SimCLR(encoder(), 16, 16, 8)
    losses = learn(model, lambda: model.loss(*views()), 10)
    assert losses[-1] < losses[0] - 0.1


def test_moco_queue_turns_and_its_copy_follows() -> None:
    model = MoCo(encoder(), 16, queue_size=32, momentum=0.5)
    before, queue = copy.deepcopy(model.key_encoder), model.queue.clone()
    model.loss(*views()).backward()
    assert all(parameter.grad is None for parameter in model.key_encoder.parameters())
    assert int(model.position) == 16
    assert torch.equal(model.queue[16:], queue[16:])
    torch.testing.assert_close(model.queue[:16].norm(dim=1), torch.ones(16))
    with torch.no_grad():
        model.encoder.fc.weight.add_(1.0)
    expected = 0.5 * before.fc.weight + 0.5 * model.encoder.fc.weight
    with torch.no_grad():
        model.loss(*views())
    torch.testing.assert_close(model.key_encoder.fc.weight, expected)
    assert int(model.position) == 0
    with pytest.raises(ValueError, match="key_view: got a batch of 7, expected a divisor of queue_size"):
        model.loss(torch.zeros(7, 3, 16, 16), torch.randn(7, 3, 16, 16))


def test_byol_learns_and_its_copy_follows() -> None:
    model = BYOL(encoder(), 16, 16, 8, momentum=0.9)
    start = copy.deepcopy(model.target.state_dict())
    losses = learn(model, lambda: model.loss(*views()), 8, model.update)
    assert losses[-1] < losses[0]
    moved = [name for name, tensor in model.target.state_dict().items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(start)


def test_average_counts_batches_and_is_used_at_once() -> None:
    """In place moves of weights reach the next call: nothing packed is stale. Integer buffers stay integers."""
    online = ConvNet(num_classes=4).eval()
    average = copy.deepcopy(online)
    x = torch.randn(2, 3, 8, 8)
    online.train()(x)
    online.eval()
    with torch.no_grad():
        first = average(x)
        for parameter in online.parameters():
            parameter.data += 0.1
        update_average(average, online, decay=0.5)
        expected = copy.deepcopy(online)
        for mine, theirs in zip(expected.parameters(), online.parameters(), strict=True):
            mine.copy_(theirs - 0.05)
        assert not torch.equal(average(x), first)
        torch.testing.assert_close(average(x), expected(x), rtol=1e-4, atol=1e-5)
    assert int(average.blocks[0][0].bn.num_batches_tracked) == 1
    assert average.blocks[0][0].bn.num_batches_tracked.dtype == torch.int64


def vit() -> ViT:
    return ViT(image_size=12, patch_size=3, num_classes=10, hidden_size=16, num_layers=1, num_heads=2)


def test_masked_autoencoder_learns_and_its_encoder_is_used() -> None:
    images, classes = digits(32, 12)
    model = MaskedAutoencoder(vit(), decoder_dim=16, decoder_heads=2)
    losses = learn(model, lambda: model.loss(images), 25)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    painted, real, mask = model(images)
    assert painted.shape == real.shape == (32, 16, 27)
    assert bool((mask.sum(1) == 12).all())
    # The patches are the image's, in order.
    torch.testing.assert_close(real[0, 1].view(3, 3, 3), images[0, :, :3, 3:6])
    head = learn(model.encoder, lambda: F.cross_entropy(model.encoder(images), classes), 5)
    assert head[-1] < head[0]


@torch.no_grad()
def test_hidden_patches_are_not_seen() -> None:
    """What is painted depends on the visible patches alone."""
    model = MaskedAutoencoder(vit(), decoder_dim=16, decoder_heads=2).eval()
    images = torch.randn(2, 3, 12, 12)
    painted, _, mask = model(images, torch.Generator().manual_seed(3))
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(3, 2).repeat_interleave(3, 3)
    again, _, _ = model(torch.where(hidden, 100.0, images), torch.Generator().manual_seed(3))
    assert torch.equal(painted, again)


def test_cpc_learns_a_walk() -> None:
    steps = torch.linspace(0, 3, 12)[None, :, None] + torch.rand(16, 1, 1) * 6
    waves = torch.cat([steps.sin(), steps.cos()], 2)
    model = CPC(nn.Linear(2, 8), 8, 16, 3)
    losses = learn(model, lambda: model.loss(waves), 25)
    assert losses[-1] < 0.7 * losses[0]
    assert_as_torch(CPC(nn.Linear(2, 8), 8, 16, 3), waves)
    with pytest.raises(ValueError, match=r"CPC: x: got 3 steps, expected more than prediction_steps \(3\)"):
        model(waves[:, :3])


def test_student_learns_from_its_teacher() -> None:
    """The teacher is frozen; hooks compare features inside both."""
    images, classes = digits(32, 16)
    teacher = encoder(10).eval().requires_grad_(False)
    student, seen = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, width=4), {}
    for name, model in (("teacher", teacher), ("student", student)):
        model.layer2.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))

    def loss() -> Tensor:
        scores = student(images)
        taught = distillation_loss(scores, teacher(images), classes)
        return taught + F.mse_loss(seen["student"], seen["teacher"])

    losses = learn(student, loss, 8)
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    scores = torch.randn(2, 4, 3)
    soft = (scores[1] / 2).softmax(1)
    divergence = (soft * (soft.log() - (scores[0] / 2).log_softmax(1))).sum(1).mean()
    expected = 0.7 * 4 * divergence + 0.3 * F.cross_entropy(scores[0], torch.tensor([0, 1, 2, 0]))
    actual = distillation_loss(scores[0], scores[1], torch.tensor([0, 1, 2, 0]), temperature=2.0)
    torch.testing.assert_close(actual, expected)
