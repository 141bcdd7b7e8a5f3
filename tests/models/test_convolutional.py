"""Models of convolutions: torch's numbers, real images, checkpoints, transfer, second derivatives."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from as_torch import assert_as_torch, assert_state_round_trip, torch_functions
from learning import learn
from real_images import digits, patches
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.models import (
    EDSR,
    ConvNet,
    Critic,
    DARTSCell,
    ImageGenerator,
    PatchGAN,
    Pix2PixGenerator,
    ResNet,
    StyleTransferNet,
    UNet,
    gradient_penalty,
    gram_matrix,
    resnet18,
    resnet34,
    resnet50,
)
from ptkernels.models.darts import OPERATIONS
from ptkernels.models.resnet import BasicBlock, Bottleneck
from ptkernels.nn import ConvBNReLU2d


class Weighted(nn.Module):
    """A cell together with the architecture's weights, which are parameters."""

    def __init__(self, cell: DARTSCell) -> None:
        super().__init__()
        self.cell = cell
        self.alphas = nn.Parameter(torch.randn(cell.num_edges, len(OPERATIONS)))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.cell(first, second, self.alphas.softmax(-1))


def tiny_resnet(block: Any = BasicBlock) -> ResNet:
    return ResNet(block, (2, 1, 1, 1), num_classes=10, width=8)


def image(size: int, channels: int = 3, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size)


MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ConvNet": (lambda: ConvNet(), (image(16),)),
    "ResNet of basic blocks": (tiny_resnet, (image(40),)),
    "ResNet of bottlenecks": (lambda: tiny_resnet(Bottleneck), (image(33),)),
    "StyleTransferNet": (lambda: StyleTransferNet(4, 1), (image(12),)),
    "UNet": (lambda: UNet(3, 2, 4, 2), (image(16),)),
    "EDSR": (lambda: EDSR(2, 8, 2), (image(7),)),
    "EDSR scaled": (lambda: EDSR(2, 8, 2, scale=0.1), (image(7),)),
    "Critic": (lambda: Critic(3, 4, 16), (image(16),)),
    "PatchGAN": (lambda: PatchGAN(6, 4), (image(40), image(40))),
    "Pix2PixGenerator": (lambda: Pix2PixGenerator(3, 2, 4, 3), (image(16),)),
    "DARTSCell": (lambda: Weighted(DARTSCell(6, 5, 4, nodes=2)), (image(8, 6), image(8, 5))),
    "DARTSCell, reduction": (
        lambda: Weighted(DARTSCell(6, 5, 4, nodes=2, reduction=True, reduction_before=True)),
        (image(14, 6), image(7, 5)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_as_torch(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    assert_as_torch(model, *inputs)
    assert_state_round_trip(model, make(), *inputs)


@pytest.mark.parametrize("name", ["ConvNet", "ResNet of basic blocks", "UNet", "StyleTransferNet"])
@torch.no_grad()
def test_channels_last(name: str) -> None:
    make, (x,) = MODELS[name]
    model = make().eval()
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- ConvNet: the whole life of a model


def recipe(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=1e-6)


def train(model: nn.Module, optimizer: Any, scheduler: Any, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for images, classes in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), classes)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def test_convnet_learns_digits_is_interrupted_goes_on_and_is_exported() -> None:
    images, classes = digits(384, 8)
    batches = list(zip(images.split(32), classes.split(32), strict=True))
    model = ConvNet()
    optimizer, scheduler = recipe(model)
    losses = train(model, optimizer, scheduler, batches)
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()}, file)
    losses += train(model, optimizer, scheduler, batches)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.3

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = ConvNet()
    parts = {"model": again, **dict(zip(("optimizer", "scheduler"), recipe(again), strict=True))}
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"])
    assert train(again, parts["optimizer"], parts["scheduler"], batches) == losses[len(batches) :]

    model.eval()
    program = torch.export.export(model, (images[:4],))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(images[:4]), model(images[:4]))


def test_early_stopping_restores_the_best() -> None:
    """Ten epochs without a better validation loss end the training; the best state was kept."""
    images, classes = digits(64, 8)
    model = ConvNet()
    optimizer, scheduler = recipe(model)
    best, kept, waited, epochs = float("inf"), {}, 0, 0
    wrong = (classes[:32] + 1) % 10  # learning them makes the validation loss worse for good
    while waited < 10:
        train(model.train(), optimizer, scheduler, [(images[:32], wrong)])
        with torch.no_grad():
            loss = F.cross_entropy(model.eval()(images[32:]), classes[32:]).item()
        epochs += 1
        waited = 0 if loss < best else waited + 1
        if loss < best:
            best, kept = loss, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert epochs < 60
    model.load_state_dict(kept)
    with torch.no_grad():
        assert F.cross_entropy(model.eval()(images[32:]), classes[32:]).item() == best


# --- ResNet


@pytest.mark.parametrize(("make", "parameters"), [(resnet18, 11689512), (resnet34, 21797672), (resnet50, 25557032)])
def test_resnet_has_torchvisions_parameters(make: Any, parameters: int) -> None:
    with torch.device("meta"):
        model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    names = set(model.state_dict())
    block = "layer2.0"
    convolutions = {"conv1", f"{block}.conv1", f"{block}.conv2", f"{block}.downsample.0"}
    norms = {"bn1", f"{block}.bn1", f"{block}.bn2", f"{block}.downsample.1"}
    buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{name}.weight" for name in convolutions} | {f"{name}.{part}" for name in norms for part in buffers}
    assert expected | {"fc.weight", "fc.bias"} <= names


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@torch.no_grad()
def test_resnet_is_transformers_resnet(kind: str) -> None:
    """The same weights under their names: stages, strides and residuals are where they are elsewhere."""
    transformers = pytest.importorskip("transformers")
    block = BasicBlock if kind == "basic" else Bottleneck
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8 * block.expansion << stage for stage in range(4)],
        depths=[2, 1, 1, 1],
        layer_type=kind,
        num_labels=10,
    )
    theirs, ours = transformers.ResNetForImageClassification(config).eval(), tiny_resnet(block).eval()
    mine = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        mine[torchvision_name(name)].copy_(torch.randn_like(tensor) * 0.1 + 0.5 if "running_var" in name else tensor)
        tensor.copy_(mine[torchvision_name(name)])
    x = image(64)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


def torchvision_name(name: str) -> str:
    parts = name.removeprefix("resnet.").split(".")
    kinds = {"convolution": "conv", "normalization": "bn"}
    if parts[0] == "classifier":
        return f"fc.{parts[-1]}"
    if parts[0] == "embedder":
        return f"{kinds[parts[-2]]}1.{parts[-1]}"
    stage, index, rest = parts[2], parts[4], parts[5:]
    prefix = f"layer{int(stage) + 1}.{index}"
    if rest[0] == "shortcut":
        return f"{prefix}.downsample.{0 if rest[1] == 'convolution' else 1}.{rest[-1]}"
    return f"{prefix}.{kinds[rest[2]]}{int(rest[1]) + 1}.{rest[-1]}"


def test_transfer_trains_only_the_new_layer() -> None:
    images, classes = digits(64, 32)
    model = tiny_resnet().requires_grad_(False)
    model.fc = nn.Linear(model.fc.in_features, 10)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "fc" not in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.eval()  # normalisation too stays as it was
    losses = learn(optimizer, lambda: F.cross_entropy(model(images), classes), 8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert model.layer1[0].conv1.weight.grad is None


def test_fine_tuning_with_frozen_statistics() -> None:
    """Weights train while every normalisation uses its running statistics and leaves them alone."""
    images, classes = digits(32, 32)
    model = tiny_resnet()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss = F.cross_entropy(model(images), classes)
    loss.backward()
    with torch_functions():
        F.cross_entropy(plain(images), classes).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    optimizer.step()
    assert F.cross_entropy(model(images), classes) < loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


def test_grad_cam_through_hooks() -> None:
    """Hooks on stages fire, forward and backward: where in the image a class was seen."""
    model, seen = tiny_resnet().eval(), {}
    model.layer4.register_forward_hook(lambda module, args, out: seen.update(features=out))
    model.layer4.register_full_backward_hook(lambda module, inputs, outputs: seen.update(gradient=outputs[0]))
    model(image(64))[:, 3].sum().backward()
    heat = F.relu((seen["features"] * seen["gradient"].mean((2, 3), keepdim=True)).sum(1))
    assert heat.shape == (3, 2, 2)
    assert bool(heat.isfinite().all())


# --- images to images


def test_style_network_learns_to_copy_a_photograph() -> None:
    photos = patches(2, 24)
    model = StyleTransferNet(8, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def loss() -> Tensor:
        out = model(photos)
        return F.mse_loss(out, photos) + (gram_matrix(out) - gram_matrix(photos)).square().mean()

    losses = learn(optimizer, loss, 15)
    assert losses[-1] < 0.7 * losses[0]


def test_instance_norm_is_torchs() -> None:
    block = ConvBNReLU2d(3, 5, 3, 2, 1, norm="instance", affine=False)
    x = image(9)
    expected = F.relu(F.instance_norm(block.conv(x)))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block(x, expected), F.relu(F.instance_norm(block.conv(x)) + expected))


def test_gram_matrix_of_any_layout() -> None:
    x = image(6, 4)
    expected = torch.einsum("nahw,nbhw->nab", x, x) / (4 * 36)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(gram_matrix(x.contiguous(memory_format=layout)), expected)


def test_unet_segments() -> None:
    """Bright against dark pixels of photographs."""
    photos = patches(4, 16)
    target = (photos.mean(1) > photos.mean()).long()
    model = UNet(3, 2, 8, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    learn(optimizer, lambda: F.cross_entropy(model(photos), target), 15)
    assert (model(photos).argmax(1) == target).float().mean() > 0.9
    with pytest.raises(ValueError, match=r"UNet: x: got shape \[1, 3, 10, 16\], expected .* multiples of 4"):
        model(torch.randn(1, 3, 10, 16))


def test_super_resolution_beats_its_start() -> None:
    sharp = patches(4, 16)
    small = F.avg_pool2d(sharp, 2)
    model = EDSR(2, 8, 2)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = learn(optimizer, lambda: F.l1_loss(model(small), sharp), 20)
    assert losses[-1] < 0.6 * losses[0]
    with pytest.raises(ValueError, match="upscale: got 3"):
        EDSR(3)


# --- adversaries


def test_gradient_penalty_is_differentiated_twice_as_with_torch() -> None:
    critic = Critic(3, 4, 16).double()
    real, fake = image(16).double(), image(16).double()
    gradients = []
    for plain in (False, True):
        critic.zero_grad()
        generator = torch.Generator().manual_seed(1)
        if plain:
            with torch_functions():
                penalty = gradient_penalty(critic, real, fake, generator)
                penalty.backward()
        else:
            penalty = gradient_penalty(critic, real, fake, generator)
            penalty.backward()
        gradients.append([penalty.detach(), *(p.grad for p in critic.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 4
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_wasserstein_gan_trains() -> None:
    """The critic tells photographs from the generator's images better and better; the generator answers."""
    real = patches(8, 16)
    critic, painter = Critic(3, 8, 16), ImageGenerator(6, 3, 8, 16)
    noise = torch.randn(8, 6)
    slow, fast = (torch.optim.Adam(m.parameters(), 2e-3, betas=(0.0, 0.9)) for m in (painter, critic))
    distances = []
    for _ in range(8):
        fake = painter(noise).detach()
        fast.zero_grad()
        distance = critic(real).mean() - critic(fake).mean()
        (10 * gradient_penalty(critic, real, fake) - distance).backward()
        fast.step()
        distances.append(distance.item())
    assert distances[-1] > distances[0]
    before = critic(painter(noise)).mean()
    slow.zero_grad()
    (-before).backward()
    slow.step()
    assert critic(painter(noise)).mean() > before


def test_pix2pix_trains() -> None:
    """From grey to colour: adversarial loss on patches, and a hundred times the distance."""
    colour = patches(4, 32)
    grey = colour.mean(1, keepdim=True)
    painter, judge = Pix2PixGenerator(1, 3, 8, 3), PatchGAN(4, 8, 2)
    optimizers = [torch.optim.Adam(m.parameters(), 5e-3, betas=(0.5, 0.999)) for m in (painter, judge)]
    distances = []
    for _ in range(10):
        fake = painter(grey)
        scores = [judge(grey, image) for image in (colour, fake.detach())]
        targets = [torch.ones_like(scores[0]), torch.zeros_like(scores[1])]
        judged = sum(map(F.binary_cross_entropy_with_logits, scores, targets))
        optimizers[1].zero_grad()
        judged.backward()
        optimizers[1].step()
        fooled = judge(grey, fake)
        distance = F.l1_loss(fake, colour)
        optimizers[0].zero_grad()
        (F.binary_cross_entropy_with_logits(fooled, torch.ones_like(fooled)) + 100 * distance).backward()
        optimizers[0].step()
        distances.append(distance.item())
    assert distances[-1] < 0.7 * distances[0]


def test_architecture_weights_are_learned() -> None:
    cell = Weighted(DARTSCell(3, 3, 4, nodes=2))
    x = patches(4, 16)
    optimizer = torch.optim.Adam([cell.alphas], 0.1)
    target = cell.cell.edges[0][list(OPERATIONS).index("sep_conv_3x3")](cell.cell.older(x)).detach()
    losses = learn(optimizer, lambda: F.mse_loss(cell(x, x)[:, :4], target), 8)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"weights: got shape \[1, 8\], expected \[5, 8\]"):
        cell.cell(x, x, torch.ones(1, 8))
