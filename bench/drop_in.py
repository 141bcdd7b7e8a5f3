"""Published architectures before and after ptkernels.replace(): outputs, gradients, time and memory, as JSON.

    python bench/drop_in.py results.json [--only NAME]

Needs torchvision, timm and transformers; weights are random, nothing is downloaded. Gradients of every parameter are
checked against the model in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn

from ptkernels.cli import machine
from ptkernels.cli.console import print_table
from ptkernels.cli.replace import HEADER, Measured, Subject, measure, table_row

IMAGE = (2, 3, 64, 64)
TEXT = (2, 64)


def vision(name: str, ops: str, make: Callable[[], nn.Module]) -> Subject:
    return Subject(name, lambda: (make(), torch.randn(IMAGE)), ops)


def text(name: str, model: str, config: str, **options: Any) -> Subject:
    def make() -> tuple[nn.Module, Any]:
        made = getattr(transformers, config)(vocab_size=1000, **options)
        inputs = {"input_ids": torch.randint(3, 1000, TEXT)}
        if made.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        return getattr(transformers, model)(made), inputs

    return Subject(f"transformers {name}", make, "attention")


def whisper() -> tuple[nn.Module, Any]:
    sizes = {"d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    model = transformers.WhisperModel(transformers.WhisperConfig(vocab_size=1000, pad_token_id=0, **sizes))
    return model, {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.randint(3, 1000, (1, 64))}


def subjects() -> list[Subject]:
    convolutions = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")
    found = [
        vision(
            f"torchvision {name}", "conv_bn_relu", lambda name=name: torchvision.models.get_model(name, weights=None)
        )
        for name in convolutions
    ]
    found += [
        vision(f"timm {name}", ops, lambda name=name, options=options: timm.create_model(name, **options))
        for name, ops, options in (
            ("resnet50d", "conv_bn_relu", {}),
            ("convnext_atto", "conv_bn_relu", {}),
            ("vit_tiny_patch16_224", "attention", {"img_size": 64}),
        )
    ]
    small = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    vit = transformers.ViTConfig(**small, image_size=64)
    found += [
        vision("torchvision vit_b_16", "attention", lambda: torchvision.models.vit_b_16(weights=None, image_size=64)),
        text("BERT", "BertModel", "BertConfig", **small),
        text("GPT-2", "GPT2LMHeadModel", "GPT2Config", n_embd=256, n_layer=4, n_head=4),
        text("Llama", "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **small),
        text("T5", "T5Model", "T5Config", d_model=256, num_layers=2, num_heads=4, d_ff=512),
        vision("transformers ViT", "attention", lambda: transformers.ViTModel(vit)),
        Subject("transformers Whisper", whisper, "attention"),
    ]
    return found


def attempt(subject: Subject, seconds: float) -> Measured | None:
    """None, and a line that says so, where replace() finds nothing to do."""
    try:
        return measure(subject, seconds)
    except ValueError as error:
        print(f"{subject.name}: {error}", flush=True)
        return None


def write(file: Path, rows: list[Measured]) -> None:
    about = {
        "cpu": machine.cpu_model(),
        "isa": machine.isa()["active"],
        "threads": torch.get_num_threads(),
        "versions": machine.versions("torchvision", "timm", "transformers"),
    }
    content = {"machine": about, "image": IMAGE, "text": TEXT, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    arguments = parser.parse_args()
    rows = []
    for subject in subjects():
        if arguments.only in subject.name and (row := attempt(subject, arguments.seconds)) is not None:
            rows.append(row)
            write(arguments.file, rows)
            print("  ".join(table_row(row)), flush=True)
    print_table("Before and after replace()", HEADER, [table_row(row) for row in rows])


if __name__ == "__main__":
    main()
