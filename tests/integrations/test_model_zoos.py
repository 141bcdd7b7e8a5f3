"""torchvision's, timm's and pretrained models on the operators: the same function, and back to what they were.

Architectures are whole in kind, small in size: every kind of block, few of each. Those of transformers are in
test_transformers.py.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoos import efficientnet_lite0, sentence_encoder, speaker_encoder, zoo
from real_images import photographs
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels._replace.conv_bn_relu import _Fused

IMAGES = (3, 3, 48, 48)
CLASSES = 5


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """By the constructor that the models of its file share; randomly initialised."""
    zoo("torchvision")
    from torchvision.models import efficientnet, mobilenetv2, mobilenetv3, resnet, vgg, vision_transformer

    wide = functools.partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    makers: dict[str, Callable[[], nn.Module]] = {
        "resnet basic": lambda: resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=CLASSES),
        "resnet bottleneck": lambda: resnet.ResNet(
            resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=4, width_per_group=4
        ),
        "vgg": lambda: with_small_head(lambda: vgg.VGG(vgg.make_layers([8, "M", 16, 16, "M", 24, "M"]))),
        "vgg bn": lambda: with_small_head(lambda: vgg.VGG(vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True))),
        "mobilenet v2": lambda: mobilenetv2.MobileNetV2(
            CLASSES, inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 2]], width_mult=0.5
        ),
        "mobilenet v3": lambda: mobilenetv3.MobileNetV3(
            [
                wide(8, 3, 16, 8, True, "RE", 2),
                wide(8, 5, 32, 16, False, "HS", 2),
                wide(16, 5, 32, 16, True, "HS", 1),
            ],
            32,
            num_classes=CLASSES,
        ),
        "efficientnet": lambda: efficientnet.EfficientNet(
            [efficientnet.MBConvConfig(1, 3, 1, 16, 8, 1), efficientnet.MBConvConfig(6, 5, 2, 8, 12, 2)],
            0.2,
            num_classes=CLASSES,
        ),
        "efficientnet v2": lambda: efficientnet.EfficientNet(
            [efficientnet.FusedMBConvConfig(4, 3, 2, 8, 16, 2), efficientnet.MBConvConfig(4, 3, 2, 16, 16, 1)],
            0.2,
            num_classes=CLASSES,
            last_channel=32,
        ),
        "vit": lambda: vision_transformer.VisionTransformer(48, 8, 2, 2, 16, 32, num_classes=CLASSES),
    }
    return makers[name]()


def with_small_head(make: Callable[[], nn.Module]) -> nn.Module:
    """VGG's own has a hundred million weights."""
    with torch.device("meta"):
        model = make()
    channels = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(channels[-1], CLASSES)
    for module in model.to_empty(device="cpu").modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def timm_model(name: str, **options: Any) -> nn.Module:
    model: nn.Module = zoo("timm").create_model(name, num_classes=CLASSES, **options)
    return model


# What makes it, the operator, and how many chains of layers, or layers, are replaced.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "torchvision ResNet, basic": (lambda: torchvision_model("resnet basic"), "conv_bn_relu", 14),
    "torchvision ResNet, bottleneck": (lambda: torchvision_model("resnet bottleneck"), "conv_bn_relu", 17),
    "torchvision VGG": (lambda: torchvision_model("vgg"), "conv_bn_relu", 4),
    "torchvision VGG, normalised": (lambda: torchvision_model("vgg bn"), "conv_bn_relu", 3),
    "torchvision MobileNetV2": (lambda: torchvision_model("mobilenet v2"), "conv_bn_relu", 13),
    "torchvision MobileNetV3": (lambda: torchvision_model("mobilenet v3"), "conv_bn_relu", 13),
    "torchvision EfficientNet": (lambda: torchvision_model("efficientnet"), "conv_bn_relu", 16),
    "torchvision EfficientNetV2": (lambda: torchvision_model("efficientnet v2"), "conv_bn_relu", 11),
    "torchvision ViT": (lambda: torchvision_model("vit"), "attention", 2),
    "timm ResNet": (
        lambda: timm_model("resnet50d", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8),
        "conv_bn_relu",
        18,
    ),
    "timm ResNet with attention to channels": (
        lambda: timm_model("seresnet50", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)),
        "conv_bn_relu",
        25,
    ),
    "timm ConvNeXt": (
        lambda: timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)), "conv_bn_relu", 10,
    ),
    "timm ViT": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=16, depth=2, num_heads=2),
        "attention",
        2,
    ),
}  # fmt: skip


@functools.cache
def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for parameter in model.parameters():
        if not parameter.any():  # as some initialise heads and last norms: nothing would come through
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_function_and_back(name: str, training: bool) -> None:
    model, (_, op, count) = copy.deepcopy(made(name)).eval(), MODELS[name]
    x = torch.randn(IMAGES)
    with torch.no_grad():
        expected = model(x)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = ptk.replace(model.train(training), op, verify=True, example_inputs=x)
    assert len(report.replaced) == count, str(report)
    assert all(item.holds for item in report.verified)
    assert len(report.verified) >= len(list(model.parameters()))
    moved = [sum(getattr(item, name) for item in report.predicted) for name in ("moved_before", "moved_after")]
    assert moved[1] < moved[0] or (op == "attention" and moved[1] == moved[0])  # where torch's own is fused
    assert list(model.state_dict()) == list(state)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-5)
        report.undo()
        assert torch.equal(model(x), expected)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("act_layer", ["relu", "silu", "gelu", "leaky_relu", "hard_swish", "sigmoid", "mish"])
@pytest.mark.parametrize("training", [False, True])
def test_timms_layer(act_layer: str, training: bool) -> None:
    """Its activation is part of the norm, and some are modules of timm's own."""
    zoo("timm")
    from timm.layers import ConvNormAct

    torch.manual_seed(0)
    model = nn.Sequential(
        ConvNormAct(3, 4, 3, stride=2, act_layer=act_layer), ConvNormAct(4, 4, 1, apply_act=False, bias=True)
    )
    x = torch.randn(2, 3, 7, 7)
    report = ptk.replace(model.train(training), "conv_bn_relu", verify=True, example_inputs=x)
    assert [(item.path, item.module) for item in report.replaced] == [
        ("0.conv", "Conv2d-BatchNormAct2d"), ("1.conv", "Conv2d-BatchNormAct2d"),
    ]  # fmt: skip


def test_what_timms_layer_does_beyond_the_operator_is_left() -> None:
    """Blur before a stride, dropped blocks, an activation without a kernel, padding that depends on the input."""
    zoo("timm")
    from timm.layers import BlurPool2d, ConvNormAct, DropBlock2d

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "blurred": ConvNormAct(3, 4, 3, stride=2, aa_layer=BlurPool2d),
            "dropped": ConvNormAct(3, 4, 3, drop_layer=DropBlock2d),
            "unknown": ConvNormAct(3, 4, 3, act_layer=nn.Softplus, act_kwargs={"beta": 2}),
            "same": ConvNormAct(3, 4, 3, stride=2, padding="same"),
        }
    )
    report = ptk.replace(model, "conv_bn_relu")
    assert [item.path for item in report.replaced] == ["blurred.conv"]
    assert [(item.path, item.module) for item in report.kept] == [("same.conv", "Conv2dSame")]
    x = torch.randn(2, 3, 8, 8)
    for layer in model.values():
        ours = layer.eval()(x)
        fused, layer.__dict__["forward"] = layer.__dict__.get("forward"), None
        del layer.__dict__["forward"]
        torch.testing.assert_close(ours, layer(x))
        assert fused is None or isinstance(fused, _Fused)


def test_pretrained_image_classifier() -> None:
    model, x = efficientnet_lite0(), photographs()
    with torch.no_grad():
        expected = model(x)
    report = ptk.replace(model, "conv_bn_relu", verify=True, example_inputs=x[:1, :, ::4, ::4])
    assert len(report.replaced) == 44
    assert {item.module for item in report.kept} == {"Conv2dSame"}
    with torch.no_grad():
        scores = model(x)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.topk(5).indices, expected.topk(5).indices)
    palace, daisy = 698, 985
    assert palace in scores[0].topk(5).indices
    assert daisy in scores[1].topk(5).indices


def test_pretrained_sentence_encoder() -> None:
    model = sentence_encoder()
    words = torch.randint(1000, 20000, (3, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[12], [7], [3]])
    mask = (torch.arange(12) < lengths).long()
    inputs = {"input_ids": words, "attention_mask": mask}

    def embeddings() -> Tensor:
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        return nn.functional.normalize((hidden * mask[..., None]).sum(1) / lengths, dim=1)

    expected = embeddings()
    report = ptk.replace(model, verify=True, example_inputs=inputs)
    assert [item.module for item in report.replaced] == ["BertModel"]
    torch.testing.assert_close(embeddings(), expected, rtol=1e-5, atol=1e-6)
    report.undo()
    assert torch.equal(embeddings(), expected)


def test_pretrained_speaker_encoder() -> None:
    model = speaker_encoder()
    generator = torch.Generator().manual_seed(0)
    voices = [torch.rand(frames, 40, generator=generator) for frames in (25, 11, 40)]
    with torch.no_grad():
        expected = model(voices)
    report = ptk.replace(model, verify=True, example_inputs=(voices,))
    assert [(item.path, item.module) for item in report.replaced] == [("lstm", "LSTM")]
    with torch.no_grad():
        torch.testing.assert_close(model(voices), expected, rtol=1e-5, atol=1e-6)
        report.undo()
        assert torch.equal(model(voices), expected)
