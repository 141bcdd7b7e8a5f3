"""Published architectures before and after ptkernels.replace(): outputs, gradients, time and memory, in one table.

    python bench/drop_in.py bench/results/drop_in.json [--only NAME] [--threads 1 --cpu-time]

writes the JSON and, beside it, the table as markdown. Each model has a process of its own, so that the memory of one is
free before the next. Needs what `make build` installs, torchvision and timm among it. Nothing is downloaded: weights
are random, but for the networks that packages carry. Outputs and gradients of every parameter are checked against the
model in float64 before anything is timed. ``--cpu-time`` counts the processor's time of one thread, which is what
remains to be measured on a machine that other programs share.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import model_zoos
import transformers
from real_images import photographs

from ptkernels.cli import machine
from ptkernels.cli.bench import pretrained
from ptkernels.cli.bench.results import commit_id
from ptkernels.cli.bench.timing import Clock
from ptkernels.cli.console import print_table
from ptkernels.cli.files import write_atomically
from ptkernels.cli.replace import HEADER, Measured, Subject, measure, table_row

torchvision, timm = model_zoos.zoo("torchvision"), model_zoos.zoo("timm")

IMAGE = (2, 3, 128, 128)
PATCHES = (2, 3, 224, 224)  # of ViTs, which are made for one size
TEXT = (2, 128)
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def vision(name: str, ops: str, make: Callable[[], nn.Module]) -> Subject:
    return Subject(name, lambda: (make(), torch.randn(PATCHES if ops == "attention" else IMAGE)), ops)


def vgg() -> nn.Module:
    """With one linear layer behind the convolutions: the three that it has make 120 million weights."""
    model = torchvision.models.vgg11_bn()
    model.classifier = nn.Linear(512 * 7 * 7, 1000)
    return model


def text(name: str, model: str, config: str, **options: Any) -> Subject:
    def make() -> tuple[nn.Module, Any]:
        made = getattr(transformers, config)(vocab_size=1000, **SPECIAL, **options)
        inputs = {"input_ids": torch.randint(3, 1000, TEXT)}
        if made.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        return getattr(transformers, model)(made), inputs

    return Subject(f"transformers {name}", make, "attention")


def whisper() -> tuple[nn.Module, Any]:
    part = {"layers": 2, "attention_heads": 4, "ffn_dim": 512}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in part.items()}
    config = transformers.WhisperConfig(vocab_size=1000, d_model=256, decoder_start_token_id=1, **SPECIAL, **sizes)
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.randint(3, 1000, (1, 64))}
    return transformers.WhisperModel(config), inputs


def sentence_encoder() -> tuple[nn.Module, Any]:
    sentences = pretrained.tokenize(pretrained.sentences()[:32], pretrained.model_directory())
    (batch,) = sentences.batches
    return model_zoos.sentence_encoder(), {"input_ids": batch.ids, "attention_mask": batch.mask.long()}


def speaker_encoder() -> tuple[nn.Module, Any]:
    # Utterances of 0.7 to 2.6 seconds, in frames of 10 ms.
    return model_zoos.speaker_encoder(), ([torch.rand(frames, 40) for frames in range(70, 265, 25)],)


def subjects() -> list[Subject]:
    convolutions = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")
    found = [
        vision(f"torchvision {name}", "conv_bn_relu", lambda name=name: torchvision.models.get_model(name))
        for name in convolutions
    ]
    found.insert(2, vision("torchvision vgg11_bn, one linear layer", "conv_bn_relu", vgg))
    found += [
        vision(f"timm {name}", ops, lambda name=name: timm.create_model(name))
        for name, ops in (
            ("resnet50d", "conv_bn_relu"),
            ("convnext_atto", "conv_bn_relu"),
            ("vit_tiny_patch16_224", "attention"),
        )
    ]
    vit = transformers.ViTConfig(**SMALL, image_size=PATCHES[-1])
    found += [
        vision("torchvision vit_b_16", "attention", torchvision.models.vit_b_16),
        text("BERT", "BertModel", "BertConfig", **SMALL),
        text("GPT-2", "GPT2LMHeadModel", "GPT2Config", n_embd=256, n_layer=4, n_head=4),
        text("Llama", "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **SMALL),
        text("T5", "T5Model", "T5Config", d_model=256, num_layers=2, num_heads=4, d_ff=512, decoder_start_token_id=1),
        vision("transformers ViT", "attention", lambda: transformers.ViTModel(vit)),
        Subject("transformers Whisper", whisper, "attention"),
        Subject("all-MiniLM-L6-v2, pretrained, 32 sentences", sentence_encoder, "attention"),
        Subject(
            "EfficientNet-Lite0, pretrained, 2 photographs",
            lambda: (model_zoos.efficientnet_lite0(), photographs()),
            "conv_bn_relu",
        ),
        Subject("Resemblyzer, pretrained, 8 voices", speaker_encoder, "packed_rnn"),
    ]
    return found


def about(clock: str, load: float) -> dict[str, Any]:
    return {
        "cpu": machine.cpu_model(),
        "isa": machine.isa()["active"],
        "threads": torch.get_num_threads(),
        "clock": clock,
        "load": load,
        "versions": {
            **machine.versions("transformers"),
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
    }


def markdown(content: dict[str, Any]) -> str:
    of = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    rows = [(*HEADER, "peak memory"), ("---",) * (len(HEADER) + 1)]
    rows += [(*table_row(Measured(**row)), f"{peak / 2**30:.1f} GiB") for row, peak in _measured(content)]
    lines = [
        "# Before and after `replace()`",
        "",
        f"{of['cpu']} ({of['isa']}), {of['threads']} threads, {of['clock']}, load {of['load']:.1f} at the start; "
        f"commit {content['commit']}; {versions}. Images {content['image']}, of ViTs {content['patches']}, tokens "
        f"{content['text']}. Peak memory is that of the whole measurement, with copies of the model, one of them in "
        "float64.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _measured(content: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    return [({k: v for k, v in row.items() if k != "peak_memory"}, row["peak_memory"]) for row in content["rows"]]


def one(name: str, seconds: float, clock: Clock) -> None:
    """Measure in this process, and print the row."""
    (subject,) = (subject for subject in subjects() if subject.name == name)
    row = asdict(measure(subject, seconds, clock))
    row["peak_memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--threads", type=int, help="torch's threads; default: as it finds best")
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's time; needs one thread")
    parser.add_argument("--here", action="store_true", help="the one subject of exactly that name, in this process")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.cpu_time and torch.get_num_threads() != 1:
        parser.error(f"--cpu-time: got {torch.get_num_threads()} threads, expected --threads 1")
    if arguments.here:
        one(arguments.only, arguments.seconds, time.process_time if arguments.cpu_time else time.perf_counter)
        return
    clock = "CPU time of one thread" if arguments.cpu_time else "wall"
    content: dict[str, Any] = {
        "machine": about(clock, os.getloadavg()[0]), "commit": commit_id(), "image": IMAGE, "patches": PATCHES,
        "text": TEXT, "rows": [],
    }  # fmt: skip
    options = ["--seconds", str(arguments.seconds), "--threads", str(torch.get_num_threads())]
    options += ["--cpu-time"] if arguments.cpu_time else []
    names = [subject.name for subject in subjects() if arguments.only in subject.name]
    for name in names:
        command = [sys.executable, __file__, str(arguments.file), "--here", "--only", name, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        content["rows"].append(json.loads(done.stdout.splitlines()[-1]))
        write_atomically(arguments.file, json.dumps(content, indent=1) + "\n")
        write_atomically(arguments.file.with_suffix(".md"), markdown(content))
        print("  ".join(table_row(Measured(**_measured(content)[-1][0]))), flush=True)
    print_table("Before and after replace()", HEADER, [table_row(Measured(**row)) for row, _ in _measured(content)])


if __name__ == "__main__":
    main()
